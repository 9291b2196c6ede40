"""Recording what is read of an image, and fetching it ahead the next time, from a real registry."""

from __future__ import annotations

import io
import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from obdlab.formats.oci import digest_of
from obdlab.formats.tar import wrap_header
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.open import Image, ImageOpenError, WritableImage, open_image
from obdlab.layers.upper import SparseUpper
from obdlab.observe.counters import counted
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Repository
from obdlab.settings.settings import Settings
from tests.image.test_open_remote import EXT4, push
from tests.image.test_open_remote import nothing_leaks as nothing_leaks  # a fixture
from tests.image.test_open_remote import settings as settings  # a fixture
from tests.registry.server import RegistryServer

pytestmark = pytest.mark.registry


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.01)


def held_ranges(image: Image) -> list[tuple[int, int]]:
    """A few of the ranges that hold data, in no order."""
    ranges = [(run.begin, run.end) for run in image.owners() if run.layer is not None and not run.zeroed]
    random.Random(3).shuffle(ranges)
    return ranges[: len(ranges) // 2]


def record(config: ImageConfig, settings: Settings, path: Path) -> list[tuple[int, int]]:
    """Open the image recording, read some of it, and return what."""
    path.touch()
    with open_image(replace(config, record_trace_path=str(path)), settings) as image:
        assert isinstance(image, Image)
        assert path.with_name(path.name + ".lock").exists()
        ranges = held_ranges(image)
        for begin, end in ranges:
            image.read_at(begin, end - begin)
    return ranges


@pytest.fixture
def recorded(
    registry_server: RegistryServer, settings: Settings, tmp_path: Path
) -> tuple[ImageConfig, Path, list[tuple[int, int]]]:
    config = push(registry_server, "trace/image", EXT4)
    path = tmp_path / "trace"
    return config, path, record(config, replace(settings, cache_dir=tmp_path / "recorded"), path)


def test_recorded_by_the_protocol_of_files_and_replayed(
    recorded: tuple[ImageConfig, Path, list[tuple[int, int]]], settings: Settings
) -> None:
    config, path, ranges = recorded
    assert not path.with_name("trace.lock").exists()
    assert path.with_name("trace.ok").exists()
    reads = Trace.from_bytes(path.read_bytes()).reads()
    assert {layer for layer, _, _ in reads} == {0, 1}
    assert (0, 0, 4096) in reads, "the header, read while opening"
    # A non-empty file is replayed: by the image's configuration, or by the settings.
    for number, (changed, host) in enumerate(
        [
            (replace(config, record_trace_path=str(path)), settings),
            (config, replace(settings, trace_path=path)),
        ]
    ):
        with open_image(changed, replace(host, cache_dir=settings.cache_dir / str(number), cache_unit=4096)) as image:
            opened = image.statistics()
            wait_until(lambda: "obdlab-prefetch" not in [thread.name for thread in threading.enumerate()])
            prefetched = image.statistics()
            assert prefetched["prefetch_bytes"] > 0
            for begin, end in ranges:
                image.read_at(begin, end - begin)
            done = image.statistics()
            assert done["demand_bytes"] == opened["demand_bytes"] or done["misses"] == opened["misses"]
            assert done["requests"] == prefetched["requests"], "everything that was read had been fetched"
            assert 0.8 < done["prefetch_used_bytes"] / done["prefetch_bytes"] <= 1


def has_prefetched(image: Image | WritableImage, size: int) -> bool:
    return image.statistics()["prefetch_bytes"] > size


def test_recording_ends_when_the_lock_is_removed(
    registry_server: RegistryServer, settings: Settings, tmp_path: Path
) -> None:
    config = push(registry_server, "trace/lock", EXT4)
    path = tmp_path / "trace"
    path.touch()
    (tmp_path / "trace.ok").touch()  # of some earlier time
    with open_image(replace(config, record_trace_path=str(path)), settings) as image:
        image.read_at(0, 4096)
        (tmp_path / "trace.lock").unlink()
        wait_until(lambda: path.stat().st_size > 0 and (tmp_path / "trace.ok").exists())
        before = path.read_bytes()
        image.read_at(1 << 20, 4096)
    assert path.read_bytes() == before


def test_an_image_that_is_being_recorded_already_opens(
    registry_server: RegistryServer, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = push(registry_server, "trace/busy", EXT4)
    path = tmp_path / "trace"
    path.touch()
    (tmp_path / "trace.lock").touch()
    with open_image(replace(config, record_trace_path=str(path)), settings) as image:
        image.read_at(0, 4096)
    assert "cannot begin to record" in caplog.text
    assert path.stat().st_size == 0
    assert (tmp_path / "trace.lock").exists()


def push_acceleration(config: ImageConfig, trace: bytes) -> ImageConfig:
    tar = trace_tar(trace)
    with closing(RegistryClient()) as client:
        repository = Repository.from_blob_url(config.repo_blob_url)
        client.push_blob(repository, digest_of(tar), len(tar), lambda: io.BytesIO(tar))
    lower = LowerConfig(digest=digest_of(tar), size=len(tar))
    return replace(config, lowers=(*config.lowers, lower), acceleration_layer=True)


def trace_tar(trace: bytes) -> bytes:
    return wrap_header(len(trace)) + trace + bytes(-len(trace) % 512 + 1024)


def test_the_acceleration_layer_from_the_registry_and_unpacked(
    recorded: tuple[ImageConfig, Path, list[tuple[int, int]]], settings: Settings, tmp_path: Path
) -> None:
    config, path, _ = recorded
    remote = push_acceleration(config, path.read_bytes())
    unpacked = tmp_path / "fs"
    unpacked.mkdir()
    (unpacked / "trace").write_bytes(path.read_bytes())
    local = replace(config, lowers=(*config.lowers, LowerConfig(dir=str(unpacked))), acceleration_layer=True)
    for number, one in enumerate((remote, local)):
        with open_image(one, replace(settings, cache_dir=tmp_path / str(number), cache_unit=4096)) as image:
            wait_until(partial(has_prefetched, image, 50_000))
    with pytest.raises(ImageOpenError, match="cannot be recorded"):
        open_image(replace(local, record_trace_path=str(path)), settings)


@pytest.mark.parametrize("what", ["damaged", "cut", "foreign", "empty list", "missing"])
def test_what_cannot_be_replayed_is_ignored_with_a_warning(
    recorded: tuple[ImageConfig, Path, list[tuple[int, int]]],
    settings: Settings,
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, path, ranges = recorded
    good = path.read_bytes()
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "damaged": good[:-1] + bytes((good[-1] ^ 1,)),
                "cut": good[:-24],
                "foreign": Trace.from_reads([(0, 0, 4096), (2, 0, 4096)]).to_bytes(),
                "empty list": b"\n" * 65537,
            }[what]
        )
    ignored = counted().get("traces_ignored", {}).get("", 0)
    with open_image(config, replace(settings, trace_path=path)) as image:
        wait_until(lambda: any(record.levelno == logging.WARNING for record in caplog.records))
        assert counted()["traces_ignored"][""] == ignored + 1
        assert "trace" in caplog.text
        begin, end = ranges[0]
        assert len(image.read_at(begin, end - begin)) == end - begin
        assert image.statistics()["prefetch_bytes"] == 0


def test_a_priority_list_names_files(
    registry_server: RegistryServer, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = push(registry_server, "trace/list", EXT4)
    path = tmp_path / "list"
    path.write_text("/no/such/file\n/*\nnot a path\n/nor/this/\n")
    with open_image(config, replace(settings, trace_path=path, cache_unit=4096)) as image:
        wait_until(lambda: image.statistics()["prefetch_bytes"] > 0)
    assert "line 3: not a plain path" in caplog.text
    assert "2 of 3 paths are not in the image: /no/such/file, /nor/this/" in caplog.text


def test_a_writable_image_records_its_lowers(
    registry_server: RegistryServer, settings: Settings, tmp_path: Path
) -> None:
    config = push(registry_server, "trace/writable", EXT4)
    SparseUpper.create(tmp_path / "data", 0).close()
    path = tmp_path / "trace"
    path.touch()
    writable = replace(
        config, record_trace_path=str(path), upper=UpperConfig(data=str(tmp_path / "data"), index=str(tmp_path / "i"))
    )
    with open_image(writable, settings) as image:
        image.read_at(1024, 1024)
    assert Trace.from_bytes(path.read_bytes()).size > 3 * 4096
