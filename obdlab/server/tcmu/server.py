"""One TCMU device's server: a process of its own, forked from the daemon, that serves one image until it is removed.

SIGTERM ends it cleanly: the device stays, without a server, and its users wait for the next one. If the image cannot
be opened again after a crash, the server fails its users' requests with the reason and keeps trying.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from obdlab.blob import Blob, Buffer, WritableBlob
from obdlab.devices.tcmu import configfs, uio
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.server import TcmuServer
from obdlab.devices.tcmu.uio import UioDevice
from obdlab.errors import DeviceError, ObdlabError, SourceError
from obdlab.server import wire
from obdlab.server.messages import Failed, Ready
from obdlab.system import abi

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.call import Call
    from obdlab.devices.tcmu.uio import UioName
    from obdlab.server.messages import Message
    from obdlab.settings.settings import Settings

log = logging.getLogger(__name__)

_RETRY_S = 5.0
_DRAIN_S = 20.0
_WAIT_S = 3600.0
#: Length of the kernel's prefix before a unit's serial number.
_SERIAL_AT = 28


class Reporter:
    """Reports the outcome of the start to the daemon, once."""

    def __init__(self, writer: int) -> None:
        self._writer = writer

    def ready(self) -> None:
        """Report that the device is served."""
        self._tell(Ready(None))

    def failed(self, error: Exception) -> None:
        """Report that it is not: DeviceBusyError if another process serves it."""
        self._tell(Failed.of(error))

    def _tell(self, message: Message) -> None:
        with suppress(BrokenPipeError):  # a killed daemon: the device is served all the same
            os.write(self._writer, wire.encode(message))
        os.close(self._writer)


def serve(
    number: int, name: UioName, config_path: Path, settings: Settings, report: Reporter, *, adopt: bool
) -> None:
    """Open UIO device ``number`` and its image, report, and serve until the device is removed or SIGTERM comes.

    ``adopt``: the device had a server before.
    """
    from obdlab.server.protection import SERVER_OOM_SCORE_ADJUST, bound_memory, protect

    _settle_in(name.device)
    protect(name.device, SERVER_OOM_SCORE_ADJUST)
    bound_memory(settings.server_memory)
    try:
        device = UioDevice.open(number)
    except ObdlabError as error:
        report.failed(error)
        return
    if adopt:
        configfs.control(name.backstore, "block_dev", "1")
        configfs.control(name.backstore, "reset_ring", "1")  # the kernel hands out requests under way again
    try:
        blob = _opened(name, config_path, settings, may_fail=adopt)
        disk = ScsiDisk(blob, serial=_serial(name), description=f"{name.handler}/{name.config}")
        server = TcmuServer(device.memory, device.descriptor, disk, name=name.device)
        server.start()
    except Exception as error:
        expected = isinstance(error, ObdlabError)
        log.error("%s: not served: %s", name.device, error, exc_info=None if expected else error)
        report.failed(error)
        return
    finally:
        if adopt:
            configfs.control(name.backstore, "block_dev", "0")
    report.ready()
    _serve_until_end(server, number, name)
    _close(blob)
    device.close()


def _close(blob: Blob) -> None:
    try:
        if isinstance(blob, WritableBlob):
            blob.flush()
    except SourceError as error:  # the image is still lost: this server has written nothing to it
        log.warning("%s", error)
    blob.close()


def _settle_in(device: str) -> None:
    os.setsid()
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    # Received by sigwaitinfo, so that it interrupts no thread.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    abi.set_process_name(f"obdlab:{device}")
    abi.keep_freed_memory()


def _serve_until_end(server: TcmuServer, number: int, name: UioName) -> None:
    gone = threading.Event()

    def wait() -> None:
        server.wait()
        gone.set()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    threading.Thread(target=wait, name="end", daemon=True).start()
    number_of_signal = signal.sigwaitinfo({signal.SIGTERM, signal.SIGUSR1}).si_signo  # other signals' handlers run
    if number_of_signal == signal.SIGUSR1:  # the device is being removed, and the kernel waits for this process
        server.end()
        server.wait(_DRAIN_S)
        return
    if gone.is_set():
        if uio.devices().get(number) == name and name.is_configured:
            raise DeviceError(f"{name.device}: serving it ended, but it is still there: {server.last_error}")
        return
    # Answer all requests taken; new ones wait in the kernel for the next server.
    configfs.control(name.backstore, "block_dev", "1")
    if not server.drained(_DRAIN_S):
        log.warning("%s: ends with requests under way, which will be asked for again", name.device)
    server.end()
    server.wait(_DRAIN_S)
    configfs.control(name.backstore, "block_dev", "0")


# Multipath would take two disks with one serial for two ways to one disk, so a disk without one gets its name's hash.
def _serial(name: UioName) -> str:
    try:
        serial = (name.backstore / "wwn/vpd_unit_serial").read_text()[_SERIAL_AT:].strip()
    except OSError:
        serial = ""
    return serial or hashlib.sha256(f"{name.hba}/{name.device}/{name.config}".encode()).hexdigest()[:32]


def _opened(name: UioName, config_path: Path, settings: Settings, *, may_fail: bool) -> Blob:
    from obdlab.image.open import open_image
    from obdlab.server.tcmu.devconfig import open_config

    def open_it() -> Blob:
        return open_image(open_config(config_path), settings)

    try:
        return open_it()
    except ObdlabError as error:
        if not may_fail:
            raise
        log.error("%s: cannot open the image again, its requests fail: %s", name.device, error)
        return LostImage(open_it, str(error), name.device)


class LostImage(WritableBlob):
    """Stands for an image that cannot be opened any more: every request fails until it opens again."""

    def __init__(self, open_it: Callable[[], Blob], reason: str, name: str, retry_s: float = _RETRY_S) -> None:
        self.name = name
        self._open_it = open_it
        self._reason = reason
        self._image: Blob | None = None
        self._closed = threading.Event()
        self._retry_s = retry_s
        threading.Thread(target=self._try_again, name="reopen", daemon=True).start()

    def _try_again(self) -> None:
        while not self._closed.wait(self._retry_s):
            try:
                self._image = self._open_it()
            except ObdlabError as error:
                self._reason = str(error)
            except Exception as error:
                log.exception("%s: opening the image again", self.name)
                self._reason = f"{type(error).__name__}: {error}"
            else:
                log.warning("%s: the image could be opened again", self.name)
                return

    def _found(self) -> Blob:
        if self._image is None:
            raise SourceError(f"the image cannot be opened: {self._reason}", blob=self.name, temporary=True)
        return self._image

    def _writable(self) -> WritableBlob:
        image = self._found()
        if not isinstance(image, WritableBlob):
            raise SourceError("the image is read-only", blob=self.name)
        return image

    @property
    def size(self) -> int:
        return self._found().size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        return self._found().read_at(offset, length, call)

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        self._writable().write_at(offset, data, call)

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        self._writable().discard(offset, length, call)

    def flush(self) -> None:
        image = self._found()
        if isinstance(image, WritableBlob):
            image.flush()

    def close(self) -> None:
        self._closed.set()
        if self._image is not None:
            self._image.close()
