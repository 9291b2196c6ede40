"""Faithful wrappers at the joints of an image: requests, traces, hot layers, counters and extents stay the same."""

from __future__ import annotations

import io
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import pytest

import obdlab
from obdlab.blob import Around, Blob, ByteStream, Joint, Wrapper, WritableBlob, WritableWrapper, find
from obdlab.call import Call
from obdlab.errors import SourceError
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.open import Image
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.layers.append import AppendUpper
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.upper import SparseUpper
from obdlab.observe.counters import counted
from obdlab.settings.settings import Settings
from obdlab.traces.hotlayer import write_hot_layer
from tests.cache.origin import wait_until
from tests.outage.lab import push
from tests.outage.proxy import OutageProxy, outage_proxy
from tests.registry.faulty import Answer
from tests.registry.server import RegistryServer

pytestmark = pytest.mark.registry

# Layers here have no targets (see test_open_turbo).
JOINTS: tuple[Joint, ...] = tuple(joint for joint in get_args(Joint) if joint != "target")
SIZE = 16 << 20
LINK_S = 0.02
# The link's measured speed decides on extents, and a loaded machine changes that a little.
NEAR = 0.05


class Counting(Wrapper):
    """Passes all on, and counts."""

    def __init__(self, below: Blob) -> None:
        super().__init__(below)
        self.reads = 0

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self.reads += 1
        return super().read_at(offset, length, call)

    def stream(self, offset: int, length: int, call: Call | None = None) -> ByteStream | None:
        self.reads += 1
        return super().stream(offset, length, call)


@dataclass
class Wrapping:
    """Puts a counting wrapper at some joints."""

    joints: tuple[Joint, ...]
    put: list[tuple[Joint, Counting]] = field(default_factory=list)

    def __call__(self, joint: Joint, blob: Blob) -> Blob:
        if joint not in self.joints:
            return blob
        wrapper = Counting(blob)
        self.put.append((joint, wrapper))
        return wrapper

    @property
    def reads(self) -> Counter[Joint]:
        total: Counter[Joint] = Counter()
        for joint, wrapper in self.put:
            total[joint] += wrapper.reads
        return total


@dataclass
class Link:
    """A delayed link: a fault of the proxy that notes the ranges asked for."""

    name: str = "link"
    asked: list[tuple[int, int]] = field(default_factory=list)

    def fault(self, answer: Answer) -> None:
        begin, _, last = answer.handler.headers["Range"].removeprefix("bytes=").partition("-")
        self.asked.append((int(begin), int(last) + 1 - int(begin)))
        time.sleep(LINK_S)
        answer.send()


@dataclass(frozen=True)
class Place:
    """The image behind the delayed link, the same with a hot layer, and a trace of it."""

    proxy: OutageProxy
    link: Link
    config: ImageConfig
    hot: ImageConfig
    trace: Path


@dataclass(frozen=True)
class Outcome:
    """What came of opening and reading the image in several ways."""

    extents: list[tuple[int, int]]
    counters: dict[str, int]
    trace: list[tuple[int, int, int]]
    hot_layer: bytes
    replayed: dict[str, int]
    hot_requests: int


def offsets(count: int) -> list[int]:
    return random.Random(4).sample(range(0, SIZE - 4096, 4096), count)


def layer(directory: Path, number: int) -> Path:
    directory.mkdir()
    content = random.Random(number)
    with AppendUpper.create(directory / "data", directory / "index", SIZE) as upper:
        for at in range(number << 20, SIZE, 2 << 20):
            upper.write_at(at, content.randbytes(1 << 20))
        path = directory / "layer.obd"
        write_layer(upper, path, Packing("zstd", 16384, tar=True))
    return path


@pytest.fixture(scope="module")
def place(registry_server: RegistryServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("joints")
    layers = [layer(directory / str(number), number) for number in range(2)]
    with outage_proxy(registry_server.host) as proxy:
        config = push(proxy.host, "joints/image", layers)
        trace = directory / "trace"
        trace.touch()
        settings = Settings(cache_dir=directory / "cache")
        with obdlab.open_image(replace(config, record_trace_path=str(trace)), settings=settings) as image:
            for offset in offsets(60):
                image.read_at(offset, 4096)
        hot = directory / "hot.obd"
        with obdlab.open_stack(layers) as disk, hot.open("wb") as file, Packing(tar=True).around(file) as sink:
            write_hot_layer(disk, trace.read_bytes(), sink)
        with_hot = push(proxy.host, "joints/hot", [*layers, hot])
        link = Link()
        proxy.always(link)
        yield Place(proxy, link, config, with_hot, trace)


def outcome(place: Place, directory: Path, around: Around | None) -> Outcome:
    """Open and read the image: at random, recording, replaying a trace, and with a hot layer."""
    directory.mkdir()

    def opened(name: str, config: ImageConfig, **options: object) -> Blob:
        place.link.asked.clear()
        settings = replace(Settings(cache_dir=directory / name, cache_unit=16384), **options)  # type: ignore[arg-type]
        return obdlab.open_image(config, settings=settings, around=around)

    with opened("random", place.config) as image:
        for offset in offsets(150):
            image.read_at(offset, 4096)
        counters, extents = image.statistics(), sorted(place.link.asked)

    path = directory / "trace"
    path.touch()
    with opened("recorded", replace(place.config, record_trace_path=str(path))) as image:
        for offset in offsets(60):
            image.read_at(offset, 4096)
    reads = Trace.from_bytes(path.read_bytes()).reads()

    with opened("replayed", place.config, trace_path=place.trace) as image:
        wait_until(lambda: "obdlab-prefetch" not in [thread.name for thread in threading.enumerate()])
        for offset in offsets(60):
            image.read_at(offset, 4096)
        replayed = image.statistics()
        stack, hot_layer = find(image, Stack), io.BytesIO()
        assert stack is not None
        write_hot_layer(stack, place.trace.read_bytes(), hot_layer)

    with opened("hot", place.hot) as image:
        wait_until(lambda: "obdlab-stream" not in [thread.name for thread in threading.enumerate()])
        for offset in offsets(60):
            image.read_at(offset, 4096)
        hot_requests = len(place.link.asked)
    return Outcome(extents, counters, sorted(reads), hot_layer.getvalue(), replayed, hot_requests)


@pytest.fixture(scope="module")
def bare(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome without any wrapper."""
    return outcome(place, tmp_path_factory.mktemp("bare") / "caches", None)


@pytest.mark.parametrize("joints", [*[(joint,) for joint in JOINTS], JOINTS], ids="+".join)
def test_a_faithful_wrapper_changes_nothing(
    place: Place, bare: Outcome, joints: tuple[Joint, ...], tmp_path: Path
) -> None:
    around = Wrapping(joints)
    got = outcome(place, tmp_path / "caches", around)
    assert all(around.reads[joint] > 0 for joint in joints), around.reads
    assert got.counters.keys() == bare.counters.keys()
    assert got.counters["requests"] == pytest.approx(bare.counters["requests"], rel=NEAR)
    assert got.counters["demand_bytes"] == pytest.approx(bare.counters["demand_bytes"], rel=NEAR)
    assert len(got.extents) == pytest.approx(len(bare.extents), rel=NEAR)
    assert max(length for _, length in got.extents) == max(length for _, length in bare.extents)
    assert got.trace == bare.trace
    assert got.hot_layer == bare.hot_layer
    for counter in ("prefetch_bytes", "prefetch_used_bytes", "prefetch_hits", "requests"):
        assert got.replayed[counter] == pytest.approx(bare.replayed[counter], rel=NEAR), counter
    # The number of reads that come before the stream depends on the load of the machine.
    assert got.hot_requests == pytest.approx(bare.hot_requests, abs=5)


def test_what_is_compared_depends_on_the_link(bare: Outcome) -> None:
    assert bare.counters["requests"] < 80, "150 reads, by extents as large as suits the delayed link"
    assert max(length for _, length in bare.extents) > Settings().cache_extent
    assert bare.replayed["prefetch_bytes"] > 60 * 4096
    assert bare.replayed["prefetch_hits"] > 0
    assert 0 < bare.hot_requests < 20


def test_all_joints_of_a_local_image_are_offered(tmp_path: Path) -> None:
    path = layer(tmp_path / "layer", 0)
    around = Wrapping(JOINTS)
    with (
        obdlab.open_image(ImageConfig(lowers=(LowerConfig(file=str(path)),)), around=around) as image,
        obdlab.open_stack([path]) as wanted,
    ):
        assert image.read_at(0, SIZE) == wanted.read_at(0, SIZE)
        assert [joint for joint, _ in around.put] == ["origin", "zfile", "layer", "stack"]
        assert find(image, Image) is not None


def test_a_writable_image_wants_a_wrapper_that_writes(tmp_path: Path) -> None:
    path = layer(tmp_path / "layer", 0)
    SparseUpper.create(tmp_path / "data", 0).close()
    upper = UpperConfig(data=str(tmp_path / "data"), index=str(tmp_path / "index"))
    config = tmp_path / "config.v1.json"
    ImageConfig(lowers=(LowerConfig(file=str(path)),), upper=upper).save(config)
    with pytest.raises(TypeError, match=r"wanted a WritableBlob \(got Counting\)"):
        obdlab.open_image(config, around=Wrapping(("stack",)))

    def around(joint: Joint, blob: Blob) -> Blob:
        return WritableWrapper(blob) if isinstance(blob, WritableBlob) else Counting(blob)

    with obdlab.open_image(config, around=around) as image:
        assert isinstance(image, WritableBlob)
        image.write_at(4096, b"x" * 512)
        image.discard(0, 512)
        image.flush()
        assert image.read_at(0, 512) == bytes(512)
        assert image.read_at(4096, 512) == b"x" * 512
        assert find(image, WritableStack) is not None


class Closing(Wrapper):
    """Notes that it was closed."""

    closed = False

    def close(self) -> None:
        self.closed = True
        super().close()


@pytest.mark.parametrize("failing", JOINTS)
def test_an_error_of_around_leaves_nothing_open(place: Place, tmp_path: Path, failing: Joint) -> None:
    origins: list[Closing] = []

    def around(joint: Joint, blob: Blob) -> Blob:
        if joint == failing:
            raise RuntimeError(f"no wrapper for {joint}")
        if joint == "origin":
            origins.append(Closing(blob))
            return origins[-1]
        return blob

    with pytest.raises(RuntimeError, match=f"no wrapper for {failing}"):
        obdlab.open_image(place.config, settings=Settings(cache_dir=tmp_path / "cache"), around=around)
    assert origins or failing == "origin"
    assert all(origin.closed for origin in origins)


class WrongUntilEvicted(Wrapper):
    """Gives wrong bytes for every block until a reader has it evicted."""

    def __init__(self, below: Blob, wrong: set[int]) -> None:
        super().__init__(below)
        self._wrong = wrong

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        data = bytearray(super().read_at(offset, length, call))
        for block in self._wrong & set(range(offset // 4096, -(-(offset + length) // 4096))):
            at = max(0, block * 4096 - offset)
            data[at] ^= 0xFF
        return bytes(data)

    def evict(self, offset: int, length: int) -> None:
        self._wrong.difference_update(range(offset // 4096, -(-(offset + length) // 4096)))
        super().evict(offset, length)


class Refusing(Wrapper):
    """Refuses all reads while it is told to."""

    refuses = False

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        if self.refuses:
            raise SourceError("refused", blob=self.name, offset=offset, temporary=True)
        return super().read_at(offset, length, call)


def test_faults_at_a_joint_are_errors_or_healed_and_never_wrong_bytes(place: Place, tmp_path: Path) -> None:
    origins: list[Refusing] = []
    wrong: set[int] = set()

    def around(joint: Joint, blob: Blob) -> Blob:
        if joint == "origin":
            origins.append(Refusing(blob))
            return origins[-1]
        return WrongUntilEvicted(blob, wrong) if joint == "cache" else blob

    settings = Settings(cache_dir=tmp_path / "cache")
    healed = counted().get("corruptions_healed", {}).get("zfile", 0)
    with (
        obdlab.open_image(place.config, settings=settings) as good,
        obdlab.open_image(
            place.config, settings=replace(settings, cache_dir=tmp_path / "other"), around=around
        ) as image,
    ):
        wanted = good.read_at(0, SIZE)
        wrong.update(range(16, SIZE // 4096, 7))
        for offset in offsets(40):
            assert image.read_at(offset, 4096) == wanted[offset : offset + 4096]
        assert counted()["corruptions_healed"]["zfile"] > healed
        wrong.clear()
        image.evict(0, SIZE)
        for origin in origins:
            origin.refuses = True
        with pytest.raises(SourceError, match="refused"):
            image.read_at(0, SIZE)
        for origin in origins:
            origin.refuses = False
        assert image.read_at(0, SIZE) == wanted
