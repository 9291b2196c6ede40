"""A blob with a hash tree never returns a wrong byte, whatever origin, tree file and cache files hold."""

from __future__ import annotations

import random
import threading
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.cache.layout import HEADER_SIZE, unit_sums
from obdlab.call import Call
from obdlab.errors import CorruptBlobError, ObdlabError, SourceError
from obdlab.formats.hashtree import NODE_SPAN, UNIT, HashTree
from obdlab.formats.oci import digest_of
from obdlab.image.checkedblob import CheckedBlob
from obdlab.image.treenodes import KeptNodes, TreeNodes
from obdlab.observe.counters import counted
from tests.cache.origin import wait_until
from tests.image.trees import Origin, cached, checked, content, flipped, forged, same_crc, tree_of

SMALL = content(3000)  # one unit, without a file
TWO = content(UNIT + 300)
#: 20 MiB: three nodes, and one above them.
LARGE = content(20 << 20)


@pytest.fixture(scope="module")
def large_tree() -> HashTree:
    return tree_of(LARGE)


def test_every_flipped_bit_of_a_blob_of_one_unit_is_refused() -> None:
    for bit in range(8 * len(SMALL)):
        with closing(checked(Origin(SMALL, flipped(bit)), SMALL)) as blob, pytest.raises(CorruptBlobError):
            blob.read_at(0, 1)


def test_every_flipped_bit_of_a_second_unit_and_of_the_tree_is_refused() -> None:
    tree = tree_of(TWO)
    for bit in range(8 * UNIT, 8 * len(TWO)):
        blob = checked(Origin(TWO, flipped(bit)), TWO, tree=tree)
        assert blob.read_at(5, 100) == TWO[5:105]  # the first unit is right
        with pytest.raises(CorruptBlobError, match=f"manifest at offset {UNIT}"):
            blob.read_at(UNIT + 299, 1)
    for bit in range(8 * len(tree.file)):
        blob = checked(Origin(TWO), TWO, Origin(tree.file, flipped(bit)), tree)
        with pytest.raises(CorruptBlobError, match="hash tree does not match its root"):
            blob.read_at(0, len(TWO))


def test_random_flipped_bits_of_a_large_blob_are_refused_or_fetched_again(large_tree: HashTree) -> None:
    choose = random.Random(6)
    for number in range(300):
        bit = choose.randrange(8 * len(LARGE))
        origin = Origin(LARGE, flipped(bit), heals=number % 2 == 1)
        blob = checked(origin, LARGE, tree=large_tree)
        offset = max(0, bit // 8 - choose.randrange(3 * UNIT))
        length = min(len(LARGE), bit // 8 + 1 + choose.randrange(3 * UNIT)) - offset
        if origin.heals:
            assert blob.read_at(offset, length) == LARGE[offset : offset + length]
            assert blob.wrong_units == 1
        else:
            with pytest.raises(CorruptBlobError):
                blob.read_at(offset, length)
        begin = bit // 8 - bit // 8 % UNIT
        assert set(origin.evicted) == {(begin, UNIT)}


def test_random_flipped_bits_of_a_large_tree_are_refused_or_fetched_again(large_tree: HashTree) -> None:
    choose = random.Random(7)
    for number in range(200):
        file = Origin(large_tree.file, flipped(choose.randrange(8 * len(large_tree.file))), heals=number % 2 == 1)
        blob = checked(Origin(LARGE), LARGE, file, large_tree)
        offset = choose.randrange(len(LARGE) - 100)
        try:
            assert blob.read_at(offset, 100) == LARGE[offset : offset + 100]
        except CorruptBlobError:
            assert not file.heals
        for span in range(3):  # all nodes
            try:
                blob.read_at(span * NODE_SPAN, 1)
            except CorruptBlobError:
                assert not file.heals
                break
        else:
            assert file.heals


def test_swapped_units_are_refused(large_tree: HashTree) -> None:
    choose = random.Random(8)
    for _ in range(40):
        one, other = choose.sample(range(len(LARGE) // UNIT), 2)
        wrong = LARGE[other * UNIT : (other + 1) * UNIT]
        with pytest.raises(CorruptBlobError):
            checked(Origin(LARGE, forged(one * UNIT, wrong)), LARGE, tree=large_tree).read_at(one * UNIT + 1, 4)


def test_swapped_nodes_are_refused(large_tree: HashTree) -> None:
    file = large_tree.file
    swapped = file[UNIT : 2 * UNIT] + file[:UNIT] + file[2 * UNIT :]
    shifted = LARGE[NODE_SPAN : 2 * NODE_SPAN] + LARGE[:NODE_SPAN] + LARGE[2 * NODE_SPAN :]
    with pytest.raises(CorruptBlobError, match="does not match its root"):
        checked(Origin(shifted), LARGE, Origin(swapped), large_tree).read_at(0, 100)


@pytest.mark.parametrize("foreign", [content(len(TWO) - 1), content(len(TWO) + 1), content(UNIT * 5)], ids=len)
def test_a_foreign_tree_vouches_for_nothing(foreign: bytes) -> None:
    tree, other = tree_of(TWO), tree_of(foreign)
    size = len(tree.file)
    file = other.file[:size].ljust(size, b"\0")
    with pytest.raises(CorruptBlobError, match="does not match its root"):
        checked(Origin(foreign.ljust(len(TWO), b"\0")), TWO, Origin(file), tree).read_at(0, 1)
    # A right tree, of another blob, under this blob's digest: its root does not cover that.
    with pytest.raises(CorruptBlobError):
        checked(Origin(TWO), TWO, Origin(file), HashTree(other.root, file)).read_at(0, 1)


def test_a_root_is_of_one_digest_and_size() -> None:
    for data in (SMALL[:-1], SMALL + b"\0", bytes(len(SMALL))):
        with pytest.raises(CorruptBlobError):
            checked(Origin(data), data, tree=tree_of(SMALL)).read_at(0, 1)


class Withheld(MemoryBlob):
    """Not there."""

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        raise SourceError("registry answered 404", blob="tree")


def test_a_withheld_tree_is_an_error_that_names_the_cause() -> None:
    blob = checked(Origin(TWO), TWO, Withheld(tree_of(TWO).file))
    with pytest.raises(SourceError, match=r"layer: bytes cannot be checked without their hash tree: .*answered 404"):
        blob.read_at(0, 1)


def test_a_cut_off_tree_is_an_error() -> None:
    tree = tree_of(TWO)
    for length in range(0, len(tree.file), 7):
        with pytest.raises(ObdlabError):
            checked(Origin(TWO), TWO, MemoryBlob(tree.file[:length]), tree).read_at(0, 1)


def test_a_short_answer_is_an_error() -> None:
    with pytest.raises(SourceError, match="short read"):
        checked(Origin(TWO, lambda _, data: data[:-1]), TWO).read_at(0, 1)


def test_wrong_units_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    before = counted()
    blob = checked(Origin(TWO, flipped(8 * UNIT), heals=True), TWO)
    assert blob.read_at(0, len(TWO)) == TWO
    assert blob.wrong_units == 1
    after = counted()
    for family in ("checksum_failures", "corruptions_healed"):
        assert after[family]["tree"] == before.get(family, {}).get("tree", 0) + 1
    assert f"origin: bytes do not match the hash tree of the manifest at offset {UNIT}" in caplog.text


def test_a_wrong_node_is_read_again_past_the_cache(large_tree: HashTree) -> None:
    """Other threads' requests to the same mirror may be under way, and the cache shares them."""
    origin = Origin(large_tree.file)
    file = MemoryBlob(flipped(9)(0, large_tree.file))
    nodes = TreeNodes("layer", digest_of(LARGE), len(LARGE), large_tree.reference, file, KeptNodes(), origin)
    blob = CheckedBlob(Origin(LARGE), nodes)
    assert blob.read_at(0, 100) == LARGE[:100]
    assert origin.reads


# -- requests --------------------------------------------------------------------------------------------------------


def test_reads_are_widened_to_units_and_stay_one_request(large_tree: HashTree) -> None:
    origin = Origin(LARGE)
    blob = checked(origin, LARGE, tree=large_tree)
    assert blob.read_at(UNIT + 1, 3 * UNIT) == LARGE[UNIT + 1 : 4 * UNIT + 1]
    assert blob.read_at(len(LARGE) - 1, 1) == LARGE[-1:]
    assert origin.reads == [(UNIT, 4 * UNIT), (len(LARGE) - UNIT, UNIT)]


def test_a_node_is_fetched_once_for_8_mib(large_tree: HashTree) -> None:
    file = Origin(large_tree.file)
    blob = checked(Origin(LARGE), LARGE, file, large_tree)
    choose = random.Random(9)
    for _ in range(100):
        blob.read_at(choose.randrange(NODE_SPAN), 1)
    # The first node and the one above; a thread may fetch them at the same time.
    assert 1 <= len(file.reads) <= 4
    assert all(length <= len(large_tree.file) for _, length in file.reads)


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_returns_checked_bytes_by_one_request(large_tree: HashTree) -> None:
    origin = Origin(LARGE)
    blob = checked(origin, LARGE, tree=large_tree)
    stream = blob.stream(1000, len(LARGE) - 2000)
    assert stream is not None
    choose = random.Random(10)
    data = b""
    while len(data) < len(LARGE) - 2000:
        data += stream.read(min(choose.choice([1, 500, UNIT, 100_000, 1 << 20]), len(LARGE) - 2000 - len(data)))
        assert stream.position == 1000 + len(data)
    assert data == LARGE[1000:-1000]
    assert origin.streams == [(0, len(LARGE))]
    assert not origin.reads
    with pytest.raises(ValueError, match="past the end"):
        stream.read(1)


def test_a_stream_ends_before_a_wrong_unit(large_tree: HashTree) -> None:
    at = 10 * UNIT + 77
    origin = Origin(LARGE, flipped(8 * at))
    blob = checked(origin, LARGE, tree=large_tree)
    stream = blob.stream(0, len(LARGE))
    assert stream is not None
    assert stream.read(10 * UNIT) == LARGE[: 10 * UNIT]
    with pytest.raises(CorruptBlobError):
        stream.read(1)
    assert origin.evicted == [(10 * UNIT, UNIT)]
    assert blob.wrong_units == 1


# -- the cache's files -----------------------------------------------------------------------------------------------


def files_of(directory: Path, data: bytes) -> Path:
    found = list(directory.glob(f"blobs/*/{digest_of(data)}"))
    assert [path.parent.name for path in found] == [f"tree+{tree_of(data).root.removeprefix('sha256:')}"]
    return found[0]


def read_twice(blob: CachedBlob, data: bytes) -> None:
    for _ in range(2):
        assert blob.read_at(0, len(data)) == data


def test_every_flipped_bit_of_a_cache_file_is_found_while_it_is_open(tmp_path: Path) -> None:
    origin = Origin(SMALL)
    with cached(tmp_path, origin, SMALL) as blob:
        read_twice(blob, SMALL)
        with (files_of(tmp_path, SMALL) / "data").open("r+b", buffering=0) as file:
            for bit in range(8 * len(SMALL)):
                file.seek(bit // 8)
                file.write(bytes([SMALL[bit // 8] ^ 1 << bit % 8]))
                assert blob.read_at(bit // 8, 1) == SMALL[bit // 8 : bit // 8 + 1]
    assert len(origin.reads) == 1 + 8 * len(SMALL)


def forge_files(directory: Path, offset: int, data: bytes) -> None:
    """Store other units with right sums, as a process without the tree would have done."""
    with (directory / "data").open("r+b") as file:
        file.seek(offset)
        file.write(data)
    with (directory / "sums").open("r+b") as file:
        for start in range(0, len(data), UNIT):
            file.seek(HEADER_SIZE + (offset + start) // 4096 * 4)
            file.write(unit_sums(data[start : start + UNIT]).tobytes())


def test_forged_cache_files_with_right_sums_are_fetched_again(tmp_path: Path) -> None:
    data = content(5 * UNIT + 9)
    with cached(tmp_path, Origin(data), data, extent=UNIT) as blob:
        read_twice(blob, data)
    wrong = content(2 * UNIT)
    forge_files(files_of(tmp_path, data), UNIT, wrong)
    assert wrong in (files_of(tmp_path, data) / "data").read_bytes()
    origin = Origin(data)
    with cached(tmp_path, origin, data) as blob:
        read_twice(blob, data)
        assert blob.counters.corrupt_units == 2
    assert sum(length for _, length in origin.reads) == 2 * UNIT
    assert (files_of(tmp_path, data) / "data").read_bytes() == data


def test_cache_files_of_another_user_are_checked_at_each_use(tmp_path: Path) -> None:
    data = content(3 * UNIT)
    with cached(tmp_path, Origin(data), data) as blob:
        read_twice(blob, data)
    files = files_of(tmp_path, data)
    with cached(tmp_path, Origin(data), data) as blob:
        blob._files.attached, blob._files.read_only = False, True  # as they are opened without the right to write
        read_twice(blob, data)
        # With the sums that this process has seen: a comparison of CRCs does not find it.
        wrong = same_crc(data[:4096]) + data[4096:UNIT]
        assert unit_sums(wrong) == unit_sums(data[:UNIT])
        assert wrong != data[:UNIT]
        forge_files(files, 0, wrong)
        read_twice(blob, data)


def test_wrong_units_are_not_stored(tmp_path: Path) -> None:
    data = content(40 * UNIT)
    origin = Origin(data, flipped(8 * 7 * UNIT))
    with cached(tmp_path, origin, data) as blob:
        with pytest.raises(CorruptBlobError):
            blob.read_at(7 * UNIT, 1)
        with pytest.raises(CorruptBlobError):
            blob.fetch_in_background(0, 40)
        with pytest.raises(CorruptBlobError):
            blob.prefetch(4, 9)
        pieces = blob.pieces_ahead(0, 40)
        with pytest.raises(CorruptBlobError):
            all(iter(pieces.fetch_next, False))
        pieces.close()
        assert not blob._files.present(7, 8)[0]
        assert blob.read_at(0, 7 * UNIT) == data[: 7 * UNIT]
        origin.change = None
        assert blob.read_at(0, len(data)) == data


def test_readers_without_the_tree_have_files_of_their_own(tmp_path: Path) -> None:
    data = content(3 * UNIT)
    with BlockCache(tmp_path).open(Origin(data, flipped(9)), digest_of(data)) as unchecked:
        assert unchecked.read_at(0, 2) != data[:2]
    with cached(tmp_path, Origin(data), data) as blob:
        read_twice(blob, data)


@pytest.mark.parametrize("unit", [4096, UNIT, 4 * UNIT])
def test_any_unit_of_the_cache_works(tmp_path: Path, unit: int) -> None:
    data = content(9 * UNIT + 5000)
    origin = Origin(data)
    with cached(tmp_path, origin, data, unit=unit) as blob:
        assert blob.read_at(4097, 10) == data[4097:4107]
        assert origin.reads == [(0, max(unit, UNIT))]
        read_twice(blob, data)
    with cached(tmp_path, origin, data, unit=unit) as blob:
        read_twice(blob, data)
    assert sum(length for _, length in origin.reads) == len(data)


def test_the_nodes_of_many_layers_are_fetched_at_once_and_each_once(large_tree: HashTree) -> None:
    class Waiting(Origin):
        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            together.wait(60)
            return super().read_at(offset, length, call)

    together = threading.Barrier(20)
    files = [Waiting(large_tree.file) for _ in range(20)]
    layers = [
        TreeNodes("layer", digest_of(LARGE), len(LARGE), large_tree.reference, file, KeptNodes()) for file in files
    ]
    for _ in range(3):  # as the beginning of a layer and its end are read
        for layer in layers:
            layer.request(0, len(LARGE))
    wait_until(lambda: all(file.reads for file in files) and not any(layer._requested for layer in layers))
    for layer in layers:
        assert layer.first_wrong(0, LARGE[:UNIT]) is None
    assert all(len(file.reads) == 1 for file in files)
