"""The way to the device host of a run directory, which is started if none answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, TypeVar

from msgspec import structs

from obdlab.errors import DeviceError
from obdlab.server import wire
from obdlab.server.messages import OF_HOST, Failed, Keep, Kept, Stale
from obdlab.server.rundir import SOCKET_NAME, START_LOCK_NAME, host_process
from obdlab.system.locks import lock_until

if TYPE_CHECKING:
    from obdlab.server.messages import HostRequest, Message
    from obdlab.server.rundir import RunDir
    from obdlab.settings.settings import Settings

T = TypeVar("T")

#: Time for Python to start and the host to listen, on a busy machine.
_HOST_START_TIMEOUT_S = 30.0
#: The host gets less time than its client has, by this share and at most this much: its answer, with the cause of a
#: failure, must still come through.
_ANSWER_SHARE = 0.2
_MOST_FOR_ANSWER_S = 10.0
_CONNECT_S = 5.0
_SHORTEST_S = 0.01
_HOST_END_S = 5.0
_KEEPER_S = 60.0


class HostClient:
    """Sends requests to the host of a run directory. A host that is started logs as ``settings`` say."""

    def __init__(self, run: RunDir, settings: Settings) -> None:
        self._run = run
        self._settings = settings

    def start(self) -> None:
        """Start the host if none runs. Raises DeviceError."""
        self._connect(time.monotonic() + _HOST_START_TIMEOUT_S).close()

    def stop(self, *, timeout_s: float = _HOST_END_S) -> bool:
        """Stop the device host, not the devices; kill it after ``timeout_s``. Return True if one ran."""
        process = host_process(self._run.path)
        if process is None:
            return False
        process.signal(signal.SIGTERM)
        process.end(timeout_s)
        return True

    def ask_for_keeper(self, request: Keep) -> socket.socket:
        """Ask for a keeper. Return the connection to it. Raises ObdlabError if no keeper comes within a minute."""
        deadline = time.monotonic() + _KEEPER_S
        connection = self._connect(deadline)
        try:
            expected(Kept, exchange(connection, request, deadline))
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self, deadline: float) -> socket.socket:
        path = self._run.path / SOCKET_NAME
        try:
            return wire.connect(path, left_s(deadline, _CONNECT_S))
        except OSError:
            self._have_started(deadline)
        try:
            return wire.connect(path, left_s(deadline, _CONNECT_S))
        except OSError as error:
            raise DeviceError(f"{path}: the device host does not answer: {error.strerror or error}") from error

    # Clients that need a host at the same moment start one together: eight starts of Python take eight times as long,
    # which on a busy machine is longer than any client waits.
    def _have_started(self, deadline: float) -> None:
        try:
            lock = os.open(self._run.path / START_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DeviceError(f"{self._run.path}: cannot start the device host: {error.strerror}") from error
        try:
            lock_until(lock, time.monotonic() + left_s(deadline, _HOST_START_TIMEOUT_S))  # or start one all the same
            try:
                wire.connect(self._run.path / SOCKET_NAME, left_s(deadline, _CONNECT_S)).close()
            except OSError:
                self._launch(left_s(deadline, _HOST_START_TIMEOUT_S))
        finally:
            os.close(lock)

    def ask_fresh(self, request: HostRequest, device_id: str, timeout_s: float) -> Message:
        """Return the answer of a host that runs the installed code. Raises DeviceError if there is no answer."""
        deadline = time.monotonic() + timeout_s
        answer = self.ask(request, deadline, device_id)
        if isinstance(answer, Stale):  # the package was changed since the host started; devices survive its end
            self.stop(timeout_s=left_s(deadline, _HOST_END_S))
            answer = self.ask(request, deadline, device_id)
        if isinstance(answer, Stale):
            return Failed(f"device {device_id}: the installed package keeps changing")
        return answer

    def ask(self, request: HostRequest, deadline: float, device_id: str = "") -> Message:
        """Return the host's answer. Raises DeviceError if it does not come.

        A host that dies before it answers is replaced once: repeating an attach is safe.
        """
        try:
            try:
                return self._ask_once(request, deadline)
            except wire.ConnectionLostError:
                return self._ask_once(request, deadline)
        except DeviceError as error:
            what = f"device {device_id}: " if device_id else ""
            raise DeviceError(f"{what}device host: {error} (see {self._run.host_log})") from error

    def _ask_once(self, request: HostRequest, deadline: float) -> Message:
        with self._connect(deadline) as connection:
            return exchange(connection, request, deadline)

    # The command returns once the host listens, detached from this process; two commands at a time are fine.
    def _launch(self, timeout_s: float) -> None:
        command = [sys.executable, "-m", "obdlab.cli.device_host", "--run-dir", str(self._run.path), "--detach"]
        command += _log_arguments(self._settings)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"the device host did not start within {timeout_s:.3g} s") from error
        except OSError as error:  # no processes, memory or descriptors left, for now
            raise DeviceError(f"the device host cannot be started: {error.strerror}") from error
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace").strip()
            raise DeviceError(f"the device host did not start: {text or f'exit status {done.returncode}'}")


def exchange(connection: socket.socket, request: HostRequest, deadline: float) -> Message:
    """Send the request and receive one message, by a deadline. Raises DeviceError."""
    own_s = left_s(deadline, float("inf"))
    request = structs.replace(request, timeout_s=own_s - min(_MOST_FOR_ANSWER_S, own_s * _ANSWER_SHARE))
    connection.settimeout(own_s)
    try:
        wire.send(connection, request)
    except OSError as error:
        raise wire.ConnectionLostError(f"connection lost: {error.strerror or error}") from error
    return wire.receive(connection, left_s(deadline, own_s), OF_HOST)


def expected(kind: type[T], answer: Message, doing: str = "") -> T:
    """Return the answer. Raises the error that the host reports instead, and DeviceError for another answer."""
    if isinstance(answer, Failed):
        raise answer.restore(doing)
    if not isinstance(answer, kind):
        raise DeviceError(f"{doing}the device host answers {type(answer).__name__} (wanted {kind.__name__})")
    return answer


def left_s(deadline: float, most_s: float) -> float:
    """Return the time until the deadline, at most ``most_s``; never 0: the call itself reports the timeout."""
    return max(_SHORTEST_S, min(most_s, deadline - time.monotonic()))


def _log_arguments(settings: Settings) -> list[str]:
    arguments = ["--log-format", settings.log_format, "--log-level", settings.log_level]
    arguments += ["--log-size", str(settings.log_size), "--log-count", str(settings.log_count)]
    return arguments + (["--log-file", str(settings.log_path)] if settings.log_path else [])
