"""Labels that have a container's reads recorded, or a trace replayed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig
from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError
from obdlab.snapshotter.tracing import LABEL_RECORD, LABEL_RECORD_PATH
from obdlab.snapshotter.writable import LABEL_WRITABLE
from tests.snapshotter.mounting import mounted
from tests.snapshotter.test_core import CHAIN, pull
from tests.snapshotter.test_hostile_labels import QuietImages, opened
from tests.snapshotter.test_writable import Root, golden, root

__all__ = ["root"]

_DEADLINE_S = 30.0


def record(path: Path) -> dict[str, str]:
    path.touch()
    return {LABEL_RECORD: "yes", LABEL_RECORD_PATH: str(path)}


def until_written(path: Path) -> Trace:
    deadline = time.monotonic() + _DEADLINE_S
    while not path.with_name(f"{path.name}.ok").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return Trace.from_bytes(path.read_bytes())


@pytest.mark.kernel
def test_the_reads_of_a_container_are_recorded(root: Root, tmp_path: Path) -> None:
    path, lock = tmp_path / "trace", tmp_path / "trace.lock"
    with root.opened(trace_roots=(tmp_path,)) as snapshotter:
        image = golden(snapshotter, root)
        snapshotter.prepare("before", image, {})
        snapshotter.remove("before")  # its device is still there, with what it has cached
        with mounted(snapshotter.prepare("one", image, record(path)), tmp_path / "rootfs") as rootfs:
            assert lock.exists()
            (rootfs / "big").read_bytes()
            lock.unlink()
            trace = until_written(path)
        assert trace.records["length"].sum() > 10**6
        assert ImageConfig.load(root.home(1) / "block/config.v1.json").record_trace_path == str(path)
        # Now that it is one, it is replayed; a container without the label has the image as it was.
        snapshotter.remove("one")
        snapshotter.prepare("two", image, {LABEL_RECORD: "yes", LABEL_RECORD_PATH: str(path)})
        assert ImageConfig.load(root.home(1) / "block/config.v1.json").record_trace_path == str(path)
        snapshotter.remove("two")
        snapshotter.prepare("three", image, {})
        assert ImageConfig.load(root.home(1) / "block/config.v1.json").record_trace_path == ""
        assert len(root.devices.list()) == 1


@pytest.mark.kernel
def test_a_recording_wants_the_image_for_itself(root: Root, tmp_path: Path) -> None:
    with root.opened(trace_roots=(tmp_path,)) as snapshotter:
        image = golden(snapshotter, root)
        snapshotter.prepare("other", image, {})
        with pytest.raises(FailedPreconditionError, match="no other container"):
            snapshotter.prepare("one", image, record(tmp_path / "trace"))
        assert [snapshot.key for snapshot in snapshotter.walk(["kind==active"])] == ["other"]
        # A container without the label leaves a recording alone.
        snapshotter.remove("other")
        snapshotter.prepare("one", image, record(tmp_path / "trace"))
        snapshotter.prepare("two", image, {})
        assert (tmp_path / "trace.lock").exists()


@pytest.mark.kernel
def test_a_device_of_its_own_records_too(root: Root, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with root.opened(trace_roots=(tmp_path,)) as snapshotter:
        image = golden(snapshotter, root)
        labels = {LABEL_WRITABLE: "dir", **record(path)}
        with mounted(snapshotter.prepare("one", image, labels), tmp_path / "rootfs") as rootfs:
            (rootfs / "big").read_bytes()
        snapshotter.remove("one")
        assert until_written(path).records["length"].sum() > 10**6
        snapshotter.prepare("two", image, {LABEL_WRITABLE: "dir"})
        assert ImageConfig.load(root.home(3) / "block/config.v1.json").record_trace_path == ""


@pytest.mark.kernel
@pytest.mark.parametrize(
    "text", ["{}/nonexistent/trace", *(pytest.param(text, marks=pytest.mark.slow) for text in ("relative", "/"))]
)
def test_traces_that_are_not_there_are_refused(root: Root, tmp_path: Path, text: str) -> None:
    with root.opened(trace_roots=(tmp_path,)) as snapshotter:
        image = golden(snapshotter, root)
        for more in ({}, {LABEL_WRITABLE: "dir"}):
            with pytest.raises(InvalidArgumentError, match="record-trace-path"):
                snapshotter.prepare(
                    "one", image, {LABEL_RECORD: "yes", LABEL_RECORD_PATH: text.format(tmp_path)} | more
                )
        assert [snapshot.key for snapshot in snapshotter.walk()] == [image]
        snapshotter.prepare("one", image, {LABEL_RECORD: "no", LABEL_RECORD_PATH: text})


class UsedImages(QuietImages):
    """Devices that stay: a mount elsewhere holds them."""

    def release(self, snapshot_id: int) -> bool:
        raise FailedPreconditionError("image snapshot is in use: mounted on /elsewhere")


def test_an_image_that_is_mounted_elsewhere_is_not_recorded(tmp_path: Path) -> None:
    """Reads of its files would find the cache of that mount, and miss in the trace."""
    snapshotter = opened(tmp_path, UsedImages(), trace_roots=(tmp_path,))
    try:
        pull(snapshotter)
        with pytest.raises(FailedPreconditionError, match="is in use: a recording into"):
            snapshotter.prepare("one", CHAIN[0], record(tmp_path / "trace"))
        assert ImageConfig.load(tmp_path / "root/snapshots/1/block/config.v1.json").record_trace_path == ""
        assert [snapshot.key for snapshot in snapshotter.walk()] == [CHAIN[0]]
        # A trace that exists is only not replayed: the container starts without it.
        (tmp_path / "trace").write_bytes(b"recorded")
        labels = {LABEL_RECORD: "yes", LABEL_RECORD_PATH: str(tmp_path / "trace")}
        snapshotter.prepare("one", CHAIN[0], labels)
        assert ImageConfig.load(tmp_path / "root/snapshots/1/block/config.v1.json").record_trace_path == ""
    finally:
        snapshotter.close()


def test_a_trace_that_is_deleted_meanwhile_fails_no_container(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trace"

    class DeletingImages(QuietImages):
        def release(self, snapshot_id: int) -> bool:
            path.unlink()
            return False

    snapshotter = opened(tmp_path, DeletingImages(), trace_roots=(tmp_path,))
    try:
        pull(snapshotter)
        snapshotter.prepare("one", CHAIN[0], record(path))
        assert f"the trace {path} is not replayed" in caplog.text
    finally:
        snapshotter.close()


def test_an_image_that_is_unpacked_has_no_reads_to_record(tmp_path: Path) -> None:
    snapshotter = opened(tmp_path, trace_roots=(tmp_path,))
    try:
        pull(snapshotter)
        (tmp_path / "root/snapshots/1/block/unpacked").mkdir()
        with pytest.raises(FailedPreconditionError, match="has no device here"):
            snapshotter.prepare("one", CHAIN[0], record(tmp_path / "trace"))
        path = tmp_path / "root/snapshots/1/block/config.v1.json"
        assert ImageConfig.load(path).record_trace_path == ""
        # The trace of the time before it was unpacked is cleared.
        replace(ImageConfig.load(path), record_trace_path="/before").save(path)
        snapshotter.prepare("one", CHAIN[0], {})
        assert ImageConfig.load(path).record_trace_path == ""
    finally:
        snapshotter.close()
