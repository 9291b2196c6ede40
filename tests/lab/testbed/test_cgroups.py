from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.lab.testbed.cgroups import DISKS, ControlGroups, Disk, whole_disk
from obdlab.lab.testbed.process import LabError, run

pytestmark = pytest.mark.kernel


@pytest.fixture
def groups() -> Iterator[ControlGroups]:
    made = ControlGroups(f"obdlab-test-{secrets.token_hex(4)}")
    made.create()
    yield made
    made.remove()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{made.name}"))


_BURN = """
import time
input()
while time.process_time() < 0.3:
    pass
print(flush=True)
input()
"""


def _running(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processor_time_and_memory_of_what_is_inside(groups: ControlGroups) -> None:
    before_s = groups.cpu_s()
    with _running(_BURN) as child:
        groups.add(child.pid)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        daemons, containers = groups.pss_bytes()
        assert containers == 0
        assert 0 < daemons < 10 << 30
        assert Path(sys.executable).resolve() in {path.resolve() for path in groups.mapped_files()}
        child.communicate("\n")
    # What has ended still counts.
    assert groups.cpu_s() - before_s >= 0.25
    assert groups.pss_bytes() == (0, 0)


def test_a_limited_disk_is_as_slow_as_declared(groups: ControlGroups, tmp_path: Path) -> None:
    try:
        whole_disk(tmp_path)
    except LabError as error:
        pytest.skip(str(error))
    groups.set_disk(Disk(iops=400), tmp_path)  # raises if the kernel does not heed it
    file = tmp_path / "file"
    file.write_bytes(os.urandom(200 * 4096))
    os.sync()
    procs = f"/sys/fs/cgroup/{'blkio/' if groups.version == 1 else ''}{groups.name}/daemons/cgroup.procs"
    read = f'echo $$ > {procs}; exec dd if="{file}" of=/dev/null bs=4096 iflag=direct'
    began_s = time.monotonic()
    run(["sh", "-euc", read])
    assert time.monotonic() - began_s >= 0.6 * 200 / 400
    # A container's group has the limits before anybody is in it; lifting them lifts them.
    groups.prepare_container("one")
    groups.set_disk(DISKS["native"], tmp_path)
    assert "400" not in _limits(groups)


def _limits(groups: ControlGroups) -> str:
    name = "daemons/blkio.throttle.read_iops_device" if groups.version == 1 else "io.max"
    root = "/sys/fs/cgroup/blkio" if groups.version == 1 else "/sys/fs/cgroup"
    return Path(root, groups.name, name).read_text()


def test_a_limit_that_is_not_heeded_is_an_error(
    groups: ControlGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        device = whole_disk(tmp_path)
    except LabError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("obdlab.lab.testbed.cgroups._limits", lambda *_: {})  # as a kernel that forgets them
    with pytest.raises(LabError, match="does not heed the limit of 1 IOPS"):
        groups.set_disk(Disk(iops=1), tmp_path)
    assert device.count(":") == 1


def test_a_file_system_without_a_disk_is_told() -> None:
    with pytest.raises(LabError, match="on no disk"):
        whole_disk(Path("/proc"))
