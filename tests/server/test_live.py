"""Changing a writable device while it is in use: collection, growth, snapshots, discards, with I/O going on."""

from __future__ import annotations

import http.client
import json
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

from obdlab.cli.main import main
from obdlab.errors import DeviceError, ObdlabError, OutOfRangeError
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.layers.append import AppendUpper
from obdlab.server.cleanup import clean_up
from obdlab.server.client import AttachedDevice, DeviceService
from obdlab.server.live import LiveDevice, find_by_upper
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests.devices.contract import MIB, read_direct, write_direct
from tests.layers.uppers import KINDS, Files
from tests.server.test_snapshotapi import UnixConnection

pytestmark = pytest.mark.kernel

SIZE = 32 * MIB


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    made = DeviceService(tmp_path.resolve() / "run", Settings(cache_dir=tmp_path / "cache"))
    yield made
    clean_up(made, force=True)


def new_config(folder: Path, kind: str, name: str = "upper", size: int = SIZE, lowers: tuple[Path, ...] = ()) -> Path:
    files = Files.named(folder, kind, name)
    files.create(size).close()
    path = folder / f"{name}.json"
    ImageConfig(
        lowers=tuple(LowerConfig(file=str(lower)) for lower in lowers),
        upper=UpperConfig(data=str(files.data), index=str(files.index)),
    ).save(path)
    return path


class Load:
    """Writes and reads blocks of a device, each block by one thread; knows what every block must hold."""

    def __init__(self, device: AttachedDevice, blocks: int, threads: int = 2) -> None:
        self.last = [0] * blocks
        self.failures: list[object] = []
        self.slowest_s = 0.0
        self._device = device
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(n, threads)) for n in range(threads)]

    def _work(self, first: int, step: int) -> None:
        rng = random.Random(first)
        try:
            while not self._stop.wait(0.0005):
                block = rng.randrange(first, len(self.last), step)
                value = rng.randrange(1, 256)
                began = time.monotonic()
                write_direct(self._device.path, block * 4096, bytes([value]) * 4096)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.last[block] = value
                if read_direct(self._device.path, block * 4096, 4096) != bytes([value]) * 4096:
                    self.failures.append((block, value))
        except BaseException as error:
            self.failures.append(error)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(60)
        assert self.failures == []

    def content(self, before: bytes) -> bytes:
        return b"".join(
            bytes([value]) * 4096 if value else before[at * 4096 : (at + 1) * 4096]
            for at, value in enumerate(self.last)
        )


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_collection_of_a_layer_in_use(
    service: DeviceService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = service.attach(new_config(tmp_path, "append"), "gc")
    data = tmp_path / "upper.data"
    rng = random.Random(1)
    for _ in range(10):
        for at in range(0, SIZE, MIB):
            write_direct(device.path, at, rng.randbytes(MIB))
    before = read_direct(device.path, 0, SIZE)
    assert allocated(data) > 9 * SIZE
    found = find_by_upper(service, data)
    assert found is not None
    assert found.device_id == "gc"
    load = Load(device, SIZE // 4096)
    with load.going_on():
        run_dir = ("--run-dir", str(service.run_dir.path))
        assert main(["layer", "gc", str(data), *run_dir]) == 0
        printed = capsys.readouterr().out
    assert printed.startswith(f"{data}: ")
    assert " freed, " in printed
    LiveDevice(service, "gc").collect()  # what the load has overwritten meanwhile
    assert allocated(data) + allocated(tmp_path / "upper.index") <= 1.2 * SIZE
    assert read_direct(device.path, 0, SIZE) == load.content(before)
    service.detach("gc")
    with AppendUpper.open(data, tmp_path / "upper.index") as upper:
        assert upper.read_at(0, SIZE) == load.content(before)
    assert main(["layer", "gc", str(data), *run_dir]) == 1  # offline it wants the index
    assert main(["layer", "gc", str(data), str(tmp_path / "upper.index"), *run_dir]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_growing(service: DeviceService, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = new_config(tmp_path, kind)
    device = service.attach(config, "grow")
    subprocess.run(["mkfs.ext4", "-q", str(device.path)], check=True)
    target = tmp_path / "mnt"
    target.mkdir()
    service.mount(device, target, read_only=False)
    try:
        (target / "before").write_bytes(b"x" * MIB)
        blocks = os.statvfs(target).f_blocks
        run_dir = ("--run-dir", str(service.run_dir.path))
        assert main(["layer", "resize", str(device.path), "--vsize", "64M", "-q", *run_dir]) == 0
        # Growing a mounted ext4 takes CAP_SYS_RESOURCE, which root may lack in a container.
        grown = main(["layer", "resize", "grow", "--vsize", "64M", "--filesystem", "-q", *run_dir])
        refusal = capsys.readouterr().err
        assert grown == 0 or "Permission denied to resize" in refusal
        if grown == 0:
            assert os.statvfs(target).f_blocks > 1.8 * blocks
            (target / "after").write_bytes(os.urandom(40 * MIB))
        os.sync()
        assert service.list()[0].size == 64 * MIB
        with pytest.raises(OutOfRangeError, match="cannot shrink"):
            LiveDevice(service, "grow").resize(MIB)
    finally:
        mount.unmount(target)
    subprocess.run(["e2fsck", "-f", "-n", str(device.path)], check=True, capture_output=True)
    data = tmp_path / "upper.data"
    assert main(["layer", "resize", str(data), "--vsize", "80M", "--filesystem", "-q", *run_dir]) == 0
    service.detach("grow")
    device = service.attach(config, "grow")
    assert device.size == 80 * MIB
    subprocess.run(["e2fsck", "-f", "-n", str(device.path)], check=True, capture_output=True)
    service.mount(device, target, read_only=False)
    try:
        (target / "last").write_bytes(os.urandom(48 * MIB))
        os.sync()
    finally:
        mount.unmount(target)


@pytest.mark.parametrize("kind", KINDS)
def test_trimming_frees_space(service: DeviceService, tmp_path: Path, kind: str) -> None:
    device = service.attach(new_config(tmp_path, kind, size=64 * MIB), "trim")
    data = tmp_path / "upper.data"
    subprocess.run(["mkfs.ext4", "-q", str(device.path)], check=True)
    target = tmp_path / "mnt"
    target.mkdir()
    service.mount(device, target, read_only=False)
    try:
        (target / "large").write_bytes(os.urandom(24 * MIB))
        os.sync()
        assert allocated(data) > 24 * MIB
        (target / "large").unlink()
        os.sync()
        subprocess.run(["fstrim", str(target)], check=True)
        LiveDevice(service, "trim").collect()  # in append mode a discard is a record, the space comes back here
        assert allocated(data) < 12 * MIB
    finally:
        mount.unmount(target)
    subprocess.run(["e2fsck", "-f", "-n", str(device.path)], check=True, capture_output=True)


@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_with_io_going_on(service: DeviceService, tmp_path: Path, kind: str) -> None:
    config = new_config(tmp_path, kind)
    device = service.attach(config, "snap")
    for at in range(0, SIZE, MIB):
        write_direct(device.path, at, bytes([1 + at // MIB]) * MIB)
    before = read_direct(device.path, 0, SIZE)
    load = Load(device, SIZE // 4096)
    run_dir = ("--run-dir", str(service.run_dir.path))
    with load.going_on():
        for number in range(3):
            data = tmp_path / f"next{number}.data"
            index = [] if number == 1 else ["--index", str(tmp_path / f"next{number}.index")]
            assert main(["device", "snapshot", "snap", "--data", str(data), *index, "-q", *run_dir]) == 0
            time.sleep(0.1)
    assert read_direct(device.path, 0, SIZE) == load.content(before)
    assert service.attach(config, "snap") == service.list()[0]  # still what is attached
    after = ImageConfig.load(config)
    assert [Path(lower.file).name for lower in after.lowers] == ["upper.data", "next0.data", "next1.data"]
    assert Path(after.upper.data).name == "next2.data"
    service.detach("snap")
    device = service.attach(config, "snap")
    assert read_direct(device.path, 0, SIZE) == load.content(before)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or "restacking" in path.name]


def test_a_killed_server_leaves_a_stack_that_opens(service: DeviceService, tmp_path: Path) -> None:
    config = new_config(tmp_path, "append", size=8 * MIB)
    wanted = bytearray(8 * MIB)
    rng = random.Random(5)
    for round_number in range(6):
        device = service.attach(config, f"kill{round_number}")
        assert read_direct(device.path, 0, 8 * MIB) == wanted
        for _ in range(20):
            at = rng.randrange(0, 2048) * 4096
            wanted[at : at + 4096] = rng.randbytes(4096)
            write_direct(device.path, at, bytes(wanted[at : at + 4096]))
        LiveDevice(service, device.device_id).flush()
        fresh = new_config(tmp_path, "append", f"fresh{round_number}", 0)
        old = ImageConfig.load(config)
        made = ImageConfig.load(fresh)
        lowers = (*old.lowers, LowerConfig(file=old.upper.data))
        ImageConfig(lowers=lowers, upper=made.upper).save(fresh)
        outcomes: list[object] = []

        def take(device_id: str = device.device_id, fresh: Path = fresh, outcomes: list[object] = outcomes) -> None:
            try:
                outcomes.append(LiveDevice(service, device_id).snapshot(fresh))
            except DeviceError as error:
                outcomes.append(error)

        taking = threading.Thread(target=take)
        taking.start()
        deadline = time.monotonic() + 30
        mark = Path(f"{old.upper.data}.restacking")
        while not mark.exists() and not outcomes and time.monotonic() < deadline:
            pass
        time.sleep(round_number * 0.001)
        for pid in filter(None, (getattr(device, "keeper_pid", 0), device.pid)):
            os.kill(pid, signal.SIGKILL)
        taking.join(60)
        assert outcomes
        service.detach(device.device_id, force=True)
    device = service.attach(config, "end")
    assert read_direct(device.path, 0, 8 * MIB) == wanted
    assert not list(tmp_path.glob("*.restacking"))


def test_bad_snapshots_change_nothing(service: DeviceService, tmp_path: Path) -> None:
    config = new_config(tmp_path, "append")
    device = service.attach(config, "bad")
    write_direct(device.path, 0, b"k" * 4096)
    live = LiveDevice(service, "bad")
    own = tmp_path / "upper.data"
    text = config.read_text()

    def refused(path: Path, message: str) -> None:
        with pytest.raises(ObdlabError, match=message):
            live.snapshot(path)
        assert config.read_text() == text

    refused(tmp_path / "none.json", "No such file")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    refused(broken, "not JSON")
    refused(new_config(tmp_path, "append", "few"), "wrong number of lowers")
    other = tmp_path / "other.data"
    other.write_bytes(b"x")
    refused(new_config(tmp_path, "append", "foreign", lowers=(other,)), "lower 0 differs")
    same = ImageConfig.load(config)
    ImageConfig(lowers=(LowerConfig(file=str(own)),), upper=same.upper).save(tmp_path / "same.json")
    refused(tmp_path / "same.json", "in use by the present one")
    ImageConfig(lowers=(LowerConfig(file=str(own)),)).save(tmp_path / "readonly.json")
    refused(tmp_path / "readonly.json", "no writable layer")
    refused(new_config(tmp_path, "append", "small", MIB, lowers=(own,)), "not an empty one of the disk's size")
    read_only = tmp_path / "ro.json"
    ImageConfig(lowers=(LowerConfig(file=str(Path(__file__).parents[1] / "golden/ext4/layer1.obd")),)).save(read_only)
    service.attach(read_only, "ro")
    with pytest.raises(DeviceError, match="no writable layer"):
        LiveDevice(service, "ro").flush()
    with pytest.raises(DeviceError, match="not attached"):
        LiveDevice(service, "nobody").flush()
    write_direct(device.path, 4096, b"g" * 4096)
    assert read_direct(device.path, 0, 8192) == b"k" * 4096 + b"g" * 4096
    live.snapshot(new_config(tmp_path, "append", "good", 0, lowers=(own,)))
    assert read_direct(device.path, 0, 8192) == b"k" * 4096 + b"g" * 4096


def test_a_snapshot_on_the_device_itself_is_refused(service: DeviceService, tmp_path: Path) -> None:
    device = service.attach(new_config(tmp_path, "append"), "self")
    subprocess.run(["mkfs.ext4", "-q", str(device.path)], check=True)
    target = tmp_path / "mnt"
    target.mkdir()
    service.mount(device, target, read_only=False)
    try:
        inside = new_config(target, "append", "inside", 0, lowers=(tmp_path / "upper.data",))
        with pytest.raises(DeviceError, match="on the device itself"):
            LiveDevice(service, "self").snapshot(inside)
    finally:
        mount.unmount(target)


@pytest.mark.parametrize("how", ["token", "open", "unix socket"])
def test_the_http_interface(service: DeviceService, tmp_path: Path, how: str) -> None:
    config = new_config(tmp_path, "append")
    device = service.attach(config, "http")
    write_direct(device.path, 0, b"h" * 4096)
    options = {"token": ["--address", "http://127.0.0.1:0"], "open": ["--address", "http://127.0.0.1:0", "--open"]}
    command = [sys.executable, "-m", "obdlab", "serve", "snapshot-api", *options.get(how, [])]
    with subprocess.Popen(
        [*command, "--run-dir", str(service.run_dir.path)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        place = server.stdout.readline().split()[-1]
        headers = {"Content-Type": "application/json"}
        if how == "token":
            token = (service.run_dir.path / "snapshot-api.token").read_text().strip()
            headers["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection(place.removeprefix("http://"), timeout=60)
        if how == "unix socket":
            assert place == str(service.run_dir.path / "snapshot-api.sock")
            connection = UnixConnection(Path(place))

        def ask(query: str) -> tuple[int, dict[str, object]]:
            connection.request("POST", f"/snapshot?{query}", headers=headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

        try:
            fresh = new_config(tmp_path, "append", "fresh", 0, lowers=(tmp_path / "upper.data",))
            good = (200, {"success": True, "message": "Snapshot created successfully"})
            assert ask(f"dev_id=http&config={fresh}") == good
            secret = tmp_path / "secret.json"
            secret.write_text('{"upper": "root:x:0:0"}')
            for query, code in (
                ("dev_id=none&config=x", 404),
                ("dev_id=http&config=/none", 500),
                ("dev_id=http&config=/proc/kmsg", 500),
                (f"dev_id=http&config={secret}", 500),
                ("dev_id=http", 400),
            ):
                got, answer = ask(query)
                assert got == code
                assert set(answer) == {"success", "message"}
                assert "root" not in str(answer)
        finally:
            connection.close()
            server.terminate()
        assert server.wait(30) == 0
    assert ImageConfig.load(config).upper.data == str(tmp_path / "fresh.data")
    assert read_direct(device.path, 0, 4096) == b"h" * 4096
