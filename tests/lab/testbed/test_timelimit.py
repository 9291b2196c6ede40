from __future__ import annotations

import signal
import subprocess
import threading
import time
from contextlib import suppress

import pytest

from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.timelimit import CellTimeoutError, time_limit


def test_what_hangs_is_ended_where_it_hangs() -> None:
    with pytest.raises(CellTimeoutError, match=r"a sleep: not done after 0\.1 s"), time_limit(0.1, "a sleep"):
        subprocess.run(["sleep", "60"], check=True)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_done_in_time_hears_nothing() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(0.2, "nothing"):
        pass
    time.sleep(0.3)
    assert signal.getsignal(signal.SIGALRM) == before


def test_other_threads_are_not_limited() -> None:
    ended = []

    def work() -> None:
        with time_limit(0.01, "a thread"):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]


def test_an_end_that_was_swallowed_comes_at_the_end() -> None:
    with pytest.raises(CellTimeoutError, match="a removal"), time_limit(0.05, "a removal"), suppress(LabError):
        time.sleep(30)
