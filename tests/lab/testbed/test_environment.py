from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import pytest

import obdlab
from obdlab.lab.testbed import environment, residency
from obdlab.lab.testbed.coldness import empty_directory
from obdlab.lab.testbed.ownership import Record, orphans
from obdlab.lab.testbed.process import Daemon, LabError, run, wait_until
from obdlab.system.processes import Process


def test_the_environment_names_host_and_code() -> None:
    facts = environment.capture()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["kernel"] == os.uname().release
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 1 << 20
    assert facts["cpu_model"]
    assert facts["disk_file_system"]
    assert facts["packages"]["numpy"]
    assert facts["obdlab_version"]
    if (Path(obdlab.__file__).parents[1] / ".git").exists():
        assert len(facts["git_commit"]) == 40
        assert facts["git_dirty"] in (True, False)


def test_waiting_for_quiet_ends_and_tells() -> None:
    calm = environment.wait_for_quiet(limit=1e6)
    assert calm["quiet"] is True
    busy = environment.wait_for_quiet(limit=-1.0, timeout_s=0.05, poll_s=0.01)
    assert busy["quiet"] is False
    assert busy["waited_s"] >= 0.05


def test_residency_follows_reads(tmp_path: Path) -> None:
    path = tmp_path / "file"
    size = 3 * mmap.PAGESIZE * 64
    with path.open("wb") as stream:
        stream.write(b"x" * size)
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert residency.resident_bytes(path) == 0
    path.read_bytes()
    assert residency.resident_bytes(path) == size
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/empty").write_text("")
    (tmp_path / "dir/link").symlink_to(path)
    os.mkfifo(tmp_path / "dir/pipe")
    assert residency.resident_below([tmp_path]) == (size, size)
    assert residency.resident_below([tmp_path / "none"]) == (0, 0)


def test_a_program_s_failure_tells_its_last_words() -> None:
    assert run(["echo", "hello"]) == "hello\n"
    with pytest.raises(LabError, match=r"sh -c .*exit status 3\n  \| alas"):
        run(["sh", "-c", "echo alas >&2; exit 3"])
    with pytest.raises(LabError, match="cannot be run"):
        run(["/no/such/program"])


def test_a_program_that_takes_too_long_is_killed_with_its_children() -> None:
    with pytest.raises(LabError, match=r"(?s)not done after 0\.3 s.*child (\d+)") as caught:
        run(["sh", "-c", "sleep 500 & echo child $!; wait"], timeout_s=0.3)
    child = int(str(caught.value).split()[-1])
    wait_until(lambda: Process.of(child) is None, "end of the child", 60)


def test_a_daemon_that_ends_tells_its_log(tmp_path: Path) -> None:
    daemon = Daemon("it", ["sh", "-c", "echo the cause; exit 1"], tmp_path / "log")
    with pytest.raises(LabError, match=r"(?s)it: ended with status 1.*the cause"):
        daemon.wait_for(lambda: False, "never", 30)
    daemon.stop()
    slow = Daemon("it", ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"], tmp_path / "log2")
    slow.wait_for(lambda: "up" in (tmp_path / "log2").read_text(), "its word")
    with pytest.raises(LabError, match=r"(?s)never: not after 0\.1 s.*up"):
        slow.wait_for(lambda: False, "never", 0.1)
    slow.stop(timeout_s=0.3)
    assert not slow.is_running()
    slow.stop()


def test_notes_of_the_living_are_no_orphans(tmp_path: Path) -> None:
    mine = Record(tmp_path, "network", "obdlab-7", more=1)
    assert orphans(tmp_path, "network") == []
    values = json.loads(mine.path.read_text())
    (tmp_path / "network-gone.json").write_text(json.dumps({**values, "name": "gone", "owner_start_ticks": 1}))
    (tmp_path / "network-torn.json").write_text('{"kind": "netw')
    found = {facts["name"] for _, facts in orphans(tmp_path, "network")}
    assert found == {"gone", "torn"}
    mine.remove()
    mine.remove()


def test_emptying_a_directory_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    target = tmp_path / "target"
    (target / "sub").mkdir(parents=True)
    (target / "link").symlink_to(tmp_path / "kept")
    empty_directory(target)
    assert list(target.iterdir()) == []
    assert (tmp_path / "kept/file").exists()
