"""One device's server: a process of its own, forked from the host, that lives as long as its device.

It outlives the host and every client. SIGINT is ignored. SIGTERM stops it cleanly if no file system is mounted from
the device and is ignored otherwise: at shutdown every process gets SIGTERM, and the file systems must still be
unmounted after that. To stop a device, detach it; the server then ends by itself.
"""

from __future__ import annotations

import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.blob import WritableBlob, find
from obdlab.devices import kinds
from obdlab.devices.kind import Place
from obdlab.errors import DeviceError, ObdlabError
from obdlab.image.open import Image, WritableImage
from obdlab.layers.stack import Stack
from obdlab.observe import logs
from obdlab.server import controlsocket
from obdlab.server.graduation import graduates
from obdlab.server.keeperlink import KeeperLink, KeeperSeeker
from obdlab.server.messages import Description, Failed, Ready, Stage
from obdlab.server.protection import SERVER_OOM_SCORE_ADJUST, bound_memory, protect
from obdlab.settings.settings import Settings
from obdlab.system import abi
from obdlab.system.processes import Process

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from obdlab.blob import Blob
    from obdlab.devices.device import Device
    from obdlab.server.serverprocess import Task

log = logging.getLogger(__name__)

#: How long a helper stays without work.
HELPER_IDLE_S = 10.0
#: The answer to the request that ended the device may still be under way.
_ANSWERS_S = 1.0


class _Terminated(BaseException):
    """SIGTERM has come while the device is not in use."""


def serve(
    open_blob: Callable[[], Blob],
    directory: Path,
    channel: socket.socket,
    *,
    readahead_kib: int,
    task: Task,
) -> None:
    """Open the blob, make it a device at ``directory`` or go on with one, and serve until the device is taken away.

    The keeper at the other end of ``channel`` gets Stage messages, then Ready or Failed, and now and then Busy while
    more processes would help (``obdlab.server.messages``).
    """
    device_id, keeper = directory.name, KeeperLink(channel)
    _settle_in(device_id, Settings.from_json(task.settings).server_memory)
    if task.number:  # only a keeper has the kernel hand out a helper's unanswered requests again
        abi.prctl(abi.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        if not keeper.say(Stage("opening the image")) and task.number:
            return
        blob = open_blob()
        keeper.say(Stage("making the device"))
        # From here on a SIGTERM waits until this process can handle it cleanly.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        place = Place(
            directory,
            name=device_id,
            readahead_kib=readahead_kib,
            connection=task.connection,
            path=task.path,
            on_busy=None if task.number or isinstance(blob, WritableBlob) else partial(_say_busy, keeper, blob),
            exchangeable=graduates(blob),
        )
        device = kinds.find(task.kind).open(blob, place)
    except Exception as error:
        if not isinstance(error, ObdlabError):
            log.exception("%s: cannot serve", device_id)
        keeper.say(Failed.of(error))
        return
    if task.number:
        _help(device, blob, directory, keeper, task)
        return
    try:
        answering = controlsocket.serve(device, blob, directory)
        if not keeper.say(Ready(_description(device))) and task.path is None:
            raise DeviceError(f"{device_id}: its keeper died during the attach")
        _complete(blob)
        if device.can_change_servers or task.path is not None:
            KeeperSeeker(keeper, directory, task, partial(_description, device)).start()
        _wait_for_end(device, device_id)
        answering.finish(_ANSWERS_S)
    finally:
        if isinstance(blob, WritableBlob):
            blob.flush()
        controlsocket.leave_counters(device, blob, directory)
        blob.close()


def _complete(blob: Blob) -> None:
    image = find(blob, Image) or find(blob, WritableImage)
    if image is not None:
        image.complete()


# A recording that began with the opening of the image sees the reads of this process alone: no helper then.
def _say_busy(keeper: KeeperLink, blob: Blob) -> None:
    stack = find(blob, Stack)
    if stack is None or not stack.watched:
        keeper.say_busy()


# A helper ends after a while without work; the keeper has the kernel hand out again any requests that it took at that
# moment.
def _help(device: Device, blob: Blob, directory: Path, keeper: KeeperLink, task: Task) -> None:
    tracing = controlsocket.serve(device, blob, directory, helper=task.number).tracing
    keeper.say(Ready(None))
    before = -1
    while not device.wait(HELPER_IDLE_S):
        now = device.statistics()
        if now.reads == before and not now.under_way_s and not tracing.active:
            break
        before = now.reads
    controlsocket.leave_counters(device, blob, directory)


def _settle_in(device_id: str, server_memory: int) -> None:
    os.setsid()
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    abi.set_process_name(f"obdlab:{device_id}")
    abi.keep_freed_memory()
    logs.set_process_name(device_id)
    protect(device_id, SERVER_OOM_SCORE_ADJUST)
    bound_memory(server_memory)


def _description(device: Device) -> Description:
    me = Process.of(os.getpid())
    assert me is not None
    return Description(
        kind=device.kind,
        path=str(device.path),
        size=device.size,
        read_only=device.read_only,
        can_change_servers=device.can_change_servers,
        pid=me.pid,
        start_time=me.start_time,
    )


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
            except DeviceError as error:  # another process has it open after all
                log.warning("%s: not stopped: %s", device_id, error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # written data is flushed now, and the process ends anyway
    log.info("%s: device gone, server ends", device_id)
