"""pytest: no test holds up a run, and no run leaves anything, however it ends.

A test whose time is over (``timeout``) is interrupted and fails with the stacks of all threads. One that does not end
then is killed with its process, which pytest-xdist reports and replaces: the run goes on. Temporary files, and all
processes by a variable in their environment, belong to a directory of the run's. Processes, mounts and devices left
there at the end are reported and fail the run. A process beside pytest (watcher.py) does the same for a killed run.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

from tests.guard import fuse, leftovers, processes, watcher
from tests.guard.alarm import SIGNAL, Alarm, TimedOut
from tests.guard.processes import VARIABLE, Territory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

PREFIX = "obdt-"
#: After its time a test may take so long to be torn down.
GRACE_S = 90.0
# Processes that are about to end by themselves at the end of a run.
_END_S = 15.0
_LOCK = "lock"
_STACKS = pytest.StashKey[str]()
_FAILED = pytest.StashKey[bool]()
_GUARD = pytest.StashKey["Guard"]()


class Guard:
    """Of one pytest process: the main one of a run, or a worker of pytest-xdist."""

    def __init__(self, config: pytest.Config) -> None:
        self.worker = str(getattr(config, "workerinput", {}).get("workerid", ""))
        self._lock = -1
        if self.worker:
            self.base = Path(os.environ[VARIABLE])
        else:
            self.base, self._lock = _make_base()
        temporary = self.base / f"d{self.worker}"
        temporary.mkdir()
        temporary.chmod(0o1777)  # as /tmp: servers of shared databases are other users
        if self.worker:
            own = (temporary, Path(config.option.basetemp))
            self.territory = Territory(f"{self.base}/{self.worker}", own)
        else:
            self.territory = Territory(str(self.base), (self.base,))
            config.option.basetemp = config.option.basetemp or str(self.base / "t")
        os.environ[VARIABLE] = self.territory.marker
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        self.left: list[str] = []
        self._is_kept = False
        self._watcher: IO[bytes] = watcher.start(self.territory)
        self._stderr = os.dup(2)  # a test's is captured
        self._phase = ""
        self._limit_s = 0.0
        signal.signal(SIGNAL, self._interrupt)

    def begin(self, item: pytest.Item, limit_s: float) -> Alarm:
        """Have a test limited; return its alarm, which counts."""
        self._limit_s = limit_s
        watcher.tell(self._watcher, test=item.nodeid, limit_s=limit_s + GRACE_S)
        alarm = Alarm(limit_s, lambda stacks: self._report(item, stacks))
        alarm.start()
        return alarm

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = fuse.connections_of({os.getpid()})
        try:
            return (yield)
        finally:
            if item.stash.get(_FAILED, False):
                fuse.abort(fuse.connections_of({os.getpid()}) - before)
            watcher.tell(self._watcher)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        yield from self._during("setup")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        yield from self._during("call")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        yield from self._during("teardown")

    def _during(self, phase: str) -> Iterator[None]:
        self._phase = phase
        try:
            return (yield)
        finally:
            self._phase = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report: Any = yield
        if report.failed:
            item.stash[_FAILED] = True
            if _STACKS in item.stash:
                title = f"stacks of all threads when {self._limit_s:g} s were over"
                report.sections.append((title, item.stash[_STACKS]))
        return report  # type: ignore[no-any-return]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # A process that serves its own reads could not be killed any more.
        fuse.abort(fuse.connections_of({os.getpid()}))
        if self.worker:
            return
        end = time.monotonic() + _END_S
        spared = processes.resource_trackers()
        while processes.members(self.territory, spared) and time.monotonic() < end:
            time.sleep(0.1)
        self.left = leftovers.take_down(self.territory, spared)
        if self.left and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.left:
            terminalreporter.section("left by the tests, and taken down", red=True)
            for line in self.left:
                terminalreporter.line(line)
        if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
            self._is_kept = True
            terminalreporter.line(f"temporary files, kept until the next run: {self.base}")

    def pytest_unconfigure(self) -> None:
        if not self.worker and not self._is_kept:
            leftovers.remove([self.base])
        watcher.tell(self._watcher, end=True)
        self._watcher.close()

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: Any) -> None:
        path = self._stacks_of(crashitem)
        if path.exists():
            report.longrepr = f"{report.longrepr}\n{path.read_text()}"

    def _report(self, item: pytest.Item, stacks: str) -> None:
        item.stash[_STACKS] = stacks
        text = (
            f"{item.nodeid}: not done after {self._limit_s:g} s ({self._phase or 'between two phases'})\n{stacks}\n"
        )
        self._stacks_of(item.nodeid).write_text(text)
        os.write(self._stderr, f"\nguard: {text}".encode())

    def _stacks_of(self, nodeid: str) -> Path:
        return self.base / f"stacks-{hashlib.sha256(nodeid.encode()).hexdigest()[:16]}"

    # Between two phases an exception would end pytest; if it hangs there, the watcher ends it.
    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._phase:
            raise TimedOut(f"not done after {self._limit_s:g} s")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.collectonly or sys.platform != "linux":
        return
    guard = config.stash[_GUARD] = Guard(config)
    config.pluginmanager.register(guard, "obdlab-guard")


# In place of pytest-timeout's own ways: one raises anywhere, the other ends the process.
@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    if _GUARD not in item.config.stash:
        return None
    item.cancel_timeout = item.config.stash[_GUARD].begin(item, settings.timeout).cancel  # type: ignore[attr-defined]
    return True


def _make_base() -> tuple[Path, int]:
    # Short: the paths of sockets have 107 bytes. Runs within tests are below the outer one.
    parent = Path(tempfile.gettempdir())
    for found in parent.glob(f"{PREFIX}*"):
        _remove_if_over(found)
    base = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    base.chmod(0o711)
    lock = os.open(base / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return base, lock


# Kept for a look by a run whose tests failed, or left where the watcher died too (a power cut, a container's end).
def _remove_if_over(base: Path) -> None:
    try:
        lock = os.open(base / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # just being made, or another's
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        leftovers.remove([base])
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
