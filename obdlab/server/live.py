"""Changes a writable device while it is in use, from any process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from obdlab.errors import DeviceError, ObdlabError
from obdlab.image.config import ImageConfig
from obdlab.layerfiles.snapshot import Snapshot
from obdlab.layers.gc import Collected
from obdlab.server import controlclient, wire
from obdlab.server.messages import (
    Collect,
    Done,
    Flush,
    Recorded,
    Resize,
    Resized,
    TakeSnapshot,
    TraceStart,
    TraceStop,
)
from obdlab.server.rundir import DeviceRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.server.client import AttachedDevice, DeviceService
    from obdlab.server.messages import ControlRequest, Step

T = TypeVar("T")

#: Every change begins or ends with a flush, which may take long on a busy disk.
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class LiveDevice:
    """An attached device, by its id. Every method raises the error of its server."""

    service: DeviceService
    device_id: str

    def flush(self) -> None:
        """Bring written data to stable storage."""
        self._ask(Flush(), Done)

    def collect(self, progress: Callable[[Step], None] | None = None) -> Collected | None:
        """Free the overwritten data of its append-mode writable layer; None if the layer is sparse.

        ``progress`` gets each step. The collection ends if the caller ends early.
        """
        answer = self._ask(Collect(), dict[str, int], progress=progress)
        return wire.typed(answer, Collected) if answer else None

    def resize(self, size: int) -> int:
        """Grow it to ``size`` bytes; return its previous size. The file system on it keeps its size."""
        return self._ask(Resize(size), Resized).before

    def start_recording(self) -> None:
        """Record all reads of its layers from now on, without a pause in serving them."""
        self._ask(TraceStart(), Done)

    def stop_recording(self, path: Path) -> Recorded:
        """Stop recording, and have the trace written to ``path``."""
        return self._ask(TraceStop(str(path.absolute())), Recorded)

    def snapshot(self, new_config: Path) -> Snapshot:
        """Go on in the layer that this configuration names: see :func:`obdlab.layerfiles.snapshot.snapshot`."""
        return self._ask(TakeSnapshot(str(new_config.absolute())), Snapshot)

    def _ask(
        self,
        request: ControlRequest,
        kind: type[T],
        progress: Callable[[Step], None] | None = None,
    ) -> T:
        directory = self.service.run_dir.device(self.device_id)
        if not directory.is_dir():
            raise DeviceError(f"device {self.device_id}: not attached")
        record = DeviceRecord.load(directory)
        if record is not None and record.is_graduated:
            raise DeviceError(
                f"device {self.device_id}: graduated, so it has no server (attach the image with --served)"
            )
        return controlclient.ask(directory, request, kind, silence_s=_TIMEOUT_S, progress=progress)


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
