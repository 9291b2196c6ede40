"""The block cache: right bytes whatever is read, from whatever kind of origin."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import Blob, MemoryBlob
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.layout import SEED
from obdlab.call import Call
from obdlab.errors import FormatError, OutOfRangeError, SourceError
from obdlab.formats.oci import digest_of
from obdlab.registry.link import Link
from tests.cache.origin import DATA, DIGEST, UNIT, Origin, open_cached, wait_until

_READS = st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 10 * UNIT)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(reads=_READS, unit_shift=st.integers(12, 15), readahead=st.sampled_from([0, UNIT, 1 << 16]))
def test_any_reads_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, reads: list[tuple[int, int]], unit_shift: int, readahead: int
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    for _ in range(2):  # then again, from the files
        with open_cached(directory, Origin(), unit=1 << unit_shift, readahead_max=readahead) as blob:
            assert blob.size == len(DATA)
            for offset, length in reads:
                length = min(length, len(DATA) - offset)
                assert blob.read_at(offset, length) == DATA[offset : offset + length]


def test_missing_units_are_asked_for_once_and_together(tmp_path: Path) -> None:
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(UNIT + 5, 3 * UNIT) == DATA[UNIT + 5 : 4 * UNIT + 5]
        assert origin.reads == [(UNIT, 4 * UNIT)]
        blob.read_at(0, 8 * UNIT)
        assert origin.reads[1:] == [(0, UNIT), (5 * UNIT, 3 * UNIT)]
        blob.read_at(len(DATA) - 1, 1)
        assert origin.reads[3:] == [(40 * UNIT, 123)]
        blob.read_at(0, 8 * UNIT)
        assert len(origin.reads) == 4
        assert blob.statistics() | {"hits": 1, "misses": 3, "requests": 4} == blob.statistics()
        assert blob.statistics()["demand_bytes"] == 8 * UNIT + 123


def test_a_miss_fetches_what_is_missing_of_its_extent(tmp_path: Path) -> None:
    origin = Origin()
    with open_cached(tmp_path, origin, extent=8 * UNIT) as blob:
        blob.read_at(20 * UNIT, UNIT)
        assert origin.reads == [(20 * UNIT, UNIT)]  # while the image is being opened
        blob.opened(60.0)
        blob.read_at(3 * UNIT, 10)
        blob.read_at(7 * UNIT, 2 * UNIT)
        blob.read_at(22 * UNIT, 1)
        blob.read_at(len(DATA) - 1, 1)
        assert origin.reads[1:] == [(0, 8 * UNIT), (8 * UNIT, 8 * UNIT), (21 * UNIT, 3 * UNIT), (40 * UNIT, 123)]
        assert blob.read_at(0, 16 * UNIT) == DATA[: 16 * UNIT]
        assert blob.read_at(20 * UNIT, 4 * UNIT) == DATA[20 * UNIT : 24 * UNIT]
        assert len(origin.reads) == 5


def test_an_extent_follows_the_link(tmp_path: Path) -> None:
    class FarOrigin(Origin):
        link = Link()

    origin = FarOrigin()
    origin.link.wait_s, origin.link.bytes_per_wait = 1.0, 100.0 * UNIT
    with open_cached(tmp_path, origin, extent=2 * UNIT, extent_max=8 * UNIT) as blob:
        blob.read_at(39 * UNIT, 1)  # while the image is being opened
        blob.opened(60.0)
        # Aligned like any.
        for bytes_per_wait, offset in (
            (0.0, 1),
            (1.5 * UNIT, 6),
            (100.0 * UNIT, 20),
            (100.0 * UNIT, 12),
            (0.1 * UNIT, 30),
        ):
            origin.link.bytes_per_wait = bytes_per_wait
            assert blob.read_at(offset * UNIT, UNIT) == DATA[offset * UNIT : (offset + 1) * UNIT]
    assert [(offset // UNIT, length // UNIT) for offset, length in origin.reads] == [
        (39, 1),
        (0, 2),
        (4, 4),
        (16, 8),
        (8, 8),
        (30, 1),
    ]


def test_without_a_largest_extent_the_link_changes_nothing(tmp_path: Path) -> None:
    class FarOrigin(Origin):
        link = Link()

    origin = FarOrigin()
    with open_cached(tmp_path, origin, extent=8 * UNIT, extent_max=0) as blob:
        blob.opened(60.0)
        origin.link.wait_s = 1.0
        for number, bytes_per_wait in enumerate((0.1 * UNIT, 100.0 * UNIT)):
            origin.link.bytes_per_wait = bytes_per_wait
            blob.read_at((8 * number + 3) * UNIT, UNIT)
    assert origin.reads == [(0, 8 * UNIT), (8 * UNIT, 8 * UNIT)]


def test_large_extents_make_no_stream_of_a_few_misses(tmp_path: Path) -> None:
    class FarOrigin(Origin):
        link = Link()

    data = random.Random(8).randbytes(200 * UNIT)
    origin = FarOrigin(data)
    origin.link.wait_s, origin.link.bytes_per_wait = 1.0, 100.0 * UNIT
    with open_cached(tmp_path, origin, extent=UNIT * 2, extent_max=8 * UNIT, readahead_max=64 * UNIT) as blob:
        blob.opened(60.0)
        for offset in range(0, 56 * UNIT, 8 * UNIT):
            blob.read_at(offset, UNIT)
        assert blob.statistics()["readahead_bytes"] == 0
        assert [offset // UNIT for offset, _ in origin.reads] == list(range(0, 56, 8))
        blob.read_at(56 * UNIT, UNIT)  # the eighth: whoever comes so far goes on
        wait_until(lambda: blob.statistics()["readahead_bytes"] > 0)


def test_whole_blob_cached_needs_no_origin(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, len(DATA))
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
        assert origin.reads == []
        assert blob.statistics() | {"hits": 1, "misses": 0} == blob.statistics()
    assert origin.closed == 1


def test_ranges_outside(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        for offset, length in [(-1, 1), (0, -1), (len(DATA), 1), (0, len(DATA) + 1), (-5, 10)]:
            with pytest.raises(OutOfRangeError):
                blob.read_at(offset, length)
        assert blob.read_at(len(DATA), 0) == b""


def test_empty_blob(tmp_path: Path) -> None:
    with BlockCache(tmp_path).open(MemoryBlob(b""), digest_of(b"")) as blob:
        assert blob.read_at(0, 0) == b""


def test_a_unit_of_zeros_is_cached_like_any_other(tmp_path: Path) -> None:
    origin = Origin(bytes(3 * UNIT))
    for _ in range(2):
        with BlockCache(tmp_path, unit=UNIT).open(origin, DIGEST) as blob:
            assert blob.read_at(0, 3 * UNIT) == bytes(3 * UNIT)
    assert len(origin.reads) == 1


def test_a_unit_with_the_checksum_0_is_cached_like_any_other(tmp_path: Path) -> None:
    content = DATA[: UNIT - 4]
    content += _four_bytes_to_crc_0(crc32c(content, SEED))
    assert crc32c(content, SEED) == 0
    origin = Origin(content)
    for _ in range(2):
        with BlockCache(tmp_path, unit=UNIT).open(origin, DIGEST) as blob:
            assert blob.read_at(0, UNIT) == content
            assert blob.read_at(5, 10) == content[5:15]
    assert origin.reads == [(0, UNIT)]


def _four_bytes_to_crc_0(crc: int) -> bytes:
    table = []
    for state in range(256):
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
        table.append(state)
    register = 0xFFFFFFFF  # of the CRC 0, which is its inverse; then four bytes back
    for _ in range(4):
        byte = next(number for number, entry in enumerate(table) if entry >> 24 == register >> 24)
        register = (register ^ table[byte]) << 8 & 0xFFFFFFFF | byte
    return (register ^ crc ^ 0xFFFFFFFF).to_bytes(4, "little")


@pytest.mark.parametrize(
    "digest", ["", "../../etc", "sha256:..", f"sha256:{'A' * 64}", f"sha256:{'a' * 63}/", "md5:00"]
)
def test_what_is_no_digest_becomes_no_path(tmp_path: Path, digest: str) -> None:
    with pytest.raises(FormatError):
        BlockCache(tmp_path / "cache").open(Origin(), digest)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unit", [0, -4096, 1024, 5000])
def test_unit_that_makes_no_sense(tmp_path: Path, unit: int) -> None:
    with pytest.raises(ValueError, match="cache unit"):
        BlockCache(tmp_path, unit=unit)


def test_no_thread_before_the_first_read(tmp_path: Path) -> None:
    before = threading.active_count()
    with open_cached(tmp_path, Origin(), readahead_max=1 << 20):
        assert threading.active_count() == before


# -- failing origins -------------------------------------------------------------------------------------------------


def test_error_of_the_origin_reaches_the_reader_and_is_not_kept(tmp_path: Path) -> None:
    def fail(offset: int, length: int) -> None:
        raise SourceError("out of order", blob="origin", offset=offset)

    origin = Origin(before=fail)
    with open_cached(tmp_path, origin) as blob:
        with pytest.raises(SourceError, match="out of order"):
            blob.read_at(0, 10)
        origin.before = None
        assert blob.read_at(0, 10) == DATA[:10]
        assert blob.statistics()["failed_requests"] == 1


def test_short_answer_of_the_origin_is_an_error(tmp_path: Path) -> None:
    class Short(Origin):
        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            return super().read_at(offset, length, call)[:-1]

    with open_cached(tmp_path, Short()) as blob, pytest.raises(SourceError, match="short read"):
        blob.read_at(UNIT, 10)


def test_waiting_for_another_threads_fetch_ends_at_the_deadline(tmp_path: Path) -> None:
    release = threading.Event()
    origin = Origin(before=lambda offset, length: release.wait(30) and None)
    blob = BlockCache(tmp_path, unit=UNIT, deadline_s=0.2).open(origin, DIGEST)
    first = threading.Thread(target=lambda: blob.read_at(0, 10))
    first.start()
    wait_until(lambda: origin.reads != [])
    with pytest.raises(SourceError, match="deadline") as caught:
        blob.read_at(5, 10)
    assert caught.value.temporary
    release.set()
    first.join()
    assert blob.read_at(5, 10) == DATA[5:15]
    blob.close()


def test_one_fetch_for_many_threads(tmp_path: Path) -> None:
    release = threading.Event()
    origin = Origin(before=lambda offset, length: release.wait(30) and None)
    waits = []
    with open_cached(tmp_path, origin) as blob:
        results = []

        def reader(number: int) -> None:
            call = Call(on_wait=lambda: waits.append(number))
            results.append(blob.read_at(100 + number, 50, call) == DATA[100 + number : 150 + number])

        threads = [threading.Thread(target=reader, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(set(waits)) == 6)  # all six said that they were about to wait
        release.set()
        for thread in threads:
            thread.join()
        assert results == [True] * 6
        assert origin.reads == [(0, UNIT)]


def test_a_hit_does_not_wait(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, UNIT)
        call = Call(on_wait=lambda: pytest.fail("a hit said that it would wait"))
        assert blob.read_at(10, 100, call) == DATA[10:110]


# -- read-ahead ------------------------------------------------------------------------------------------------------


def test_sequential_readers_find_their_data_there(tmp_path: Path) -> None:
    origin = Origin()
    with open_cached(tmp_path, origin, readahead_max=16 * UNIT) as blob:
        readers = [(0, 20 * UNIT), (20 * UNIT, len(DATA))]
        while readers:  # two interleaved streams
            offset, end = readers.pop(0)
            length = min(1000, end - offset)
            assert blob.read_at(offset, length) == DATA[offset : offset + length]
            if offset + length < end:
                readers.append((offset + length, end))
        counted = blob.statistics()
    assert counted["readahead_bytes"] > counted["demand_bytes"]
    assert counted["readahead_bytes"] + counted["demand_bytes"] == len(DATA)  # nothing twice
    assert sorted(origin.reads) == [(offset, length) for offset, length in sorted(set(origin.reads)) if length > 0]


def test_random_readers_pay_nothing(tmp_path: Path) -> None:
    data = bytes(2000 * UNIT)
    blob = BlockCache(tmp_path, unit=UNIT).open(Origin(data), DIGEST)
    generator = random.Random(11)
    for _ in range(200):
        blob.read_at(generator.randrange(2000) * UNIT, 100)
    counted = blob.statistics()  # type: ignore[attr-defined]
    assert counted["readahead_bytes"] < 0.2 * counted["demand_bytes"]
    blob.close()


def test_failing_read_ahead_leaves_no_trace(tmp_path: Path) -> None:
    main = threading.get_ident()

    def fail_in_background(offset: int, length: int) -> None:
        if threading.get_ident() != main:
            raise SourceError("background trouble", blob="origin", offset=offset, temporary=True)

    with open_cached(tmp_path, Origin(before=fail_in_background), readahead_max=8 * UNIT) as blob:
        for offset in range(0, len(DATA), 1000):
            length = min(1000, len(DATA) - offset)
            assert blob.read_at(offset, length) == DATA[offset : offset + length]


def test_closing_waits_for_no_one_and_breaks_nothing(tmp_path: Path) -> None:
    release = threading.Event()
    main = threading.get_ident()
    background = []

    def hold_background(offset: int, length: int) -> None:
        if threading.get_ident() != main:
            background.append(offset)
            release.wait(30)

    origin = Origin(before=hold_background)
    blob = open_cached(tmp_path, origin, readahead_max=8 * UNIT)
    blob.read_at(0, 3 * UNIT)
    blob.read_at(3 * UNIT, UNIT)
    wait_until(lambda: background != [])
    blob.close()
    blob.close()
    assert origin.closed == 0  # a fetch is still under way
    release.set()
    wait_until(lambda: origin.closed == 1)


def test_a_read_after_close_is_an_error(tmp_path: Path) -> None:
    blob = BlockCache(tmp_path).open(MemoryBlob(DATA), digest_of(DATA))
    blob.read_at(0, 100)
    blob.close()
    with pytest.raises(SourceError, match="read after close"):
        blob.read_at(0, 100)


def test_a_size_beyond_belief_is_not_cached(tmp_path: Path) -> None:
    class Huge(Blob):
        name = "huge"
        size = 1 << 44

        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            return b"x" * length

    with BlockCache(tmp_path).open(Huge(), digest_of(b"huge")) as blob:
        assert blob.read_at(1 << 43, 3) == b"xxx"
    assert not list(tmp_path.rglob("sums"))


def test_blobs_are_cached_up_to_a_size_together(tmp_path: Path) -> None:
    class Large(Blob):
        name = "large"
        size = 100 << 30

        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            return b"x" * length

    class Rest(Large):
        size = (256 << 30) - 2 * Large.size

        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            return b"y" * length

    # A table of 100 MiB each; written sums take space, and there is no need to have it.
    cache = BlockCache(tmp_path, unit=1 << 20)
    with ExitStack() as opened:
        for number in range(200):
            blob = opened.enter_context(cache.open(Large(), digest_of(b"%d" % number)))
            assert blob.read_at(99 << 30, 3) == b"xxx"
        assert len(list(tmp_path.rglob("sums"))) == 2
        rest = opened.enter_context(cache.open(Rest(), digest_of(b"rest")))  # fits exactly
        assert rest.read_at(5, 3) == b"yyy"
        assert len(list(tmp_path.rglob("sums"))) == 3


@pytest.mark.parametrize("state", ["some", "verified"])
@pytest.mark.parametrize("wanted", [len(DATA) - UNIT, len(DATA) + 1, 1, 1 << 40])
def test_what_is_known_of_a_digest_stays_when_a_label_says_another_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, state: str, wanted: int
) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        assert blob.read_at(0, len(DATA) if state == "verified" else UNIT)
        assert blob.verify() == (state == "verified")
    with BlockCache(tmp_path, unit=UNIT).open(Padded(wanted), DIGEST) as liar:
        assert liar.read_at(0, 1) == DATA[:1]
    assert wanted == 1 << 40 or f"got {wanted} bytes, wanted {len(DATA)}" in caplog.text
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(0, UNIT) == DATA[:UNIT]
        assert blob.verified == (state == "verified")
    assert not origin.reads


def test_a_wrong_size_of_which_nothing_came_is_forgotten(tmp_path: Path) -> None:
    BlockCache(tmp_path, unit=UNIT).open(Padded(len(DATA) + 100_000), DIGEST).close()
    with open_cached(tmp_path, Origin()) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
    assert not origin.reads


class Padded(Blob):
    """The blob as a label with another size would have it."""

    name = "padded"

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        return DATA[offset : offset + length].ljust(length, b"?")
