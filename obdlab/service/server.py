"""One device's server: a process of its own, forked from the host, that lives as long as its device.

It outlives the host and every client. SIGINT is ignored. SIGTERM stops it cleanly if no file system is mounted from
the device and is ignored otherwise: at shutdown everything gets SIGTERM, and the file systems must still be unmounted
after that. The way to stop a device is to detach it, whereupon the server ends by itself.
"""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.blob import WritableBlob
from obdlab.devices import abi
from obdlab.devices.fuse_loop import FuseLoopDevice
from obdlab.errors import DeviceError, ObdlabError
from obdlab.service import control
from obdlab.service.rundir import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob
    from obdlab.devices.device import Device

log = logging.getLogger(__name__)

#: The kernel shall take containers before the disk under them.
_OOM_SCORE_ADJUST = "-999"


class _Terminated(BaseException):
    """SIGTERM has come and nobody uses the device."""


def serve(
    open_blob: Callable[[], Blob],
    directory: Path,
    report: Callable[[dict[str, Any]], None],
    *,
    readahead_kib: int,
) -> None:
    """Open the blob, make it a device at ``directory``, report, and serve until the device is taken away.

    Reports are ``{"stage": text}``, then ``{"ready": {...}}`` or ``{"error": text}``.
    """
    device_id = directory.name
    _settle_in(device_id)
    try:
        report({"stage": "opening the image"})
        blob = open_blob()
        report({"stage": "making the device"})
        # From here on a SIGTERM waits until it can be answered in good order.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        device = FuseLoopDevice(blob, directory, name=device_id, readahead_kib=readahead_kib)
    except ObdlabError as error:
        report({"error": str(error)})
        return
    except Exception as error:
        log.exception("%s: attach failed", device_id)
        report({"error": f"{type(error).__name__}: {error}"})
        return
    try:
        control.serve(device, blob, directory)
        report({"ready": _description(device)})
        _wait_for_end(device, device_id)
    finally:
        if isinstance(blob, WritableBlob):
            blob.flush()
        blob.close()


def _settle_in(device_id: str) -> None:
    os.setsid()
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    abi.set_process_name(f"obdlab:{device_id}")
    # Both need CAP_SYS_RESOURCE, which some containers withhold; a device works without.
    try:
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJUST)
    except OSError as error:
        log.debug("%s: oom_score_adj: %s", device_id, error)
    try:  # memory that this process asks for must never wait for writeback to its own device
        abi.prctl(abi.PR_SET_IO_FLUSHER, 1)
    except OSError as error:
        log.debug("%s: no I/O flusher: %s", device_id, error)


def _description(device: Device) -> dict[str, Any]:
    me = Process.of(os.getpid())
    assert me is not None
    return {
        "kind": device.kind,
        "path": str(device.path),
        "size": device.size,
        "read_only": device.read_only,
        "pid": me.pid,
        "start_time": me.start_time,
    }


def _wait_for_end(device: Device, device_id: str) -> None:
    def terminate(_: int, __: object) -> None:
        if device.in_use:
            log.warning("%s: SIGTERM ignored, %s is in use (detach it instead)", device_id, device.path)
        else:
            raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    while True:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            device.wait()
            break
        except _Terminated:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                device.stop()
            except DeviceError as error:  # somebody has it open after all
                log.warning("%s: not stopped: %s", device_id, error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what was written is flushed now, and the process ends anyway
    log.info("%s: device gone, server ends", device_id)
