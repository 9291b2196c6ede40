"""A device server's control socket, in the device's directory: answers requests about a running device.

A connection carries one request and its answer: any number of Progress messages, then Result or Failed
(``obdlab.server.messages``). A client that hangs up early cancels a collection; no other action stops midway.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from obdlab.errors import DeviceError, ObdlabError
from obdlab.observe.counters import ages_s
from obdlab.server import counterfiles, wire
from obdlab.server.controlclient import CONTROL_NAME, PEER_TIMEOUT_S, ask
from obdlab.server.controltrace import Tracing
from obdlab.server.controlwritable import Changes
from obdlab.server.counterfiles import server_table
from obdlab.server.graduation import Graduation
from obdlab.server.messages import (
    OF_CONTROL_CLIENT,
    ControlRequest,
    Counters,
    Done,
    Failed,
    GetCounters,
    GetStatistics,
    Message,
    Mounted,
    Progress,
    Result,
    ServerStatistics,
    Step,
)
from obdlab.system.pauses import wait_until
from obdlab.system.processes import Process

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.blob import Blob
    from obdlab.devices.device import Device

    Tell = Callable[[Step], None]

T = TypeVar("T")

log = logging.getLogger(__name__)

__all__ = ["CONTROL_NAME", "Control", "leave_counters", "serve", "server_name"]

#: Requests under way at a time; honest use needs no more.
_MAX_REQUESTS = 16
_FINISH_PAUSE_S = 0.005
_TROUBLE_PAUSE_S = 0.2
_HELPER_SILENCE_S = 1.0


def serve(device: Device, blob: Blob, directory: Path, *, helper: int = 0) -> Control:
    """Listen in the device's directory, and answer until the process ends. A ``helper`` answers for itself only."""
    listener = wire.listen(directory / (f"helper-{helper}.sock" if helper else CONTROL_NAME))
    control = Control(device, blob, directory, with_helpers=not helper)
    control.start(listener)
    return control


def leave_counters(device: Device, blob: Blob, directory: Path) -> None:
    """Save this process's counters beyond its end. Call before the blob is closed; never raises."""
    counterfiles.leave(
        directory.parents[1], directory.name, server_name(), server_table(device.statistics(), blob.statistics())
    )


def server_name() -> str:
    """Return a name that no other process has had since the machine started."""
    me = Process.of(os.getpid())
    return f"{os.getpid()}:{me.start_time if me else 0}"


class Control:
    """Answers requests for one device. One thread accepts; each request gets a short-lived thread of its own."""

    def __init__(self, device: Device, blob: Blob, directory: Path, *, with_helpers: bool = True) -> None:
        self._device = device
        self._with_helpers = with_helpers
        self._blob = blob
        self._directory = directory
        self._free = threading.Semaphore(_MAX_REQUESTS)
        self.tracing = Tracing(blob, directory, self._ask_helpers, helper=not with_helpers)
        self._actions: dict[type[ControlRequest], Callable[[Any, Tell], object]] = {
            GetStatistics: self._statistics,
            GetCounters: self._counters,
            Mounted: self._mounted,
            **self.tracing.actions,
            **Changes(device, blob, directory).actions,
        }
        self._answering: set[socket.socket] = set()
        if with_helpers:
            graduation = Graduation(device, blob, directory, lambda: self.tracing.active)
            self._actions |= graduation.actions
            graduation.start_by_itself()

    def finish(self, timeout_s: float) -> None:
        """Let the answers under way come through before the process ends."""
        wait_until(lambda: not self._answering, timeout_s, look_s=_FINISH_PAUSE_S)

    def start(self, listener: socket.socket) -> None:
        """Answer the clients of ``listener``, in the background."""
        threading.Thread(target=self._accept, args=(listener,), name="control", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:  # no descriptors or no memory left, for now
                log.warning("%s: control: accept: %s", self._directory.name, error.strerror)
                time.sleep(_TROUBLE_PAUSE_S)
                continue
            self._free.acquire()
            try:
                threading.Thread(
                    target=self._converse, args=(connection,), name="control-request", daemon=True
                ).start()
            except RuntimeError:  # no more threads
                connection.close()
                self._free.release()

    def _converse(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._answering.add(connection)
                try:
                    request = wire.receive(connection, PEER_TIMEOUT_S, OF_CONTROL_CLIENT)
                except wire.ConnectionLostError:
                    raise
                except DeviceError as error:
                    log.info("%s: control: %s", self._directory.name, error)
                    answer: Message = Failed.of(error)
                else:
                    connection.settimeout(PEER_TIMEOUT_S)
                    answer = self._answer(request, connection)
                wire.send(connection, answer)
        except (OSError, DeviceError) as error:  # the client went away
            log.info("%s: control: %s", self._directory.name, error)
        finally:
            self._answering.discard(connection)
            self._free.release()

    def _answer(self, request: Message, connection: socket.socket) -> Message:
        action = self._actions.get(type(request)) if isinstance(request, ControlRequest) else None
        if action is None:
            return Failed(f"request that this process does not answer (got {type(request).__name__})")
        try:
            return Result(action(request, lambda step: wire.send(connection, Progress(step))))
        except ObdlabError as error:
            return Failed.of(error)
        except OSError:  # the client is gone
            raise
        except Exception as error:
            log.exception("%s: %s failed", self._directory.name, type(request).__name__)
            return Failed.of(error)

    # Notes that the client has mounted a device that is a file.
    def _mounted(self, _: Mounted, __: Tell) -> Done:
        self._device.is_mounted_now()
        return Done()

    # Counters of this process alone; a helper answers at its own socket.
    def _counters(self, _: GetCounters, __: Tell) -> Counters:
        statistics = self._device.statistics()
        return Counters(
            server=server_name(),
            table=server_table(statistics, self._blob.statistics()),
            under_way_s=statistics.under_way_s,
            threads=statistics.threads,
            ages_s=ages_s(),
        )

    def _statistics(self, _: GetStatistics, __: Tell) -> ServerStatistics:
        total = asdict(self._device.statistics()) | {"source": self._blob.statistics()}
        for theirs in self._ask_helpers(lambda _: GetStatistics(), ServerStatistics):
            total = _added(total, asdict(theirs))
        return ServerStatistics(**total)

    def _ask_helpers(
        self, request: Callable[[int], ControlRequest], kind: type[T], silence_s: float = _HELPER_SILENCE_S
    ) -> list[T]:
        answers = []
        for number, path in enumerate(self._directory.glob("helper-*.sock") if self._with_helpers else ()):
            try:
                answers.append(
                    ask(self._directory, request(number), kind, socket_name=path.name, silence_s=silence_s)
                )
            except ObdlabError as error:
                # Nothing listens there: the helper has ended. A busy helper keeps its socket, for the next request.
                if isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError):
                    path.unlink(missing_ok=True)
                else:
                    log.warning("%s: %s: %s", self._directory.name, path.name, error)
        return answers


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    total = one | {key: value for key, value in other.items() if key not in one}
    for key in one.keys() & other.keys():
        mine, others = one[key], other[key]
        if mine is None or others is None:
            total[key] = mine if others is None else others
        elif isinstance(mine, dict):
            total[key] = _added(mine, others)
        elif isinstance(mine, str):
            total[key] = mine or others
        elif isinstance(mine, tuple | list):
            total[key] = tuple(sorted([*mine, *others], reverse=True))
        else:
            total[key] = max(mine, others) if key == "slowest_ms" else mine + others
    return total
