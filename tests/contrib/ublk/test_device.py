"""ublk devices of a real kernel: the contract of every device, and taking over from a server that died."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.contrib.ublk.ublk_device import UblkDevice, devices_of, take_down
from obdlab.devices.device import Device
from obdlab.errors import DeviceError
from tests.devices.contract import MIB, DeviceContract
from tests.devices.verifying import verified


@pytest.mark.vm
class TestUblkDevice(DeviceContract):
    grows = False

    def make(self, blob: Blob, directory: Path, **options: Any) -> Device:
        return UblkDevice(blob, directory, **options)

    def leftovers(self, directory: Path) -> list[str]:
        return [str(path) for path in devices_of(directory)]

    def test_a_directory_without_a_device(self, tmp_path: Path) -> None:
        take_down(tmp_path)
        with pytest.raises(DeviceError, match="no ublk device is there"):
            UblkDevice(MemoryBlob(bytes(MIB)), tmp_path, recover=True)

    @pytest.mark.slow
    @pytest.mark.timeout(1500)
    def test_killed_servers_cost_no_byte(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        with disk.open("wb") as file:
            file.truncate(32 * MIB)

        def serve(*how: str) -> tuple[subprocess.Popen[bytes], str]:
            command = [sys.executable, "-m", "tests.contrib.ublk.serving", str(disk), str(tmp_path), *how]
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert process.stdout is not None
            with process.stdout as stream:
                return process, stream.readline().decode().strip()

        server, node = serve()
        with verified(Path(node)):
            for _ in range(3):
                time.sleep(1.5)
                server.kill()
                server.wait()
                server, again = serve("recover")
                assert again == node
        take_down(tmp_path)  # by another process than the one that serves
        assert server.wait(30) == 0
        assert self.leftovers(tmp_path) == []
