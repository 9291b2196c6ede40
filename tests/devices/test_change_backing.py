"""The change of the file behind a used loop device, when its server is killed while the kernel waits for reads."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obdlab.devices import loop
from obdlab.devices.fuse_loop import devices_of, take_down
from obdlab.system.processes import children_of
from tests.devices.contract import MIB, read_direct
from tests.guard import fuse

pytestmark = pytest.mark.kernel
WAIT_S = 60.0
SERVER = """
import os, sys
from pathlib import Path
from obdlab.devices import backingfile
from obdlab.devices.fuse_loop import FuseLoopDevice
from tests.devices.blobs import Gated
directory, file = map(Path, sys.argv[1:])
data = file.read_bytes()
blob = Gated(data, at=len(data) // 2)
device = FuseLoopDevice(blob, directory, read_only=True, exchangeable=True)
print(device.path, flush=True)
assert blob.waiting.acquire(timeout=60)
print("waits", flush=True)
sys.stdin.readline()
backingfile.go_on_with(directory, os.open(file, os.O_RDONLY))
"""


@contextmanager
def server(directory: Path, file: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", SERVER, str(directory), str(file)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            fuse.abort(fuse.connections_of({process.pid}))  # or a failed test's server could not be killed
            process.kill()
            process.wait(WAIT_S)
            take_down(directory)


def wait_for_call(pid: int) -> None:
    """Wait until a child of the process waits in the kernel for the change."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for child in children_of(pid):
            if "freeze" in Path(f"/proc/{child}/wchan").read_text():
                return
        time.sleep(0.01)
    raise TimeoutError


def test_a_server_killed_meanwhile_ends_and_the_change_is_made(tmp_path: Path) -> None:
    file, directory = tmp_path / "file", tmp_path / "device"
    directory.mkdir()
    data = random.Random(5).randbytes(2 * MIB)
    file.write_bytes(data)
    with server(directory, file) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        path = Path(process.stdout.readline().strip())
        failed: list[OSError] = []

        def read() -> None:
            try:
                read_direct(path, MIB, 4096)
            except OSError as error:
                failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        assert process.stdout.readline() == "waits\n"
        process.stdin.write("go on\n")
        process.stdin.flush()
        wait_for_call(process.pid)
        process.send_signal(signal.SIGKILL)
        # It ends, so its FUSE connection does, so the read does (with EIO: nothing else holds the connection here, as
        # a keeper would), and so the change is made.
        process.wait(WAIT_S)
        reader.join(WAIT_S)
        assert not reader.is_alive()
        assert len(failed) == 1
        (below,) = devices_of(directory)
        deadline = time.monotonic() + WAIT_S
        while str(file) not in (loop.backing_of(below), loop.backing_of(Path(loop.backing_of(below)))):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert read_direct(path, MIB, 4096) == data[MIB : MIB + 4096]


def test_the_kernels_refusal_is_raised(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Inappropriate ioctl"):
        loop.change_backing(file.fileno(), file.fileno())


def test_the_process_that_asks_holds_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CHANGE", "import os\nprint(len(os.listdir('/proc/self/fd')) - 1)\n")
    extra = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(extra, True)
    try:
        with (
            (tmp_path / "file").open("wb") as one,
            (tmp_path / "other").open("wb") as two,
            pytest.raises(OSError, match="Input/output") as caught,  # the printed number is taken for an error's
        ):
            loop.change_backing(one.fileno(), two.fileno())
        assert caught.value.errno == 5  # the three standard files, and these two
    finally:
        os.close(extra)
