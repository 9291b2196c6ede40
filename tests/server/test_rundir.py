"""Waiting for processes; run directories and to whom they belong."""

from __future__ import annotations

import json
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab import records
from obdlab.errors import DeviceError
from obdlab.server import wire
from obdlab.server.messages import Attached
from obdlab.server.rundir import DeviceRecord, RunDir, held, record_locked
from obdlab.system.processes import Process


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_run_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(mode)
    with pytest.raises(DeviceError, match=f"run: .*can be changed by other users .got owner 0, mode {mode:04o}"):
        RunDir(run).create()
    run.chmod(0o755)
    RunDir(run).create()
    assert stat.S_IMODE((run / "devices").stat().st_mode) == 0o700
    (run / "devices").chmod(0o777)
    with pytest.raises(DeviceError, match=r"devices: .*can be changed by other users"):
        RunDir(run).create()


def test_a_run_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        RunDir(tmp_path / "run").create()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


@pytest.mark.root
def test_another_users_run_directory_is_refused(tmp_path: Path) -> None:
    RunDir(tmp_path / "run").create()
    os.chown(tmp_path / "run", 65534, 65534)
    with pytest.raises(DeviceError, match=r"run: .*can be changed by other users .got owner 65534"):
        RunDir(tmp_path / "run").create()
    os.chown(tmp_path / "run", 0, 0)
    (tmp_path / "run" / "devices").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "devices").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeviceError, match=r"devices: .*Not a directory"):
        RunDir(tmp_path / "run").create()


def test_a_record_of_a_later_version_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records._log_once.cache_clear()  # another test of this process may have read such a record
    record = DeviceRecord("x", "/c", "0", path="/dev/loop0", size=1, read_only=True, pid=1, start_time=2)
    record.save(tmp_path)
    path = tmp_path / "disk.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": {}}))
    assert [DeviceRecord.load(tmp_path) for _ in range(3)] == [record] * 3
    (logged,) = [entry.getMessage() for entry in caplog.records]
    assert (
        logged == "DeviceRecord: a later version wrote it; unknown fields are ignored, such as 'of_a_later_version'"
    )


def test_a_record_has_no_fields_that_earlier_versions_cannot_read(tmp_path: Path) -> None:
    record = DeviceRecord("x", "/c", "0", path="/dev/loop0", size=1, read_only=True, pid=1, start_time=2)
    record.save(tmp_path)
    attached = json.loads(wire.encode(Attached(record)))["device"]
    assert json.loads((tmp_path / "disk.json").read_text()) == attached
    assert attached.keys() == {
        *("device_id", "config", "config_sha256", "settings", "readahead_kib", "code", "graduated", "kind"),
        *("path", "size", "read_only", "pid", "start_time", "keeper_pid", "keeper_start_time", "helpers", "restarts"),
    }
    assert record.starting is None
    starting = replace(record, starting_pid=os.getpid(), starting_start_time=3)
    starting.save(tmp_path)
    assert DeviceRecord.load(tmp_path) == starting
    assert starting.starting == Process(os.getpid(), 3)


def test_changes_of_a_record_wait_for_each_other(tmp_path: Path) -> None:
    order: list[str] = []

    def change() -> None:
        with record_locked(tmp_path):
            order.append("second")

    with held(tmp_path, 1.0), record_locked(tmp_path):  # an attach holds the directory meanwhile
        thread = threading.Thread(target=change)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_the_record_of_a_device_that_is_gone_is_not_locked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), record_locked(tmp_path / "gone"):
        pass
