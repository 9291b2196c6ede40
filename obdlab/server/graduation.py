"""Graduation: once its whole image is local, a read-only device goes on without its server.

A process of its own unpacks the image to a plain file (``obdlab.server.unpacking``; every byte is checked as it is
read), and has the server put that file in its own place. The kernel then closes the served file, so server and keeper
end as if the device were taken away. The device's record names the file before the change: readers of the record ask
the kernel whether the change happened.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from obdlab.blob import WritableBlob, find
from obdlab.devices import backingfile
from obdlab.errors import DeviceError, ObdlabError
from obdlab.image.open import Image
from obdlab.layerfiles.flatten import flat_files, flat_name
from obdlab.server.messages import ControlRequest, Graduate, Step, Switched
from obdlab.server.rundir import DeviceRecord, record_locked
from obdlab.settings.settings import Settings
from obdlab.system.pauses import backoff_s, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.blob import Blob
    from obdlab.devices.device import Device

    Tell = Callable[[Step], None]

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_LATER_LOOK_S = 10.0
_FIRST_PAUSE_S = 60.0
_LONGEST_PAUSE_S = 3600.0
# The change waits for the requests under way; later requests wait for the change.
_LONG_REQUEST_S = 0.02
_QUIET_DEADLINE_S = 30.0


class Graduation:
    """Control socket actions for graduation."""

    def __init__(self, device: Device, blob: Blob, directory: Path, is_recorded: Callable[[], bool]) -> None:
        self._device = device
        self._blob = blob
        self._directory = directory
        self._is_recorded = is_recorded
        self._changing = threading.Lock()
        self.actions: dict[type[ControlRequest], Callable[[Any, Tell], object]] = {Graduate: self._graduate}

    def _graduate(self, request: Graduate, _: Tell) -> Switched:
        image = _image_of(self._device, self._blob)
        if self._is_recorded():
            raise DeviceError("its reads are being recorded, which the kernel would not do")
        with self._changing:
            record = DeviceRecord.load(self._directory)
            if record is None:
                raise DeviceError("it is being taken down")
            files = flat_files(allowing(record))
            if flat_name(image) != request.name:
                raise DeviceError("its layers are other files than those that were unpacked")
            path = files.path(flat_name(image))
            file = files.open(path.parent.name)
            if file is None:
                raise DeviceError(f"{path}: not there any more")
            try:
                if os.fstat(file).st_size != self._device.size:
                    raise DeviceError(f"{path}: not of the device's size ({self._device.size} bytes)")
                self._wait_for_quiet()
                self._record_file(path)
                began = time.monotonic()
                backingfile.go_on_with(self._directory, file)
                paused_s = time.monotonic() - began
            finally:
                os.close(file)
        log.info("%s: the kernel goes on alone with %s", self._directory.name, path)
        return Switched(paused_s)

    # The keeper writes the record as well, when helpers come and go: the newest is changed.
    def _record_file(self, path: Path) -> None:
        with record_locked(self._directory):
            record = DeviceRecord.load(self._directory)
            if record is None:
                raise DeviceError("it is being taken down")
            replace(record, graduated=str(path)).save(self._directory)

    def _wait_for_quiet(self) -> None:
        def is_quiet() -> bool:
            return max(self._device.statistics().under_way_s, default=0.0) <= _LONG_REQUEST_S

        if not wait_until(is_quiet, _QUIET_DEADLINE_S, look_s=_LONG_REQUEST_S / 4):
            raise DeviceError(f"requests have waited for more than {_LONG_REQUEST_S:g} s all the time")

    def start_by_itself(self) -> None:
        """Graduate in the background once all layers are local, if the image was opened to do so."""
        image = find(self._blob, Image)
        if image is not None and image.graduates and self._device.can_graduate and self._device.read_only:
            threading.Thread(target=self._by_itself, args=(image,), name="graduation", daemon=True).start()

    def _by_itself(self, image: Image) -> None:
        time.sleep(image.graduates_after_s)
        look_s = _LATER_LOOK_S if image.graduates_after_s > _LATER_LOOK_S else _LOOK_S
        command = [sys.executable, "-m", "obdlab", "device", "graduate", "--run-dir", str(self._directory.parents[1])]
        command += ["--low-priority", self._directory.name]
        said = ""
        # This server may be ready before its keeper has written the record, by which the command finds the device.
        wait_until(lambda: DeviceRecord.load(self._directory) is not None, _QUIET_DEADLINE_S, look_s=_LONG_REQUEST_S)
        for failures in itertools.count():
            while image.unverified() and not self._is_unpacked(image):
                time.sleep(look_s)
            why = _failure_of(command)
            if not why:
                return
            if _without_numbers(why) != said:
                said = _without_numbers(why)
                log.warning("%s: stays with its server, and is tried again: %s", self._directory.name, why)
            time.sleep(backoff_s(failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S))
            image.complete()  # again, if the cache has lost a part since

    # By another device of the image, perhaps: then not all of it need come here.
    def _is_unpacked(self, image: Image) -> bool:
        record = DeviceRecord.load(self._directory)
        try:
            return record is not None and flat_files(allowing(record)).path(flat_name(image)).exists()
        except ObdlabError:  # the unpacker says which
            return False


# "" if the command did its work.
def _failure_of(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
        )
    except OSError as error:  # no processes, memory or descriptors left, for now
        return f"cannot start the unpacking: {error.strerror}"
    if done.returncode == 0:
        return ""
    return done.stderr.decode(errors="replace").strip() or f"ended with status {done.returncode}"


# The amounts of missing space change from try to try; the reason does not.
def _without_numbers(text: str) -> str:
    return re.sub(r"[0-9]+", "", text)


def graduates(blob: Blob) -> bool:
    """Return True if a device of the blob shall go on without its server some day."""
    image = find(blob, Image)
    return image is not None and image.graduates


def allowing(record: DeviceRecord) -> Settings:
    """Return the settings of a device. Raises DeviceError if they forbid unpacked disks."""
    settings = Settings.from_json(record.settings)
    if not settings.unpacked_disks:
        raise DeviceError("its settings forbid unpacked disks (unpacked_disks: false)")
    return settings


def _image_of(device: Device, blob: Blob) -> Image:
    if isinstance(blob, WritableBlob) or not device.read_only:
        raise DeviceError(
            "writable: what is written goes through its server (commit it, and attach the result read-only)"
        )
    image = find(blob, Image)
    if image is None:
        raise DeviceError("serves no image of layers")
    if not device.can_graduate:
        raise DeviceError(f"a {device.kind} device has no file behind it that could be exchanged")
    return image
