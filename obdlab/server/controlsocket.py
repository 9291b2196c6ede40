"""A device server's control socket, in the device's directory: answers requests about a running device.

A connection carries one request, ``{"op": name, ...}``, and its answer: any number of ``{"progress": {...}}``, then
``{"result": {...}}`` or ``{"error": text}``. A client that hangs up early cancels a collection; no other action stops
midway.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from obdlab.errors import DeviceError, ObdlabError
from obdlab.observe.counters import ages_s
from obdlab.server import counterfiles, wire
from obdlab.server.controlclient import CONTROL_NAME, PEER_TIMEOUT_S, ask
from obdlab.server.controltrace import Tracing
from obdlab.server.controlwritable import Changes
from obdlab.server.counterfiles import server_table
from obdlab.server.graduation import Graduation
from obdlab.system.processes import Process

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.blob import Blob
    from obdlab.devices.device import Device

    Answer = dict[str, Any]
    Tell = Callable[[dict[str, Any]], None]

log = logging.getLogger(__name__)

__all__ = ["CONTROL_NAME", "Control", "leave_counters", "serve", "server_name"]

#: Requests under way at a time; honest use needs no more.
_MAX_REQUESTS = 16
_FINISH_PAUSE_S = 0.005
_TROUBLE_PAUSE_S = 0.2


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
        self._actions: dict[str, Callable[[dict[str, Any], Tell], Answer]] = {
            "statistics": self._statistics,
            "counters": self._counters,
            "mounted": self._mounted,
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
        deadline = time.monotonic() + timeout_s
        while self._answering and time.monotonic() < deadline:
            time.sleep(_FINISH_PAUSE_S)

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
                    request = wire.receive(connection, PEER_TIMEOUT_S)
                except wire.ConnectionLostError:
                    raise
                except DeviceError as error:
                    log.info("%s: control: %s", self._directory.name, error)
                    answer = {"error": str(error)}
                else:
                    connection.settimeout(PEER_TIMEOUT_S)
                    answer = self._answer(request, connection)
                wire.send(connection, answer)
        except (OSError, DeviceError) as error:  # the client went away
            log.info("%s: control: %s", self._directory.name, error)
        finally:
            self._answering.discard(connection)
            self._free.release()

    def _answer(self, request: dict[str, Any], connection: socket.socket) -> Answer:
        op = request.get("op")
        action = self._actions.get(op) if isinstance(op, str) else None
        if action is None:
            return {"error": f"unknown request (got {op!r})"}
        try:
            return {"result": action(request, lambda state: wire.send(connection, {"progress": state}))}
        except ObdlabError as error:
            return {"error": str(error)}
        except OSError:  # the client is gone
            raise
        except Exception as error:
            log.exception("%s: %s failed", self._directory.name, op)
            return {"error": f"{type(error).__name__}: {error}"}

    # Notes that the client has mounted a device that is a file.
    def _mounted(self, _: dict[str, Any], __: Tell) -> Answer:
        self._device.is_mounted_now()
        return {}

    # Counters of this process alone; a helper answers at its own socket.
    def _counters(self, _: dict[str, Any], __: Tell) -> Answer:
        statistics = self._device.statistics()
        return {
            "server": server_name(),
            "table": server_table(statistics, self._blob.statistics()),
            "under_way_s": statistics.under_way_s,
            "threads": statistics.threads,
            "ages_s": ages_s(),
        }

    def _statistics(self, _: dict[str, Any], __: Tell) -> Answer:
        mine = asdict(self._device.statistics()) | {"source": self._blob.statistics()}
        for theirs in self._ask_helpers("statistics", lambda _: {}):
            mine = _added(mine, theirs)
        return mine

    def _ask_helpers(self, op: str, arguments: Callable[[int], dict[str, Any]]) -> list[Answer]:
        answers = []
        for number, path in enumerate(self._directory.glob("helper-*.sock") if self._with_helpers else ()):
            try:
                answers.append(ask(self._directory, op, arguments(number), socket_name=path.name, silence_s=1.0))
            except wire.NoAnswerError:  # it has ended
                path.unlink(missing_ok=True)
            except DeviceError as error:
                log.warning("%s: %s: %s", self._directory.name, path.name, error)
        return answers


def _added(one: Answer, other: Answer) -> Answer:
    total = one | {key: value for key, value in other.items() if key not in one}
    for key in one.keys() & other.keys():
        mine, others = one[key], other[key]
        if isinstance(mine, dict):
            total[key] = _added(mine, others)
        elif isinstance(mine, str):
            total[key] = mine or others
        elif isinstance(mine, tuple | list):
            total[key] = sorted([*mine, *others], reverse=True)
        else:
            total[key] = max(mine, others) if key == "slowest_ms" else mine + others
    return total
