from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from obdlab.lab.images.recipe import Probe
from obdlab.lab.testbed.probe import ContainerEndedError, wait_for_line
from obdlab.lab.testbed.process import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def test_a_line_that_comes_in_pieces_is_seen_when_it_is_whole(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"starting\nserver is REA")
    times: list[float] = []
    thread = threading.Thread(target=lambda: times.append(wait_for_line(reader, Probe("READY", 30.0), "it")))
    thread.start()
    os.write(writer, b"DY")
    before = time.time()
    os.write(writer, b" now\n")
    thread.join(30)
    assert before <= times[0] <= time.time()


def test_an_end_before_the_line_tells_the_last_output(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"first\nREADY is not a finished line here: no such file")
    os.close(writer)
    with pytest.raises(ContainerEndedError, match="no such file"):
        wait_for_line(reader, Probe("READY", 30.0), "it")


def test_silence_ends_at_the_deadline(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"still \xff warming up\n")
    with pytest.raises(LabError, match=r"not ready after 0\.2 s\n.*still . warming up"):
        wait_for_line(pipe[0], Probe("READY", 0.2), "it")


def test_much_output_before_the_line_does_not_hide_it(pipe: tuple[int, int]) -> None:
    reader, writer = pipe

    def chatter() -> None:
        for _ in range(50):
            os.write(writer, b"x" * 9999 + b"\n")
        os.write(writer, b"READY\n")

    thread = threading.Thread(target=chatter)
    thread.start()
    assert wait_for_line(reader, Probe("READY", 30.0), "it") > 0
    thread.join(30)
