"""Attaching an image that was unpacked on this host before: the kernel serves it alone, from the first read on.

No server, no device host, no FUSE and no registry take part: the client makes a loop device of the unpacked disk
(:mod:`obdlab.cache.unpacked`), which is found by the digests of the image's layers. The device's record is that of a
graduated device that never had processes.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cache.space import CacheSpace
from obdlab.cache.unpacked import FlatFiles
from obdlab.devices import kinds
from obdlab.devices.fuse_loop import attach_file
from obdlab.errors import DeviceError, ObdlabError
from obdlab.image.config import ImageConfig
from obdlab.image.identity import expected_name
from obdlab.server.rundir import DeviceRecord, clear_leftovers, held, is_there

if TYPE_CHECKING:
    from obdlab.server.messages import Attach
    from obdlab.settings.settings import Settings

log = logging.getLogger(__name__)

# A start waits for the check of the disk, the first one in a boot. If it took longer, a server is faster.
_LONGEST_CHECK_S = 10.0


def attach_unpacked(directory: Path, request: Attach, settings: Settings, timeout_s: float) -> DeviceRecord | None:
    """Make the image's unpacked disk the device at ``directory``, or find its present one; return the record.

    None if the image must be served: :func:`unpacked_disk` is None, or the disk is damaged, which removes it. Raises
    DeviceError if another attach or detach of the device goes on for too long.
    """
    name = unpacked_disk(Path(request.config), settings)
    if name is None:
        return None
    with held(directory, timeout_s):
        record = DeviceRecord.load(directory)
        if record is not None and is_there(record, directory):
            return record if _is_the_same(record, request) else None
        try:
            clear_leftovers(directory)
            record = _attach(directory, request, _files(settings), name)
        except ObdlabError as error:
            log.warning("device %s: served, not read from its unpacked disk: %s", directory.name, error)
            return None
    if record is not None:
        ImageConfig.load(request.config).report("success")
        log.info("%s: the kernel reads %s", directory.name, record.graduated)
    return record


def unpacked_disk(config_path: Path, settings: Settings) -> str | None:
    """Return the name of the unpacked disk that this host has of an image.

    None if it has no such disk, or the image must be served all the same: it is writable, its reads are recorded, or
    the settings ask for it.
    """
    if not settings.unpacked_disks or settings.device_kind not in (kinds.AUTOMATIC, kinds.FIRST):
        return None
    try:
        config = ImageConfig.load(config_path)
    except ObdlabError:  # opening the image reports it
        return None
    if config.upper.active or _is_recorded(config):
        return None
    name = expected_name(config)
    return name if name is not None and _files(settings).path(name).exists() else None


def _files(settings: Settings) -> FlatFiles:
    return FlatFiles(CacheSpace(settings.cache_dir, quota=settings.cache_quota, min_free=settings.cache_min_free))


def _is_the_same(record: DeviceRecord, request: Attach) -> bool:
    wanted = (request.config, request.config_sha256)
    return record.is_graduated and (record.config, record.config_sha256) == wanted


def _is_recorded(config: ImageConfig) -> bool:
    if not config.record_trace_path:
        return False
    from obdlab.traces.recording import wants_recording  # with numpy, 14 MiB that few clients need

    return wants_recording(config.record_trace_path)


def _attach(directory: Path, request: Attach, files: FlatFiles, name: str) -> DeviceRecord | None:
    disk = files.take_into_use(name, _LONGEST_CHECK_S)
    if disk is None:
        return None
    try:
        size = os.fstat(disk).st_size
        path = attach_file(disk, directory, readahead_kib=request.readahead_kib)
    finally:
        os.close(disk)
    record = DeviceRecord(
        device_id=request.device_id,
        config=request.config,
        config_sha256=request.config_sha256,
        settings=request.settings,
        readahead_kib=request.readahead_kib,
        graduated=str(files.path(name)),
        path=str(path),
        size=size,
        read_only=True,
        pid=0,
        start_time=0,
    )
    try:
        record.save(directory)
    except OSError as error:
        kinds.take_down(directory)
        raise DeviceError(f"{directory}: cannot write the device's record: {error.strerror}") from error
    return record
