"""The side of the command: it asks for a fork, hands on signals, and waits.

It imports next to nothing, so two names of other modules are written again here (tested).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys

TYPE_CHECKING = False  # typing alone would take a tenth of the time
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import FrameType

#: Name of the socket in the run directory, as obdlab.server.rundir has it.
SOCKET = "pull.sock"
#: Most bytes of a request; a larger environment runs the command by itself.
MOST_REQUEST = 1 << 20
#: The fork's first byte, before it is given anything; then its answer: it has begun, or can't stand for the caller.
READY, BEGUN, REFUSED = b"?", b"+", b"-"
#: After BEGUN, at the end: the exit status.
STATUS = struct.Struct("<i")
LENGTH = struct.Struct("<I")
_PULLS = (["image", "pull"], ["rpull"])
_DEFAULT_RUN_DIR = "/run/obdlab"  # as obdlab.cli.common has it
_PATIENCE_S = 2.0
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What a fork could not take over: the caller's user and namespaces, and variables that libraries read once.
_NAMESPACES = ("cgroup", "mnt", "net", "pid", "user", "uts")
_READ_ONCE = ("GLIBC_", "GRPC_", "LD_", "MALLOC_", "OBDLAB_NATIVE", "PYTHON")


def is_pull(words: Sequence[str]) -> bool:
    """Return True if the command line pulls an image."""
    return any(list(words[: len(pull)]) == pull for pull in _PULLS) and "-h" not in words and "--help" not in words


def likeness() -> dict[str, object]:
    """Return what must be the same in the caller and in the process that forks for it."""
    return {
        "code": __file__,
        "changed": os.stat(__file__).st_mtime_ns,
        "python": sys.executable,
        "ids": [os.getresuid(), os.getresgid(), os.getgroups()],
        "namespaces": [os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES],
        "root": os.stat("/").st_ino,
        "environment": sorted(item for item in os.environ.items() if item[0].startswith(_READ_ONCE)),
    }


def ask(words: Sequence[str]) -> int | None:
    """Have the command run by a fork; return its exit status, or None if the caller must run it by itself.

    SIGINT, SIGTERM and SIGHUP go to the fork, whose command ends as it does on them.
    """
    path = os.path.join(os.environ.get("OBDLAB_RUN_DIR", _DEFAULT_RUN_DIR), SOCKET)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The fork begins before this process has read that: a signal meanwhile waits for the handler that hands it on.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDED_ON)
    try:
        with connection:
            return _wait(connection, mask) if _is_begun(connection, path, words) else None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _is_begun(connection: socket.socket, path: str, words: Sequence[str]) -> bool:
    try:
        connection.settimeout(_PATIENCE_S)
        connection.connect(path)
        if _user_of(connection) != os.geteuid() or connection.recv(1) != READY or not _send(connection, words):
            return False
        return connection.recv(1) == BEGUN
    except (OSError, ValueError):  # ValueError: a path of more than 107 bytes
        return False


def _user_of(connection: socket.socket) -> int:
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def _send(connection: socket.socket, words: Sequence[str]) -> bool:
    umask = os.umask(0o077)
    os.umask(umask)
    request = {
        "likeness": likeness(),
        "words": list(words),
        "program": sys.argv[0],
        "environment": dict(os.environ),
        "encoding": sys.stdout.encoding,
        "umask": umask,
        "oom_score_adj": _oom_score_adj(),
    }
    data = json.dumps(request).encode()
    if len(data) > MOST_REQUEST:
        return False
    directory = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        socket.send_fds(connection, [LENGTH.pack(len(data))], [0, 1, 2, directory])
    finally:
        os.close(directory)
    connection.sendall(data)
    return True


def _oom_score_adj() -> str:
    with open("/proc/self/oom_score_adj") as file:
        return file.read().strip()


# Waits without a limit, as the command may: each of its own waits has one.
def _wait(connection: socket.socket, mask: Iterable[int]) -> int:
    connection.settimeout(None)

    def hand_on(number: int, _: FrameType | None) -> None:
        try:
            connection.send(bytes([number]))
        except OSError:  # it has ended meanwhile
            return

    for number in _HANDED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    received = b""
    while len(received) < STATUS.size:
        try:
            part = connection.recv(STATUS.size - len(received))
        except OSError:
            part = b""
        if not part:
            print("obdlab: the process that pulled was killed; the same command goes on", file=sys.stderr)
            return 1
        received += part
    return int(STATUS.unpack(received)[0])
