"""The contract of Blob, for every implementation."""

from __future__ import annotations

import gzip
import importlib
import inspect
import io
import os
import pkgutil
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import zstandard

import obdlab
from obdlab.blob import (
    Blob,
    ByteStream,
    LinkSpeed,
    MemoryBlob,
    Wrapper,
    WritableBlob,
    WritableWrapper,
    chain,
    find,
    range_in,
)
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.call import Call
from obdlab.convert.endpoints import registryimages
from obdlab.errors import ObdlabError, OutOfRangeError
from obdlab.formats.oci import digest_of
from obdlab.formats.tarsums import TarSums
from obdlab.image.checkedblob import CheckedBlob
from obdlab.image.open import Image, WritableImage
from obdlab.image.wholeblob import WholeBlob
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.layers import recorder
from obdlab.layers.append import AppendUpper
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.layerfile import LayerFile
from obdlab.layers.lsmt import open_layer
from obdlab.layers.rawfile import RawFile
from obdlab.layers.spancache import SpanCache
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.summedtar import SummedTar
from obdlab.layers.targetdisk import TargetDisk
from obdlab.layers.tarwrap import open_tarwrap
from obdlab.layers.upper import SparseUpper
from obdlab.layers.warp import WarpFile
from obdlab.layers.zfile import open_zfile
from obdlab.layers.zstdtarget import ZstdTarget
from obdlab.layers.zstdwriter import ZstdIndexWriter
from obdlab.localfile import LocalFile
from obdlab.peers.agent.sharedblob import SharedBlob, SharedFile
from obdlab.registry.client import RegistryClient
from obdlab.registry.link import Link
from obdlab.registry.remoteblob import RemoteBlob
from obdlab.volumes.erofs.freespace import Space
from obdlab.volumes.noting import NotedDisk
from tests.devices.blobs import MemoryWritable
from tests.image.trees import cached as cached_and_checked
from tests.image.trees import checked
from tests.layers.golden import TURBO
from tests.registry.faulty import faulty_registry

SIZE = 300 << 10
CONTENT = random.Random(1).randbytes(SIZE // 2) * 2

#: Tested where they are: containerd's blobs need containerd, _Origin adds only its close to RemoteBlob, and a
#: LostImage fails every read.
ELSEWHERE = {
    "obdlab.convert.endpoints.containerdimages._StoredBlob",
    "obdlab.image.remote._Origin",
    "obdlab.server.tcmu.server.LostImage",
}
KEEPING = CachedBlob | CheckedBlob | WholeBlob | registryimages._Recent | GzipTarget | SummedTar | ZstdTarget


class Bottom(MemoryBlob):
    """Bytes far away, with a link, counters and streams; counts, and notes what is read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, "bottom")
        self.reads: list[tuple[int, int]] = []
        self.evicted: list[tuple[int, int]] = []
        self.calls: list[Call | None] = []
        self.closed = 0
        self._link = Link()

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self.reads.append((offset, offset + length))
        self.calls.append(call)
        return super().read_at(offset, length, call)

    def stream(self, offset: int, length: int, call: Call | None = None) -> ByteStream:
        return Coming(self, offset)

    @property
    def link(self) -> LinkSpeed:
        return self._link

    def statistics(self) -> dict[str, int]:
        return {"reads": len(self.reads)}

    def evict(self, offset: int, length: int) -> None:
        self.evicted.append((offset, offset + length))

    def close(self) -> None:
        self.closed += 1


class Coming:
    """A stream of the bottom."""

    def __init__(self, blob: Bottom, position: int) -> None:
        self._blob = blob
        self.position = position

    def read(self, length: int, call: Call | None = None) -> bytes:
        data = self._blob.read_at(self.position, length)
        self.position += length
        return data

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Case:
    """A blob and what it holds. ``bottom`` is the end of its chain, if that is known."""

    blob: Blob
    content: bytes
    bottom: Bottom | None = None


Make = Callable[[Path, ExitStack], Case]


def layer_file(directory: Path, packing: Packing) -> bytes:
    with AppendUpper.create(directory / "data", directory / "index", SIZE) as upper:
        upper.write_at(0, CONTENT)
        write_layer(upper, directory / "layer", packing)
    return (directory / "layer").read_bytes()


def memory(_: Path, __: ExitStack) -> Case:
    return Case(MemoryBlob(CONTENT), CONTENT)


def wrapper(_: Path, __: ExitStack) -> Case:
    bottom = Bottom(CONTENT)
    return Case(Wrapper(Wrapper(bottom)), CONTENT, bottom)


def writable_wrapper(_: Path, __: ExitStack) -> Case:
    blob = MemoryWritable(SIZE)
    blob.write_at(0, CONTENT)
    return Case(WritableWrapper(blob), CONTENT)


def watched(_: Path, __: ExitStack) -> Case:
    bottom = Bottom(CONTENT)
    return Case(recorder.Recorder().watched(3, bottom), CONTENT, bottom)


def noted(_: Path, __: ExitStack) -> Case:
    bottom = Bottom(CONTENT)
    return Case(NotedDisk(bottom, lambda begin, end: None), CONTENT, bottom)


def recent(_: Path, __: ExitStack) -> Case:
    bottom = Bottom(CONTENT)
    return Case(registryimages._Recent(bottom), CONTENT, bottom)


def local_file(directory: Path, _: ExitStack) -> Case:
    (directory / "file").write_bytes(CONTENT)
    return Case(LocalFile(directory / "file"), CONTENT)


def layers_own_file(directory: Path, _: ExitStack) -> Case:
    (directory / "file").write_bytes(CONTENT)
    return Case(LayerFile(directory / "file", os.O_RDONLY), CONTENT)


def in_a_tar(directory: Path, _: ExitStack) -> Case:
    bottom = Bottom(layer_file(directory, Packing("lz4", tar=True)))
    with tarfile.open(directory / "layer") as tar:
        content = tar.extractfile(tar.getmembers()[0])
        assert content is not None
        return Case(open_tarwrap(bottom), content.read(), bottom)


def zfile(directory: Path, _: ExitStack) -> Case:
    layer = layer_file(directory, Packing(""))
    (directory / "again").mkdir()
    bottom = Bottom(layer_file(directory / "again", Packing("zstd", 4096)))
    return Case(open_zfile(bottom), layer, bottom)


def wrapped_zfile_in_a_tar(directory: Path, _: ExitStack) -> Case:
    layer = layer_file(directory, Packing(""))
    (directory / "again").mkdir()
    bottom = Bottom(layer_file(directory / "again", Packing("lz4", 4096, tar=True)))
    return Case(Wrapper(open_zfile(Wrapper(open_tarwrap(Wrapper(bottom))))), layer, bottom)


def gzip_target(_: Path, __: ExitStack) -> Case:
    bottom = Bottom((TURBO / "l2.tar.gz").read_bytes())
    content = gzip.decompress((TURBO / "l2.tar.gz").read_bytes())
    return Case(GzipTarget(bottom, LocalFile(TURBO / "l2.gzip.meta")), content, bottom)


def zstd_target(_: Path, __: ExitStack) -> Case:
    frames = [CONTENT[at : at + 140_000] for at in range(0, len(CONTENT), 140_000)]
    stored = b"".join(zstandard.ZstdCompressor(write_checksum=True).compress(each) for each in frames)
    bottom = Bottom(stored)
    writer = ZstdIndexWriter()
    assert b"".join(writer.decompressed(io.BytesIO(stored))) == CONTENT
    return Case(ZstdTarget(bottom, MemoryBlob(writer.to_bytes())), CONTENT, bottom)


def summed_tar(directory: Path, _: ExitStack) -> Case:
    bottom = Bottom(CONTENT)
    sums = TarSums(64 << 10)
    assert b"".join(sums.passing([CONTENT])) == CONTENT
    return Case(SummedTar(bottom, MemoryBlob(sums.to_bytes()), SpanCache()), CONTENT, bottom)


def cached(directory: Path, _: ExitStack) -> Case:
    bottom = Bottom(CONTENT)
    cache = BlockCache(directory / "cache", unit=4096, readahead_max=0)
    return Case(cache.open(bottom, digest_of(CONTENT)), CONTENT, bottom)


def whole_if_it_must_be(directory: Path, opened: ExitStack) -> Case:
    case = cached(directory, opened)
    assert isinstance(case.blob, CachedBlob)
    blob = WholeBlob(case.blob, case.blob, lambda: pytest.fail("not asked for"), deadline_s=1, most=0)
    return Case(blob, CONTENT, case.bottom)


def with_a_hash_tree(_: Path, __: ExitStack) -> Case:
    bottom = Bottom(CONTENT)
    return Case(checked(bottom, CONTENT), CONTENT, bottom)


def cached_with_a_hash_tree(directory: Path, _: ExitStack) -> Case:
    bottom = Bottom(CONTENT)
    return Case(cached_and_checked(directory / "cache", bottom, CONTENT), CONTENT, bottom)


def remote(_: Path, opened: ExitStack) -> Case:
    registry = opened.enter_context(faulty_registry())
    client = opened.enter_context(closing(RegistryClient()))
    digest = registry.add_blob(CONTENT)
    return Case(RemoteBlob(client, registry.repository(), digest, SIZE), CONTENT)


def stack(directory: Path, _: ExitStack) -> Case:
    layer = open_layer(MemoryBlob(layer_file(directory, Packing("zstd", 4096))))
    return Case(Stack([layer]), CONTENT)


def disk(directory: Path, _: ExitStack) -> Case:
    layer_file(directory, Packing())
    return Case(obdlab.open_stack([directory / "layer"]), CONTENT)


def image(directory: Path, _: ExitStack) -> Case:
    layer = open_layer(MemoryBlob(layer_file(directory, Packing("zstd", 4096))))
    return Case(Image([layer], lambda: {"requests": 3}), CONTENT)


def writable_stack(directory: Path, _: ExitStack) -> Case:
    lowers = stack(directory, _).blob
    assert isinstance(lowers, Stack)
    upper = SparseUpper.create(directory / "sparse", SIZE, index_path=directory / "sparse-index")
    return Case(WritableStack(lowers, upper), CONTENT)


def writable_image(directory: Path, _: ExitStack) -> Case:
    lowers = stack(directory, _).blob
    assert isinstance(lowers, Stack)
    upper = SparseUpper.create(directory / "sparse", SIZE, index_path=directory / "sparse-index")
    return Case(WritableImage(lowers, upper, dict), CONTENT)


def space_of_erofs(_: Path, __: ExitStack) -> Case:
    blob = MemoryWritable(SIZE)
    blob.write_at(0, CONTENT)
    return Case(Space(blob, 0), CONTENT)


def warp_file(_: Path, __: ExitStack) -> Case:
    own, target = CONTENT[:5000], CONTENT[5000:]
    return Case(WarpFile(MemoryBlob(own), MemoryBlob(target)), own + bytes(120) + target)


def raw_file(directory: Path, _: ExitStack) -> Case:
    (directory / "raw").write_bytes(CONTENT)
    return Case(RawFile(directory / "raw"), CONTENT)


class Shared:
    """An agent's blob, its pieces of 10,000 bytes from a peer."""

    wanted = SimpleNamespace(name="shared")
    size = SIZE

    def read(self, begin: int, end: int, hops: tuple[str, ...], patience_s: float) -> Iterator[tuple[bytes, str]]:
        assert patience_s > 0
        for at in range(begin, end, 10_000):
            yield CONTENT[at : min(end, at + 10_000)], "peer"

    def drop(self, begin: int, end: int) -> None:
        assert 0 <= begin < end <= SIZE

    def release(self) -> None:
        pass


def shared_file(_: Path, __: ExitStack) -> Case:
    return Case(SharedFile(cast("SharedBlob", Shared()), 60.0), CONTENT)


def target_disk(directory: Path, _: ExitStack) -> Case:
    disk = TargetDisk(None, SparseUpper.create(directory / "sparse", SIZE))
    disk.write_at(0, CONTENT)
    return Case(disk, CONTENT)


CASES: list[Make] = [
    memory,
    wrapper,
    writable_wrapper,
    watched,
    noted,
    recent,
    whole_if_it_must_be,
    local_file,
    layers_own_file,
    raw_file,
    shared_file,
    in_a_tar,
    zfile,
    wrapped_zfile_in_a_tar,
    gzip_target,
    zstd_target,
    summed_tar,
    cached,
    with_a_hash_tree,
    cached_with_a_hash_tree,
    remote,
    stack,
    disk,
    image,
    writable_stack,
    writable_image,
    warp_file,
    target_disk,
    space_of_erofs,
]


@pytest.fixture(params=CASES, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    with ExitStack() as opened:
        made = request.param(tmp_path, opened)
        yield made
        made.blob.close()


def ranges(size: int) -> list[tuple[int, int]]:
    chooser = random.Random(2)
    some = [sorted(chooser.sample(range(size + 1), 2)) for _ in range(20)]
    return [(0, 0), (size, size), (0, size), (0, 1), (size - 1, size), *((begin, end) for begin, end in some)]


def outside(size: int) -> list[tuple[int, int]]:
    return [(-1, 1), (0, size + 1), (size, 1), (10, -1)]


def test_any_range_is_read_and_nothing_outside(case: Case) -> None:
    assert case.blob.name
    assert case.blob.size == len(case.content)
    for begin, end in ranges(case.blob.size):
        assert case.blob.read_at(begin, end - begin) == case.content[begin:end], (begin, end)
    for offset, length in outside(case.blob.size):
        with pytest.raises((OutOfRangeError, ObdlabError)):
            case.blob.read_at(offset, length)


def test_a_buffer_is_filled_with_the_same_bytes(case: Case) -> None:
    for begin, end in ranges(case.blob.size):
        out = bytearray(b"\xa5" * (end - begin + 2))
        case.blob.read_into(begin, memoryview(out)[1:-1])
        assert out[1:-1] == case.content[begin:end], (begin, end)
        assert out[:1] == out[-1:] == b"\xa5"
    for offset, length in outside(case.blob.size)[:3]:
        with pytest.raises((OutOfRangeError, ObdlabError)):
            case.blob.read_into(offset, memoryview(bytearray(length)))


def test_a_wrapper_that_sees_reads_sees_those_into_buffers() -> None:
    seen = []

    class Seeing(Wrapper):
        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            seen.append((offset, length))
            return super().read_at(offset, length, call)

    Seeing(MemoryBlob(CONTENT)).read_into(5, memoryview(bytearray(7)))
    assert seen == [(5, 7)]


def test_the_terms_of_a_call_reach_the_bottom(case: Case) -> None:
    call = Call(time.monotonic() + 1000, on_wait=list)
    if case.bottom is None:
        assert case.blob.read_at(0, case.blob.size, call) == case.content
        return
    del case.bottom.calls[:]
    assert case.blob.read_at(0, case.blob.size, call) == case.content
    case.blob.read_into(4096, memoryview(bytearray(4096)), call)
    with suppress(ObdlabError):
        case.blob.read_at(1, 100, call)
    assert case.bottom.calls
    for got in case.bottom.calls:
        assert got is not None
        assert got.on_wait is call.on_wait
        assert got.deadline is not None
        assert got.deadline <= call.deadline


def test_ranges_below_are_those_that_are_read(case: Case) -> None:
    below = case.blob.below
    for begin, end in ranges(case.blob.size):
        first, last = case.blob.map_range(begin, end)
        assert 0 <= first <= last
        assert below is None or last <= below.size
    for offset, length in outside(case.blob.size):
        with pytest.raises(OutOfRangeError):
            case.blob.map_range(offset, offset + length)
    if case.bottom is None or isinstance(case.blob, KEEPING):  # these read whole units, and keep them
        return
    for begin, end in ranges(case.blob.size):
        del case.bottom.reads[:]
        case.blob.read_at(begin, end - begin)
        mapped = range_in(case.bottom, case.blob, begin, end)
        read = [each for each in case.bottom.reads if each[0] < each[1]]
        if begin < end:
            assert (min(first for first, _ in read), max(last for _, last in read)) == mapped


def test_streams_bring_the_same_bytes(case: Case) -> None:
    for begin, end in ranges(case.blob.size):
        if begin == end:
            continue
        stream = case.blob.stream(begin, end - begin)
        if stream is None:
            continue
        with closing(stream):
            assert stream.position == begin
            first = stream.read((end - begin) // 2)
            assert stream.position == begin + len(first)
            assert first + stream.read(end - begin - len(first)) == case.content[begin:end]
    for offset, length in outside(case.blob.size):
        if case.bottom is None:  # the bottom here takes any range
            with pytest.raises(OutOfRangeError):
                case.blob.stream(offset, length)


def test_link_and_counters_are_those_of_the_chain(case: Case) -> None:
    counters = case.blob.statistics()
    assert all(isinstance(value, int) for value in counters.values())
    if case.bottom is not None:
        assert case.blob.link is case.bottom.link
        assert list(chain(case.blob))[-1] is case.bottom
        assert find(case.blob, Bottom) is case.bottom
        assert "reads" in counters or "hits" in counters
    elif find(case.blob, RemoteBlob) is None:
        assert case.blob.link is None


def test_evicting_reaches_the_bottom_and_loses_nothing(case: Case) -> None:
    size = case.blob.size
    case.blob.evict(0, size)
    if case.bottom is not None:
        begin, end = range_in(case.bottom, case.blob, 0, size)
        assert (begin, end) in case.bottom.evicted
    assert case.blob.read_at(0, size) == case.content


def test_closing_twice_is_allowed_and_closes_the_bottom(case: Case) -> None:
    case.blob.close()
    case.blob.close()
    if case.bottom is not None:
        assert case.bottom.closed >= 1


def test_what_is_written_is_read(case: Case) -> None:
    blob = case.blob
    if not isinstance(blob, WritableBlob):
        return
    blob.write_at(4096, b"x" * 4096)
    blob.discard(16384, 4096)
    blob.flush()
    wanted = bytearray(case.content)
    wanted[4096:8192] = b"x" * 4096
    wanted[16384:20480] = bytes(4096)
    assert blob.read_at(0, blob.size) == bytes(wanted)


def test_every_implementation_is_here(tmp_path: Path) -> None:
    found = set()
    for info in pkgutil.walk_packages(obdlab.__path__, "obdlab."):
        if info.name.endswith("__main__") or "._pb" in info.name:
            continue
        module = importlib.import_module(info.name)
        for _, one in inspect.getmembers(module, inspect.isclass):
            if issubclass(one, Blob) and one.__module__ == info.name and not inspect.isabstract(one):
                found.add(one)
    covered = set()
    for make in CASES:
        directory = tmp_path / make.__name__
        directory.mkdir()
        with ExitStack() as opened:
            made = make(directory, opened)
            covered |= {type(blob) for blob in chain(made.blob)}
            made.blob.close()
    missing = {f"{one.__module__}.{one.__qualname__}" for one in found - covered}
    assert missing == ELSEWHERE


def test_a_target_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="not below it"):
        range_in(MemoryBlob(b""), Wrapper(MemoryBlob(b"abc", "other")), 0, 1)
