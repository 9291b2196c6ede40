"""Images that cannot be read lazily run all the same, and say so."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.devices.fuse_loop import FuseLoop
from obdlab.errors import DeviceError, ObdlabError
from obdlab.formats import oci
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.layers.append import AppendUpper
from obdlab.observe.counters import counted
from obdlab.snapshotter import fallback, writable
from obdlab.snapshotter.errors import AlreadyExistsError, FailedPreconditionError
from obdlab.snapshotter.fallback import LABEL_FALLBACK
from obdlab.snapshotter.mounts import Mount
from obdlab.snapshotter.tracing import LABEL_RECORD, LABEL_RECORD_PATH
from obdlab.snapshotter.writable import LABEL_WRITABLE
from tests.registry.faulty import Answer, faulty_registry, silence, status
from tests.snapshotter.mounting import mounted
from tests.snapshotter.test_writable import Root, golden, root

__all__ = ["root"]

pytestmark = pytest.mark.kernel

EXPECTED = json.loads((Path(__file__).parents[1] / "golden/ext4/expected.m1.json").read_text())


def fallbacks(reason: str) -> float:
    return counted().get("snapshotter_fallbacks", {}).get(reason, 0)


@pytest.fixture
def no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FuseLoop, "nodes", ("/nonexistent/fuse",))


@pytest.mark.usefixtures("no_devices")
def test_without_devices_the_files_are_unpacked(root: Root, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = fallbacks(fallback.NO_DEVICES)
    with root.opened(trace_roots=(tmp_path,)) as snapshotter:
        image = golden(snapshotter, root)
        (root.home(1) / "block/unpacked.new/left/by/a/kill").mkdir(parents=True)
        mounts = snapshotter.prepare("one", image, {LABEL_WRITABLE: "dir"})
        assert mounts[0].type == "overlay"
        with mounted(mounts, tmp_path / "rootfs") as rootfs:
            for entry in EXPECTED:
                status = (rootfs / entry["path"].lstrip("/")).lstat()
                assert (oct(status.st_mode), status.st_uid) == (entry["mode"], entry["uid"])
            (rootfs / "new").write_text("x")
        assert snapshotter.stat(image).labels[LABEL_FALLBACK] == fallback.NO_DEVICES
        assert "no block devices here (/nonexistent/fuse: No such file or directory)" in caplog.text
        assert fallbacks(fallback.NO_DEVICES) == before + 1
        assert root.devices.list() == []
        assert snapshotter.usage(image).size > 1 << 20
        (tmp_path / "trace").touch()
        with pytest.raises(FailedPreconditionError, match="no device here"):
            snapshotter.prepare("traced", image, {LABEL_RECORD: "yes", LABEL_RECORD_PATH: str(tmp_path / "trace")})
        # It serves a view too, read-only, is not removed under it, and comes back after a reboot.
        with mounted(snapshotter.view("look", image, {}), tmp_path / "look") as look:
            assert (look / "abs").exists()
            with pytest.raises(OSError, match="Read-only"):
                (look / "new").touch()
            for key in ("one", "look"):
                snapshotter.remove(key)
            with pytest.raises(FailedPreconditionError, match="in use"):
                snapshotter.remove(image)
        snapshotter.prepare("two", image, {})
    root.lose_mounts()
    with root.opened() as snapshotter:
        with mounted(snapshotter.mounts("two"), tmp_path / "rootfs") as rootfs:
            assert (rootfs / "abs").exists()
        assert fallbacks(fallback.NO_DEVICES) == before + 1
        snapshotter.remove("two")
        for name in ("lower", "upper", "work"):
            (tmp_path / name).mkdir()
        options = [f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work")]
        with mounted([Mount("overlay", "overlay", tuple(options))], tmp_path / "other"):  # over other files
            snapshotter.remove(image)
        assert list((tmp_path / "root/snapshots").iterdir()) == []


@pytest.mark.usefixtures("no_devices")
def test_an_unpacking_that_fails_leaves_nothing(root: Root) -> None:
    with root.opened() as snapshotter:
        image = golden(snapshotter, root)
        (root.home(1) / "fs/overlaybd.commit").write_bytes(b"damaged" * 1000)
        with pytest.raises(ObdlabError, match=r"pulling the image whole: .*overlaybd\.commit"):
            snapshotter.prepare("one", image, {})
        assert sorted(os.listdir(root.home(1) / "block")) == ["config.v1.json", "init-debug.log", "mountpoint"]
        assert LABEL_FALLBACK not in snapshotter.stat(image).labels
        assert [snapshot.key for snapshot in snapshotter.walk()] == [image]


@pytest.fixture(scope="module")
def large_layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A layer of more than what is read through for want of ranges, and the file "noise" in it."""
    directory = tmp_path_factory.mktemp("layer")
    (directory / "top").mkdir()
    noise = random.Random(5).randbytes(6 << 20)
    (directory / "top/noise").write_bytes(noise)
    disk, layer = directory / "disk", directory / "layer"
    command = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(directory / "top"), str(disk), "16M"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert main(["layer", "import", str(disk), str(layer)]) == 0
    return layer.read_bytes(), noise


def whole(answer: Answer) -> None:
    """As a registry that has not heard of ranges."""
    answer.handler.answer(200, {"Content-Length": str(len(answer.whole))}, answer.whole)


def labels_of(name: str, image: str, digest: str, layer: bytes) -> dict[str, str]:
    """The labels of a layer that is to be pulled."""
    return {
        "containerd.io/snapshot.ref": name,
        "containerd.io/snapshot/image-ref": image,
        oci.BLOB_DIGEST: digest,
        oci.BLOB_SIZE: str(len(layer)),
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_from_a_registry_without_ranges_blobs_are_fetched_whole(
    root: Root, tmp_path: Path, large_layer: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    layer, noise = large_layer
    before = fallbacks(fallback.NO_RANGES)
    with faulty_registry() as registry, root.opened() as snapshotter:
        registry.always(whole)
        digest = registry.add_blob(layer)
        labels = labels_of(digest, f"{registry.host}/some/image:1", digest, layer)
        with pytest.raises(AlreadyExistsError):
            snapshotter.prepare("extract", "", labels)
        (root.home(1) / "fs/.overlaybd.commit.new").write_text("left by a kill")
        with mounted(snapshotter.prepare("one", digest, {}), tmp_path / "rootfs") as rootfs:
            assert (rootfs / "noise").read_bytes() == noise
        assert (root.home(1) / "fs/overlaybd.commit").read_bytes() == layer
        assert snapshotter.stat(digest).labels[LABEL_FALLBACK] == fallback.NO_RANGES
        assert fallbacks(fallback.NO_RANGES) == before + 1
        assert "its blobs are fetched whole" in caplog.text
        asked = len(registry.blob_requests())
    root.lose_mounts()
    with root.opened() as snapshotter:  # the registry is gone
        with mounted(snapshotter.mounts("one"), tmp_path / "rootfs") as rootfs:
            assert (rootfs / "noise").read_bytes() == noise
        assert len(registry.blob_requests()) == asked


class Pausing:
    """Serves whole blobs. The first fetch of one of them pauses in the middle, until the second one has begun."""

    def __init__(self, digest: str, *, cut_off: bool) -> None:
        self.begun = threading.Event()
        self.fetches = 0
        self._digest, self._cut_off = digest, cut_off
        self._second, self._guard = threading.Event(), threading.Lock()

    def __call__(self, answer: Answer) -> None:
        handler, size = answer.handler, len(answer.whole)
        if not handler.path.endswith(self._digest):
            whole(answer)
            return
        if self._cut_off and self._second.is_set():
            status(404)(answer)
            return
        if handler.headers.get("Range"):
            whole(answer)
            return
        with self._guard:
            self.fetches += 1
            first = self.fetches == 1
        handler.start(200, {"Content-Length": str(size)})
        stop = size // 2 if first else size // 8 if self._cut_off else size
        handler.wfile.write(answer.whole[:stop])
        if first:
            self.begun.set()
            if self._second.wait(5):
                time.sleep(1)  # for the second to write what has come
            handler.wfile.write(answer.whole[stop:])
        else:
            self._second.set()
            handler.close_connection = True


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_two_images_that_fetch_one_layer_do_not_spoil_it(
    root: Root, tmp_path: Path, large_layer: tuple[bytes, bytes], cut_off: bool
) -> None:
    layer, noise = large_layer
    with faulty_registry() as registry, root.opened() as snapshotter:

        def pull(parent: str, data: bytes) -> str:
            digest = registry.add_blob(data)
            name = oci.chain_id_over(parent, digest)
            labels = labels_of(name, f"{registry.host}/some/image:1", digest, data)
            with pytest.raises(AlreadyExistsError):
                snapshotter.prepare("extract", parent, labels)
            return name

        base = pull("", layer)
        images = [pull(base, empty_layer(tmp_path / name)) for name in ("a", "b")]
        pausing = Pausing(base, cut_off=cut_off)
        registry.always(pausing)
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(snapshotter.prepare, "one", images[0], {})
            assert pausing.begun.wait(60)
            second = threads.submit(snapshotter.prepare, "two", images[1], {})
            both = first.result(120), second.result(120)
        for mounts in both:
            with mounted(mounts, tmp_path / "rootfs") as rootfs:
                assert (rootfs / "noise").read_bytes() == noise
        assert (root.home(1) / "fs/overlaybd.commit").read_bytes() == layer
        assert pausing.fetches == 1


def empty_layer(directory: Path) -> bytes:
    directory.mkdir()
    upper = UpperConfig(str(directory / "index"), str(directory / "data"))
    AppendUpper.create(upper.data, upper.index, 16 << 20).close()
    writable.seal(upper, directory / "layer")
    return (directory / "layer").read_bytes()


@pytest.mark.slow
def test_wrong_bytes_are_not_kept(root: Root, large_layer: tuple[bytes, bytes]) -> None:
    layer, _ = large_layer

    def wrong(answer: Answer) -> None:
        changed = bytearray(answer.whole)
        changed[-700_000] ^= 1
        answer.whole = bytes(changed)
        whole(answer)

    with faulty_registry() as registry, root.opened() as snapshotter:
        registry.always(wrong)
        digest = registry.add_blob(layer)
        labels = labels_of(digest, f"{registry.host}/some/image:1", digest, layer)
        with pytest.raises(AlreadyExistsError):
            snapshotter.prepare("extract", "", labels)
        with pytest.raises(ObdlabError, match="wrong content"):
            snapshotter.prepare("one", digest, {})
        assert os.listdir(root.home(1) / "fs") == []


def test_a_plain_layer_says_what_it_is(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = fallbacks(fallback.NOT_OVERLAYBD)
    with root.opened() as snapshotter:
        labels = {"containerd.io/snapshot.ref": "chain", "containerd.io/snapshot/image-ref": "registry.test/plain:1"}
        snapshotter.prepare("extract", "", labels)
        snapshotter.commit("chain", "extract", labels)
        assert snapshotter.stat("chain").labels[LABEL_FALLBACK] == fallback.NOT_OVERLAYBD
        snapshotter.prepare("extract", "chain", labels | {"containerd.io/snapshot.ref": "next"})
    assert [record.levelname for record in caplog.records if "pulled whole" in record.message] == ["WARNING", "INFO"]
    assert "registry.test/plain:1" in caplog.text
    assert fallbacks(fallback.NOT_OVERLAYBD) == before + 2


def test_other_failures_are_no_reason_to_fall_back(root: Root) -> None:
    assert fallback.missing_devices() == ""
    assert not fallback.is_without_ranges(DeviceError("registry ignores ranges"))  # words alone are no reason


KILLED = """
import sys
from pathlib import Path
from obdlab.settings.settings import Settings
from obdlab.snapshotter import fallback

fallback.unpack(Path(sys.argv[1]), Path(sys.argv[2]), Settings(cache_dir=Path(sys.argv[3])))
"""


def test_whoever_unpacks_dies_with_its_service(tmp_path: Path) -> None:
    with faulty_registry() as registry:
        registry.always(silence)
        config = tmp_path / "config.v1.json"
        lower = LowerConfig(digest=registry.add_blob(bytes(1 << 20)), size=1 << 20, dir=str(tmp_path))
        ImageConfig(repo_blob_url=f"http://{registry.host}/v2/some/image/blobs", lowers=(lower,)).save(config)
        command = [sys.executable, "-c", KILLED, str(config), str(tmp_path / "unpacked"), str(tmp_path / "cache")]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as service:
            wait_until(lambda: bool(registry.blob_requests()))
            (worker,) = children_of(service.pid)
            service.kill()
        wait_until(lambda: not Path(f"/proc/{worker}").exists() or not children_name(worker))
    assert not (tmp_path / "unpacked").exists()


def children_of(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def children_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
