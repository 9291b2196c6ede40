"""Changes a writable device while it is in use, from any process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.errors import DeviceError, ObdlabError
from obdlab.image.config import ImageConfig
from obdlab.layerfiles.snapshot import Snapshot
from obdlab.layers.gc import Collected
from obdlab.server import controlclient

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.server.client import AttachedDevice, DeviceService

#: Every change begins or ends with a flush, which may take long on a busy disk.
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class RecordedTrace:
    """Content of a trace: how many reads, of how many bytes; ``left_out`` reads came after it was full."""

    reads: int
    size: int
    left_out: int


@dataclass(frozen=True, slots=True)
class LiveDevice:
    """An attached device, by its id. Every method raises DeviceError with its server's reason."""

    service: DeviceService
    device_id: str

    def flush(self) -> None:
        """Bring written data to stable storage."""
        self._ask("flush")

    def collect(self, progress: Callable[[dict[str, Any]], None] | None = None) -> Collected | None:
        """Free the overwritten data of its append-mode writable layer; None if the layer is sparse.

        ``progress`` gets ``{"step": name, "done": n, "total": n}``. The collection ends if the caller ends early.
        """
        answer = self._ask("gc", progress=progress)
        return Collected(**answer) if answer else None

    def resize(self, size: int) -> int:
        """Grow it to ``size`` bytes; return its previous size. The file system on it keeps its size."""
        return int(self._ask("resize", {"size": size})["before"])

    def start_recording(self) -> None:
        """Record all reads of its layers from now on, without a pause in serving them."""
        self._ask("trace-start")

    def stop_recording(self, path: Path) -> RecordedTrace:
        """Stop recording, and have the trace written to ``path``."""
        return RecordedTrace(**self._ask("trace-stop", {"path": str(path.absolute())}))

    def snapshot(self, new_config: Path) -> Snapshot:
        """Go on in the layer that this configuration names: see :func:`obdlab.layerfiles.snapshot.snapshot`."""
        return Snapshot(**self._ask("snapshot", {"config": str(new_config.absolute())}))

    def _ask(
        self,
        op: str,
        arguments: dict[str, Any] | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        directory = self.service.run_dir.device(self.device_id)
        if not directory.is_dir():
            raise DeviceError(f"device {self.device_id}: not attached")
        return controlclient.ask(directory, op, arguments, silence_s=_TIMEOUT_S, progress=progress)


def find_device(service: DeviceService, name: str) -> AttachedDevice | None:
    """Return the device with this id or node (such as /dev/loop3)."""
    return next((device for device in service.list() if name in (device.device_id, str(device.path))), None)


def find_by_upper(service: DeviceService, data: str | os.PathLike[str]) -> AttachedDevice | None:
    """Return the device whose writable layer has this data file."""
    for device in service.list():
        try:
            upper = ImageConfig.load(device.config).upper
            if device.alive and upper.active and os.path.samefile(upper.data, data):
                return device
        except (ObdlabError, OSError):  # the configuration is no longer an image's, or a layer is gone
            continue
    return None
