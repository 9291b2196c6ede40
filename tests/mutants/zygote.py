"""A process that runs pytest over a changed copy of the code, forked for each mutant so that imports are paid once.

Commands come as JSON lines on standard input: ``{"tests": [...], "seconds": 60, "log": "/file"}``. The answer to each
is one line with the exit status, or ``"timeout"``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Nothing of obdlab itself: the forks import that, changed.
_PRELOADED = ("pytest", "hypothesis", "numpy", "urllib3", "cramjam", "crc32c", "zstandard", "isal.igzip", "pandas")
_PRELOADED += ("anyio.pytest_plugin", "trio", "xdist.plugin", "pytest_timeout", "grpc", "google.protobuf.empty_pb2")
_PRELOADED += ("_hypothesis_pytestplugin", "_pytest.junitxml")
# Rewriting the assertions of a test file takes longer than most tests.
_QUICK = ("--assert=plain", "-p", "no:xdist")


#: Set to run all examples of the property tests; else a few of each.
ALL_EXAMPLES = "OBDLAB_MUTANT_EXAMPLES"
_EXAMPLES = 25
_KILLED_S = 10.0


def main() -> None:
    """Answer commands until standard input ends."""
    for name in _PRELOADED:
        importlib.import_module(name)
    if not os.environ.get(ALL_EXAMPLES):
        _limit_examples()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _limit_examples() -> None:
    import hypothesis

    make = hypothesis.settings.__init__

    def limited(self: hypothesis.settings, *args: Any, **options: Any) -> None:
        options["max_examples"] = min(options.get("max_examples", _EXAMPLES), _EXAMPLES)
        make(self, *args, **options)

    hypothesis.settings.__init__ = limited  # type: ignore[method-assign]


def _run(command: dict[str, object]) -> int | str:
    pid = os.fork()
    if pid == 0:
        _be_pytest(command)
    deadline = time.monotonic() + float(str(command["seconds"]))
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return "timeout"
    finally:
        _end(pid)


# A killed process can stay: a thread of it that reads its own device waits in the kernel for the threads that served
# the device. Such a process is left behind.
def _end(pid: int) -> None:
    deadline = time.monotonic() + _KILLED_S
    try:
        os.killpg(pid, signal.SIGKILL)
        while not os.waitpid(pid, os.WNOHANG)[0] and time.monotonic() < deadline:
            time.sleep(0.02)
    except (ProcessLookupError, ChildProcessError):
        pass


def _be_pytest(command: dict[str, object]) -> None:
    status = 70
    try:
        os.setsid()
        log = os.open(str(command["log"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, str(Path.cwd()))
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--no-header"]
        options += _QUICK
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is there before pytest
        status = int(pytest.main([*options, *command["tests"]]))  # type: ignore[misc]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
