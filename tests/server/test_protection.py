"""Processes that the kernel spares have a bound on their memory, and what they start is not spared."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings, SettingsError
from tests.devices.contract import MIB, read_direct, write_direct
from tests.server.bed import start_host
from tests.server.hosting import content_of

LEAST = 256 * MIB


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    run_dir = tmp_path.resolve() / "run"
    host = start_host(run_dir)
    made = DeviceService(run_dir, replace(Settings(), server_memory=LEAST))
    try:
        yield made
    finally:
        clean_up(made, force=True)
        host.kill()
        host.wait(60)
        assert host.stdout is not None
        host.stdout.close()


def limit_of(pid: int) -> int:
    return resource.prlimit(pid, resource.RLIMIT_DATA)[0]


def data_of(pid: int, name: str = "VmData:") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


@pytest.mark.kernel
def test_a_request_that_needs_too_much_memory_fails_alone(service: DeviceService, tmp_path: Path) -> None:
    config = tmp_path / "hog.json"
    config.write_text('{"hog": true, "size": 2097152, "seed": 4}')
    device = service.attach(config, "x")
    assert data_of(device.pid) < limit_of(device.pid) <= data_of(device.pid) + LEAST
    assert limit_of(device.keeper_pid) <= data_of(device.keeper_pid) + 64 * MIB
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            read_direct(device.path, MIB, 4096)
        assert caught.value.errno == errno.EIO
        assert read_direct(device.path, 0, MIB) == content_of({"size": 2 * MIB, "seed": 4})[:MIB]
    assert "MemoryError" in service.last_error("x")
    (after,) = service.list()
    assert (after.pid, after.restarts) == (device.pid, 0)
    assert data_of(device.pid, "VmHWM:") < LEAST


@pytest.mark.kernel
def test_many_large_requests_at_a_time_stay_within_the_bound(service: DeviceService, tmp_path: Path) -> None:
    config = tmp_path / "rw.json"
    config.write_text('{"writable": true, "size": 33554432}')
    device = service.attach(config, "x")
    data = os.urandom(MIB)
    wrong: list[object] = []

    def write_and_read(number: int) -> None:
        try:
            for _ in range(4):
                write_direct(device.path, number * MIB, data)
                if read_direct(device.path, number * MIB, MIB) != data:
                    wrong.append(number)
        except OSError as error:
            wrong.append(error)

    threads = [threading.Thread(target=write_and_read, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert service.list()[0].restarts == 0


def run(code: str) -> str:
    """Return the output of another Python, with limits of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_TRY = """
from obdlab.server.protection import bound_memory, unprotect
def fits(size):
    try:
        bytearray(size)
    except MemoryError:
        return False
    return True
"""


def test_a_bound_is_for_what_comes_after_it_and_can_be_taken_back() -> None:
    assert run(_TRY + "bound_memory(64 << 20); print(fits(16 << 20), fits(128 << 20))") == "True False"
    assert run(_TRY + "bound_memory(64 << 20); bound_memory(512 << 20); print(fits(128 << 20))") == "True"
    assert run(_TRY + "bound_memory(64 << 20); bound_memory(0); print(fits(128 << 20))") == "True"
    assert run(_TRY + "bound_memory(64 << 20); unprotect(); print(fits(128 << 20))") == "True"


def test_threads_have_small_stacks() -> None:
    code = """
import threading
bound_memory(128 << 20)
go_on = threading.Event()
threads = [threading.Thread(target=go_on.wait) for _ in range(64)]
for thread in threads:
    thread.start()
go_on.set()
print(len(threads))
"""
    assert run(_TRY + code) == "64"


def test_a_bound_that_no_server_could_keep_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"server_memory: 0, or at least 268435456 .got 1."):
        Settings(server_memory=1)
    assert Settings(server_memory=0).server_memory == 0
