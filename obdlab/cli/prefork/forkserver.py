"""The side of the snapshotter: a process that has imported what a pull needs, and forks for each command.

Run: ``python -m obdlab.cli.prefork.forkserver RUN_DIR``. It ends with its standard input, a pipe that its parent
holds open. It has no threads, opens nothing and keeps nothing of a command; each fork does one command, and ends with
its caller's connection.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from obdlab.cli.prefork import asking
from obdlab.server import wire

log = logging.getLogger(__name__)

#: The modules that a pull imports, and those that they import late.
MODULES = (
    "concurrent.futures.thread",
    "encodings.idna",
    "grpc",
    "obdlab.cli.image.pull",
    "obdlab.cli.main",
    "obdlab.cli.memorybound",
    "obdlab.containerd.client",
    "obdlab.image.registryaccess",
    "obdlab.pull.rpull",
    "obdlab.registry.platform",
    "obdlab.registry.reference",
    "obdlab.settings.original",
)
_MOST_FORKS = 32
_REQUEST_S = 2.0
# After a caller is gone, its command has this time to clean up.
_GRACE_S = 30.0


def serve(run_dir: Path) -> None:
    """Fork for each caller, of the same user, until standard input ends. Raises OSError if it can't listen."""
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all these pages
    likeness = asking.likeness()
    listener = wire.listen(run_dir / asking.SOCKET)
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    poller.register(0, select.POLLIN)  # PR_SET_PDEATHSIG would miss a parent that ends while this process starts
    forks: dict[int, int] = {}  # process number by its descriptor
    while True:
        for descriptor, _ in poller.poll():
            if descriptor == 0:
                return
            if descriptor != listener.fileno():
                poller.unregister(descriptor)
                os.close(descriptor)
                os.waitpid(forks.pop(descriptor), 0)
                continue
            connection, _ = listener.accept()
            with connection:
                if len(forks) >= _MOST_FORKS or wire.peer_of(connection).uid != os.geteuid():
                    continue  # the caller runs its command by itself
                pid = os.fork()
                if pid == 0:
                    listener.close()
                    _run_and_exit(connection, likeness)
                pidfd = os.pidfd_open(pid)
                forks[pidfd] = pid
                poller.register(pidfd, select.POLLIN)


def _run_and_exit(connection: socket.socket, likeness: dict[str, object]) -> NoReturn:
    status = 1
    try:
        request = _received(connection)
        if request is None or request["likeness"] != json.loads(json.dumps(likeness)):
            connection.send(asking.REFUSED)
        else:
            _become(request)
            connection.settimeout(None)
            connection.send(asking.BEGUN)
            status = _run(request["words"], connection)
            connection.sendall(asking.STATUS.pack(status))
    except BaseException:
        with suppress(Exception):
            log.exception("a pull's fork failed")
    finally:
        os._exit(status & 0xFF)


# Returns the request, its descriptors in place of this process's.
def _received(connection: socket.socket) -> dict[str, Any] | None:
    connection.settimeout(_REQUEST_S)
    connection.send(asking.READY)
    head, descriptors, _, _ = socket.recv_fds(connection, asking.LENGTH.size, 4)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if len(head) != asking.LENGTH.size or len(descriptors) != 4:
        return None
    (length,) = asking.LENGTH.unpack(head)
    if length > asking.MOST_REQUEST:
        return None
    data, deadline = bytearray(), time.monotonic() + _REQUEST_S
    while len(data) < length and time.monotonic() < deadline:
        part = connection.recv(length - len(data))
        if not part:
            return None
        data += part
    request: dict[str, Any] = json.loads(data)
    request["descriptors"] = descriptors
    return request


def _become(request: dict[str, Any]) -> None:
    os.setsid()  # a terminal's signals come through the caller alone
    Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for signals in (signal.SIGINT, signal.SIGTERM):  # a pull cleans up on both
        signal.signal(signals, signal.default_int_handler)
    *standard, directory = request["descriptors"]
    os.fchdir(directory)
    os.close(directory)
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv = [request["program"], *request["words"]]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _text(1, request["encoding"], "strict")
    sys.stderr = _text(2, request["encoding"], "backslashreplace")


def _text(descriptor: int, encoding: str, errors: str) -> io.TextIOWrapper:
    lines = descriptor == 2 or os.isatty(descriptor)
    return open(descriptor, "w", 1 if lines else -1, encoding=encoding, errors=errors, closefd=False)


def _run(words: list[str], caller: socket.socket) -> int:
    from obdlab.cli.main import main

    try:
        threading.Thread(target=_obey, args=(caller,), name="caller", daemon=True).start()
        status = main(words)
    except SystemExit as error:  # argparse
        status = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:  # before the command itself expects one
        print("obdlab image pull: interrupted", file=sys.stderr)
        status = 130
    # The caller ends when it has the status, and its end is an interrupt for _obey().
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    return status


# Signals come as bytes; the end of the connection is the caller's end.
def _obey(connection: socket.socket) -> None:
    while True:
        try:
            number = connection.recv(1)
        except OSError:
            number = b""
        if not number:
            break
        os.kill(os.getpid(), number[0])
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_GRACE_S)
    os._exit(1)


def main() -> int:
    """Serve for the run directory that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the parent
    try:
        serve(Path(sys.argv[1]))
    except OSError as error:
        print(f"obdlab: pulls are not sped up: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
