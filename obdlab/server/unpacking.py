"""The process that unpacks a device's image, and has the device's server hand over to the resulting file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError, ObdlabError
from obdlab.image.config import ImageConfig, digest_of_config
from obdlab.image.open import Image, open_image
from obdlab.layerfiles.flatten import flat_files, flat_name, flatten
from obdlab.server import controlclient
from obdlab.server.graduation import allowing
from obdlab.server.messages import Graduate, Switched
from obdlab.server.rundir import DeviceRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.server.rundir import RunDir

_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Graduated:
    """The file that the kernel reads now, its size on disk, and how long the change delayed requests."""

    path: Path
    disk_bytes: int
    paused_s: float


def graduate(
    run_dir: RunDir, device_id: str, progress: Callable[[int, int], object] = lambda _, __: None
) -> Graduated:
    """Unpack a device's image in this process, and have the kernel serve the device from the file while it is used.

    ``progress`` gets the disk's bytes done and to do. A graduated device is left as it is. Raises DeviceError with
    the reason, SourceError and FormatError of its layers, FlatFileError if space is missing; the device goes on as
    before then.
    """
    directory = run_dir.device(device_id)
    record = DeviceRecord.load(directory)
    if record is None or not record.alive:
        raise DeviceError(f"device {device_id}: not attached, or not served")
    if record.is_graduated:
        return _graduated(Path(record.graduated), 0.0)
    if not record.read_only:
        raise DeviceError(f"device {device_id}: writable: what is written must go through its server")
    if digest_of_config(record.config) != record.config_sha256:
        raise DeviceError(f"device {device_id}: {record.config} has changed since it was attached")
    settings = replace(allowing(record), download_enabled=False, completion=False, settings_path=None)
    config = replace(ImageConfig.load(record.config), result_file="", record_trace_path="")
    files = flat_files(settings)

    def go_on(done: int, size: int) -> None:
        if not directory.is_dir():
            raise DeviceError(f"device {device_id}: detached meanwhile")
        progress(done, size)

    with open_image(config, settings, traces=False) as image:
        if not isinstance(image, Image):
            raise DeviceError(f"device {device_id}: writable")
        name = flat_name(image)
        file = flatten(image, files, go_on)
    try:
        path = files.path(name)
        paused_s = _switch(directory, name, path)
        return _graduated(path, paused_s)
    finally:
        os.close(file)


# The server may end before its answer arrives: the kernel knows the outcome.
def _switch(directory: Path, name: str, path: Path) -> float:
    try:
        return controlclient.ask(directory, Graduate(name), Switched, silence_s=_ANSWER_S).paused_s
    except ObdlabError:
        record = DeviceRecord.load(directory)
        if record is None or record.graduated != str(path) or not record.is_graduated:
            raise
        return 0.0


def _graduated(path: Path, paused_s: float) -> Graduated:
    try:
        disk_bytes = 512 * path.stat().st_blocks
    except OSError:  # removed by hand; the kernel has it open
        disk_bytes = 0
    return Graduated(path, disk_bytes, paused_s)
