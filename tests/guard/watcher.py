"""The process beside pytest: kills a test that hangs beyond help, and takes down what a dead run left.

It reads lines of JSON from standard input: first what to watch, then a test and its seconds when one begins, and an
empty object when it ends. It outlives pytest, whatever ends that.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tests.guard import fuse, leftovers, processes
from tests.guard.processes import VARIABLE, Territory

_ROOT = Path(__file__).parents[2]
# After its FUSE connections were aborted, a test that waited for one of them may end by itself.
_FREED_S = 20.0
# After SIGABRT, for which python writes the stacks of all threads.
_DUMP_S = 20.0
_MOST_LINE = 1 << 16


class Watcher:
    """Watches one pytest process."""

    def __init__(self, pid: int, territory: Territory) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._territory = territory
        self._test = ""
        self._deadline: float | None = None
        self._is_freed = False
        self._ended = False
        self._read = b""

    def run(self) -> None:
        """Return when pytest is dead and everything of its run that it left is gone."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        poller.register(0, select.POLLIN)
        while True:
            ready = dict(poller.poll(self._milliseconds()))
            if 0 in ready and not self._take(os.read(0, _MOST_LINE)):
                poller.unregister(0)
            if self._pidfd in ready:
                break
            if self._deadline is not None and time.monotonic() > self._deadline and not self._free():
                self._kill()
        if not self._ended:
            self._take_down()

    def _milliseconds(self) -> float | None:
        return None if self._deadline is None else max(0.0, (self._deadline - time.monotonic()) * 1000)

    # Return False at the end of what there is to read.
    def _take(self, data: bytes) -> bool:
        *lines, self._read = (self._read + data).split(b"\n")
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            self._ended = message.get("end", False)
            self._test = message.get("test", "")
            self._deadline = time.monotonic() + message["limit_s"] if self._test else None
            self._is_freed = False
        return bool(data)

    # A process that waits for its own FUSE server cannot be killed: it is freed first. Return True if that may help.
    def _free(self) -> bool:
        connections = set() if self._is_freed else fuse.connections_of({self._pid})
        if not connections:
            return False
        _say(f"{self._test}: hangs: the FUSE connections of its process {self._pid} are aborted")
        fuse.abort(connections)
        self._is_freed = True
        self._deadline = time.monotonic() + _FREED_S
        return True

    def _kill(self) -> None:
        self._deadline = None
        _say(f"{self._test}: hangs, and did not end when it was interrupted: its process {self._pid} is killed")
        for pid in sorted({self._pid} | processes.members(self._territory)):
            _say(f"  {processes.describe(pid)}")
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGABRT)
            if not select.select([self._pidfd], [], [], _DUMP_S)[0]:
                os.kill(self._pid, signal.SIGKILL)

    def _take_down(self) -> None:
        lines = leftovers.take_down(self._territory)
        lines += leftovers.remove(self._territory.directories)
        where = f" in {self._test}" if self._test else ""
        _say(f"the tests' process {self._pid} died{where}; taken down: {len(lines)} things")
        for line in lines:
            _say(f"  {line}")


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"guard: {text}", file=sys.stderr, flush=True)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    what = json.loads(sys.stdin.buffer.raw.readline())  # no buffer: the rest is read by number
    territory = Territory(what["marker"], tuple(Path(directory) for directory in what["directories"]))
    Watcher(what["pid"], territory).run()


def start(territory: Territory) -> IO[bytes]:
    """Start a watcher of this process; return the stream of its messages."""
    environment = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "TMPDIR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.guard.watcher"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/",
        env={**environment, "PYTHONPATH": str(_ROOT)},
    )  # fmt: skip
    process.returncode = 0  # never waited for: it ends after this process
    assert process.stdin is not None
    tell(process.stdin, pid=os.getpid(), marker=territory.marker, directories=[*map(str, territory.directories)])
    return process.stdin


def tell(stream: IO[bytes], **message: Any) -> None:
    """Send a watcher a message."""
    with suppress(BrokenPipeError):
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()


if __name__ == "__main__":
    main()
