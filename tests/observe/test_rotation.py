"""Files that several processes write and rotate at once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.observe.rotation import RotatingFile

LINES = 400


def write_lines(path: Path, who: int) -> None:
    file = RotatingFile(path, size=4096, count=100)
    for number in range(LINES):
        file.write(f"{who} {number} {'x' * 40}\n".encode())


def test_processes_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_lines, args=(path, who)) for who in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    lines = [line for entry in tmp_path.iterdir() for line in entry.read_text().splitlines()]
    assert sorted(lines) == sorted(f"{who} {number} {'x' * 40}" for who in range(4) for number in range(LINES))
    assert len(list(tmp_path.iterdir())) > 3
    # While one puts the file aside, for as long as a processor lets it take, the others go on writing to it.
    assert all(entry.stat().st_size <= 16 * 4096 for entry in tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_so_many_files_are_kept(tmp_path: Path, count: int) -> None:
    file = RotatingFile(tmp_path / "log", size=100, count=count)
    for number in range(100):
        file.write(f"line {number:03} of some length\n".encode())
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"log", *(f"log.{number}" for number in range(1, count))}
    assert (tmp_path / "log").read_text().splitlines()[-1] == "line 099 of some length"
    assert all((tmp_path / name).stat().st_size < 100 + 30 for name in names)
    file.close()


def test_followers_come_along(tmp_path: Path) -> None:
    follower = os.open(os.devnull, os.O_WRONLY)
    file = RotatingFile(tmp_path / "log", size=20, count=2, follow=(follower,))
    file.write(b"a line that is long enough\n")
    file.write(b"second\n")
    os.write(follower, b"printed\n")
    assert (tmp_path / "log").read_text() == "second\nprinted\n"
    file.close()
    os.close(follower)


def test_a_file_deleted_or_moved_by_hand_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RotatingFile(path, size=1000, count=2)
    file.write(b"one\n")
    path.unlink()
    file.write(b"two\n")
    assert path.read_text() == "two\n"
    path.rename(tmp_path / "elsewhere")
    file.write(b"x" * 1000)
    file.write(b"three\n")
    assert path.read_text() == "three\n"
    assert (tmp_path / "elsewhere").read_text() == "two\n" + "x" * 1000
    file.close()


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RotatingFile(tmp_path / "log", size=0, count=3)
    with pytest.raises(OSError, match="No such file"):
        RotatingFile(tmp_path / "none" / "log", size=1, count=3).write(b"x\n")


# Once a lock that could not be entered twice: a device host whose servers died together never answered again.
WRITING = """
import signal, sys, time
from obdlab.observe.rotation import RotatingFile
file, written = RotatingFile(sys.argv[1], size=4096, count=2000), [0, 0]
def handle(*_):
    file.write(b"from the handler\\n")
    written[0] += 1
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
deadline = time.monotonic() + 1
while time.monotonic() < deadline:
    file.write(b"from the rest\\n")
    written[1] += 1
signal.setitimer(signal.ITIMER_REAL, 0)
print(*written)
"""


def test_a_signals_handler_may_write_as_well(tmp_path: Path) -> None:
    program = [sys.executable, "-c", WRITING, str(tmp_path / "log")]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    lines = [line for entry in tmp_path.iterdir() for line in entry.read_text().splitlines()]
    wanted = [int(word) for word in ended.stdout.split()]
    assert [lines.count("from the handler"), lines.count("from the rest")] == wanted
    assert wanted[0] > 100
