"""Jobs of the differ: their answers, errors and ends."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.containerd.errors import ContainerdError
from obdlab.differ import jobs
from obdlab.differ.jobs import JobError, Jobs
from obdlab.errors import ObdlabError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()}


def request(address: Path, work: Path) -> dict[str, object]:
    return {
        "job": "unpack", "containerd": str(address), "namespace": "test", "digest": "sha256:" + "0" * 64, "size": 1,
        "filesystem": "", "work": str(work),
    }  # fmt: skip


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """The address of a containerd that never answers."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "silent.sock"))
        server.listen()
        yield tmp_path / "silent.sock"


def test_a_job_ends_when_its_caller_gives_up(silent: Path, tmp_path: Path) -> None:
    asked = 0

    def is_wanted() -> bool:
        nonlocal asked
        asked += 1
        return asked < 3

    begin, before = time.monotonic(), children()
    with pytest.raises(JobError, match="given up"):
        Jobs().run(request(silent, tmp_path), is_wanted)
    assert time.monotonic() - begin < 20
    assert children() == before


def test_a_job_has_a_time(silent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TIMEOUT_S", 0.5)
    before = children()
    with pytest.raises(JobError, match="longer than"):
        Jobs().run(request(silent, tmp_path), lambda: True)
    assert children() == before


def test_callers_wait_for_a_free_place(silent: Path, tmp_path: Path) -> None:
    pool, ended = Jobs(1), threading.Event()
    errors: list[ObdlabError] = []

    def hold() -> None:
        try:
            pool.run(request(silent, tmp_path), lambda: not ended.is_set())
        except ObdlabError as error:
            errors.append(error)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        deadline = time.monotonic() + 20
        while pool._free.acquire(blocking=False):
            pool._free.release()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        asked = iter([True, True, False])
        with pytest.raises(JobError, match="given up"):
            pool.run(request(silent, tmp_path), lambda: next(asked))
        assert holder.is_alive()
    finally:
        ended.set()
        holder.join()
    assert isinstance(errors[0], JobError)


def test_the_error_of_a_job_keeps_its_text(tmp_path: Path) -> None:
    with pytest.raises(ObdlabError, match=r"nowhere\.sock"):
        Jobs().run(request(tmp_path / "nowhere.sock", tmp_path), lambda: True)
    work = {"job": "pack", "file": str(tmp_path / "missing"), "index": "", "inits": [], "work": str(tmp_path)}
    with pytest.raises(SourceError, match="missing"):
        Jobs().run(work, lambda: True)
    assert not issubclass(SourceError, ContainerdError)


def test_a_job_without_an_answer_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # the process finds that its parent is another one, and ends
    with pytest.raises(JobError, match="status 1"):
        Jobs().run({"job": "pack", "work": str(tmp_path)}, lambda: True)
