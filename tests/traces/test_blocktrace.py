"""The kernel's own events of a real device."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.contrib.traces_extra.blockevents import device_of, parse, reads_of
from obdlab.errors import DeviceError
from obdlab.system import mount
from obdlab.traces import blocktrace
from obdlab.traces.blocktrace import BlockTrace
from tests.devices.contract import MIB, read_direct

pytestmark = pytest.mark.kernel

#: PROC_PID_INIT_INO of the kernel's linux/proc_ns.h.
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "disk").write_bytes(os.urandom(4 * MIB))
    command = ["losetup", "--find", "--show", str(tmp_path / "disk")]
    node = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    yield Path(node)
    subprocess.run(["losetup", "--detach", node], check=True)


def test_reads_are_told_with_who_and_how_long(device: Path, tmp_path: Path) -> None:
    read_direct(device, 0, 4096)
    mounted = len(mount.mounts())
    with BlockTrace(device) as trace:
        read_direct(device, MIB, 8192)
        subprocess.run(["dd", f"if={device}", "of=/dev/null", "bs=4k", "skip=512", "count=1"], check=True)
        assert trace.save(tmp_path / "events") == 0
        read_direct(device, 0, 4096)
    events = parse((tmp_path / "events").read_text().splitlines())
    number = os.stat(device).st_rdev
    assert device_of(events) == (os.major(number), os.minor(number))
    reads = reads_of(events, device_of(events))
    own_name = Path("/proc/self/comm").read_text().removesuffix("\n")
    assert (reads[0].offset, reads[0].length, reads[0].process) == (MIB, 8192, own_name)
    assert (reads[1].offset, reads[1].process) == (2 * MIB, "dd")
    assert reads[0].pid != reads[1].pid
    if os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE:  # the kernel's events have its numbers
        assert reads[0].pid == os.getpid()
    assert all(read.offset for read in reads)
    assert all(read.took_s is not None and 0 < read.took_s < 60 for read in reads)
    assert len(mount.mounts()) == mounted


def test_what_a_killed_listener_left_is_removed(device: Path, tmp_path: Path) -> None:
    with BlockTrace(device) as trace:
        assert trace._instance is not None
        left = trace._instance.with_name(f"obdlab-{2**22 + 1}-7")
        left.mkdir()
        with BlockTrace(device):
            assert not left.exists()
        assert trace._instance.exists()
    with pytest.raises(DeviceError, match="cannot write"), BlockTrace(device) as trace:
        trace.save(tmp_path / "none" / "events")


def test_what_is_no_block_device(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="not a block device"):
        BlockTrace(tmp_path)


def test_a_kernel_without_events(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocktrace, "_EVENTS", ("block_no_such",))
    with pytest.raises(DeviceError, match="block_no_such"), BlockTrace(device):
        pass
