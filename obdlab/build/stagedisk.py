"""The disk of one stage: a device on the layers so far, mounted, whose changes are sealed step by step.

At the end of a step the file system is brought to rest (remounted read-only), the device's writable layer is sealed
where it lies, and the device goes on in a fresh one above: DADI's stack-and-commit. Nothing is unmounted, copied or
compressed before the next step begins.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from obdlab.build.inside import Inside
from obdlab.closing import Closing
from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, UpperConfig
from obdlab.layerfiles.snapshot import make_next
from obdlab.layers.append import AppendUpper
from obdlab.server.live import LiveDevice
from obdlab.system import abi
from obdlab.system.mount import unmount

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from obdlab.image.config import LowerConfig
    from obdlab.server.client import DeviceService

# Blocks that a step frees are dropped from its layer. Device nodes that it makes stay without effect here.
_OPTIONS = "discard,nodev"
_MS_NODEV = 4
# Closed files of killed processes are let go of a moment later.
_REST_S = 20.0
#: The counters of a device's source with bytes that came from a registry.
_FETCHED = ("demand_bytes", "readahead_bytes", "background_bytes", "prefetch_bytes")
_LOOK_S = 0.02


class StageDisk(Closing):
    """A mounted stage. ``place`` is a directory of the run directory, ``work`` one for the layers' files.

    Without ``writable`` nothing can be changed. Must be closed in the mount namespace in which it was made; it needs
    one of its own (``abi.own_mounts``), so that a killed process leaves no mounts. Raises DeviceError, and the errors
    of opening the layers.
    """

    def __init__(
        self,
        service: DeviceService,
        place: Path,
        work: Path,
        number: int,
        lowers: Sequence[LowerConfig],
        repo_blob_url: str,
        *,
        writable: bool,
    ) -> None:
        self._service = service
        self._work = work
        self._number = number
        self._steps = 0
        self._directory = place / f"stage-{number}"
        self._id = f"{place.name}.{number}"
        self._config = self._directory / "config.v1.json"
        self.root = self._directory / "root"
        self.root.mkdir(parents=True)
        config = ImageConfig(repo_blob_url=repo_blob_url, lowers=tuple(lowers))
        self._upper = self._data()
        if writable:
            index = self._upper.with_suffix(".index")
            AppendUpper.create(self._upper, index, 0).close()
            config = ImageConfig(repo_blob_url, tuple(lowers), UpperConfig(str(index), str(self._upper)))
        config.save(self._config)
        device = service.attach(self._config, self._id)
        try:
            service.mount(device, self.root, options=_OPTIONS if writable else "", read_only=not writable)
            self.inside = Inside(self.root)
        except BaseException:
            self._take_down()
            raise

    def seal(self) -> Path:
        """Seal the layer of the step that has ended; return its file. Writes go to a fresh layer from then on.

        No process may have a file of the disk open for writing. Raises DeviceError.
        """
        self._remount(read_only=True)
        sealed = self._upper
        self._steps += 1
        self._upper = self._data()
        following = make_next(self._config, self._upper, self._upper.with_suffix(".index"))
        path = self._directory / "next.config.v1.json"
        following.save(path)
        LiveDevice(self._service, self._id).snapshot(path)
        self._remount(read_only=False)
        return sealed

    def bytes_fetched(self) -> int:
        """Return how many bytes the device has fetched from registries so far; 0 if its server does not answer."""
        try:
            found = self._service.statistics(self._id).get("source") or {}
        except DeviceError:
            return 0
        return int(sum(found.get(name, 0) for name in _FETCHED))

    def release(self) -> None:
        """End reads of the disk that hang, by taking the device away."""
        self._service.detach(self._id, force=True)

    def close(self) -> None:
        """Unmount and detach."""
        self.inside.close()
        self._take_down()

    def _take_down(self) -> None:
        stuck = False
        try:
            unmount(self.root)
        except DeviceError:
            stuck = True
            unmount(self.root, lazy=True)
        finally:
            self._service.detach(self._id, force=stuck)

    def _data(self) -> Path:
        return self._work / f"{self._number}-{self._steps}.data"

    def _remount(self, *, read_only: bool) -> None:
        flags = abi.MS_REMOUNT | _MS_NODEV | (abi.MS_RDONLY if read_only else 0)
        deadline = time.monotonic() + _REST_S
        while True:
            try:
                abi.mount("", self.root, "", flags, "")
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    what = "read-only" if read_only else "writable again"
                    raise DeviceError(
                        f"{self.root}: cannot be made {what}: {os.strerror(error.errno or 0)}"
                    ) from error
            else:
                return
            time.sleep(_LOOK_S)
