"""What every writable layer must do, in append mode and sparse."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from obdlab.blob import Buffer
from obdlab.errors import FormatError, OutOfRangeError, SourceError
from obdlab.formats.lsmt.index import HOLE
from obdlab.layers.layerfile import LayerFile
from obdlab.layers.lsmt import Layer, LsmtLayer
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.upper import open_upper
from obdlab.localfile import LocalFile
from tests.layers.golden import LSMT
from tests.layers.lsmt_samples import layer
from tests.layers.uppers import KINDS, Files

DISK = 1 << 20
UUID = "ABCDEF01-2345-6789-ABCD-EF0123456789"
PARENT = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(params=KINDS)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return Files.named(tmp_path, request.param)


def test_what_was_written_is_read_and_found_again(files: Files) -> None:
    with files.create(DISK) as upper:
        upper.write_at(4096, b"a" * 8192)
        upper.write_at(8192, memoryview(b"b" * 4096))
        upper.write_at(DISK - 512, bytearray(b"z" * 512))
        upper.flush()
        wanted = upper.read_at(0, DISK)
    assert wanted == bytes(4096) + b"a" * 4096 + b"b" * 4096 + bytes(DISK - 12288 - 512) + b"z" * 512
    with files.open() as upper:
        assert upper.read_at(0, DISK) == wanted
        assert upper.read_at(4000, 200) == bytes(96) + b"a" * 104
        assert upper.read_at(5, 0) == b""


def test_pieces_tell_what_is_held(files: Files) -> None:
    with files.create(DISK) as upper:
        upper.write_at(8192, b"x" * 4096)
        assert upper.read_held(0, 4096) == [(4096, None)]
        assert upper.read_held(8192, 4096) == [(4096, b"x" * 4096)]
        assert upper.read_held(8190, 8192) == [(2, None), (4096, b"x" * 4096), (4094, None)]
        assert [run[1:3] for run in upper.lookup(0, 64)] == [(16, HOLE), (8, 0), (40, HOLE)]
        upper.discard(8192, 4096)
        assert upper.read_held(8192, 4096) == [(4096, bytes(4096) if upper.discard_hides else None)]


def test_discarded_ranges_read_as_zeros(files: Files) -> None:
    with files.create(DISK) as upper:
        upper.write_at(0, b"x" * 65536)
        upper.discard(4096, 12288)
        upper.discard(0, 0)
        upper.write_at(8192, b"y" * 512)
        upper.flush()
    wanted = b"x" * 4096 + bytes(4096) + b"y" * 512 + bytes(7680) + b"x" * (65536 - 16384)
    with files.open() as upper:
        assert upper.read_at(0, 65536) == wanted


def test_identity(files: Files) -> None:
    with files.create(DISK, uuid=UUID.lower(), parent_uuid=PARENT, user_tag="mine") as upper:
        assert (upper.uuid, upper.parent_uuid, upper.user_tag, upper.virtual_size) == (UUID, PARENT, "mine", DISK)
    with files.open() as upper:
        assert (upper.uuid, upper.parent_uuid, upper.user_tag, upper.virtual_size) == (UUID, PARENT, "mine", DISK)
        sealable: Layer = upper
        assert sealable.index.end_sectors == 0


def test_one_opener_at_a_time(files: Files) -> None:
    with files.create(DISK):
        with pytest.raises(SourceError, match="in use by another opener") as caught:
            files.open()
        assert caught.value.temporary
        with pytest.raises(SourceError, match="in use by another opener"):
            open_upper(files.data, files.index, read_only=True)
    with (
        open_upper(files.data, files.index, read_only=True),
        open_upper(files.data, files.index, read_only=True),
        pytest.raises(SourceError, match="in use by another opener"),
    ):
        files.open()
    files.open().close()


def test_reading_only_changes_nothing(files: Files) -> None:
    with files.create(DISK) as upper:
        upper.write_at(4096, b"x" * 4096)
    before = (files.data.read_bytes(), files.index.read_bytes())
    with open_upper(files.data, files.index, read_only=True) as upper:
        assert upper.read_at(4096, 4096) == b"x" * 4096
        for call in (lambda: upper.write_at(0, bytes(512)), lambda: upper.discard(0, 512), upper.seal):
            with pytest.raises(SourceError, match="cannot be written"):
                call()
    assert (files.data.read_bytes(), files.index.read_bytes()) == before


def test_growth(files: Files) -> None:
    with files.create(0) as upper:
        assert upper.virtual_size == 0
        upper.write_at(4096, b"x" * 512)  # past the end
        assert upper.virtual_size == 4608
        with pytest.raises(OutOfRangeError, match="cannot shrink"):
            upper.set_virtual_size(512)
        for size in (DISK + 1, -512, 1 << 60):
            with pytest.raises(OutOfRangeError):
                upper.set_virtual_size(size)
        upper.set_virtual_size(DISK)
    with files.open() as upper:
        assert upper.virtual_size == DISK
        assert upper.read_at(0, 8192) == bytes(4096) + b"x" * 512 + bytes(3584)
        with pytest.raises(OutOfRangeError):
            upper.write_at(1 << 62, bytes(512))


def test_ranges_outside_are_refused(files: Files) -> None:
    with files.create(DISK) as upper:
        for call in (
            lambda: upper.write_at(-512, bytes(512)),
            lambda: upper.read_at(DISK - 1, 2),
            lambda: upper.read_at(-1, 1),
            lambda: upper.read_at(0, -1),
            lambda: upper.discard(0, DISK + 512),
            lambda: upper.discard(-512, 512),
        ):
            with pytest.raises(OutOfRangeError, match="range outside the disk"):
                call()


def test_files_do_not_stay_open(files: Files) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files.create(DISK).close()
    upper = files.open()
    upper.close()
    upper.close()
    with files.data.open("rb+"), files.index.open("rb+"):  # get the numbers that the layer had
        upper_calls = (lambda: upper.write_at(0, bytes(512)), lambda: upper.data.read_at(0, 1), upper.flush)
        for call in upper_calls:
            with pytest.raises(SourceError, match="layer file is closed"):
                call()
    upper = files.open()
    sealed = upper.seal()
    upper.retire()
    sealed.close()
    with pytest.raises(FormatError):
        files.open()
    with pytest.raises(SourceError):
        files.create(DISK)  # there already
    assert len(os.listdir("/proc/self/fd")) == before


def test_sealed_in_place(files: Files) -> None:
    upper = files.create(DISK, uuid=UUID, parent_uuid=PARENT, user_tag="t")
    upper.write_at(8192, b"x" * 5120)
    upper.write_at(9216, b"y" * 512)
    upper.discard(65536, 4096)
    wanted = upper.read_at(0, DISK)
    sealed = upper.seal()
    upper.retire()
    assert (sealed.uuid, sealed.parent_uuid, sealed.user_tag, sealed.virtual_size) == (UUID, PARENT, "t", DISK)
    assert sealed.sealed_in_place
    assert Stack([sealed]).read_at(0, DISK) == wanted
    assert upper.read_at(0, DISK) == wanted
    for call in (lambda: upper.write_at(0, bytes(512)), lambda: upper.discard(0, 512), upper.seal):
        with pytest.raises(SourceError, match="was sealed"):
            call()
    sealed.close()
    with pytest.raises(FormatError, match="was sealed"):
        files.open()


def test_a_seal_can_be_taken_back(files: Files) -> None:
    with files.create(DISK) as upper:
        upper.write_at(0, b"x" * 4096)
        size = files.data.stat().st_size
        upper.seal()
        assert files.data.stat().st_size > size
        upper.unseal()
        assert files.data.stat().st_size == size
        upper.write_at(4096, b"y" * 4096)
    with files.open() as upper:
        assert upper.read_at(0, 8192) == b"x" * 4096 + b"y" * 4096


def test_what_an_interrupted_seal_left_is_no_data(files: Files) -> None:
    with files.create(DISK) as upper:
        upper.write_at(0, b"x" * 4096)
    with files.data.open("ab") as file:
        file.write(b"index without a trailer" * 100)
    with files.open() as upper:
        upper.set_virtual_size(2 * DISK)
        assert upper.read_at(0, 2 * DISK) == b"x" * 4096 + bytes(2 * DISK - 4096)
        upper.write_at(8192, b"y" * 4096)
        wanted = upper.read_at(0, 2 * DISK)
        with Stack([upper.seal()]) as stack:
            assert stack.read_at(0, 2 * DISK) == wanted
            upper.retire()


def test_a_failed_write_does_not_spoil_the_seal(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.create(DISK) as upper:
        upper.write_at(0, b"x" * 4096)
        real = LayerFile.write_some

        def broken(file: LayerFile, offset: int, data: Buffer) -> int:
            if offset > 100_000:
                raise SourceError("broken", blob=file.name)
            return real(file, offset, memoryview(data)[:65536])

        with monkeypatch.context() as patch:
            patch.setattr(LayerFile, "write_some", broken)
            with pytest.raises(SourceError, match="broken"):
                upper.write_at(8192, b"y" * 262144)
        wanted = upper.read_at(0, DISK)
        with Stack([upper.seal()]) as stack:
            assert stack.read_at(0, DISK) == wanted
            upper.retire()


def test_an_empty_layer_can_be_sealed(files: Files) -> None:
    with files.create(DISK).seal() as sealed:
        assert len(sealed.index) == 0
        assert sealed.trailer.index_size == 0


def test_writers_and_readers_at_once(files: Files) -> None:
    with files.create(DISK) as upper:
        stop = threading.Event()
        wrong: list[bytes] = []

        def read() -> None:
            while not stop.is_set():
                data = upper.read_at(0, DISK)
                wrong.extend(
                    data[at : at + 4096] for at in range(0, DISK, 4096) if len(set(data[at : at + 4096])) != 1
                )

        def write(first: int) -> None:
            for turn in range(8):
                for block in range(first, DISK // 4096, 4):
                    upper.write_at(block * 4096, bytes([block % 200 + turn]) * 4096)
                upper.flush()

        reader = threading.Thread(target=read)
        writers = [threading.Thread(target=write, args=(first,)) for first in range(4)]
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join(60)
        stop.set()
        reader.join(60)
        wanted = b"".join(bytes([block % 200 + 7]) * 4096 for block in range(DISK // 4096))
        assert upper.read_at(0, DISK) == wanted
        assert files.kind == "sparse" or not wrong  # nothing in append mode is ever overwritten
    with files.open() as upper:
        assert upper.read_at(0, DISK) == wanted


def test_restack(files: Files, tmp_path: Path) -> None:
    lower = layer([(0, 64, False)], DISK, 3)
    stack = WritableStack(Stack([lower]), files.create(0, uuid=UUID))
    stack.write_at(100, b"first")
    fresh = Files.named(tmp_path, files.kind, "fresh")
    switched: list[bool] = []

    def switch() -> None:
        sealed = LsmtLayer(LocalFile(files.data))
        switched.append(sealed.uuid == UUID)
        sealed.close()

    before = stack.read_at(0, DISK)
    sealed = stack.restack(fresh.create(0, parent_uuid=UUID), switch).layer
    assert switched == [True]
    assert sealed.sealed_in_place
    assert stack.read_at(0, DISK) == before
    assert stack.lowers is not None
    assert stack.lowers.layers[1:] == (sealed,)
    stack.write_at(102, b"second")
    stack.discard(32768, 4096)
    wanted = bytearray(before)
    wanted[102:108] = b"second"
    wanted[32768:36864] = bytes(4096)
    assert stack.read_at(0, DISK) == wanted
    stack.close()
    assert not list(tmp_path.glob("*.restacking"))

    again = WritableStack(Stack([lower, LsmtLayer(LocalFile(files.data))]), fresh.open())
    assert again.read_at(0, DISK) == wanted
    with Stack(again.lowers.layers if again.lowers else ()) as snapshot:
        assert snapshot.read_at(0, DISK) == before
    again.close()


def test_restacks_under_load(files: Files, tmp_path: Path) -> None:
    stack = WritableStack(Stack([layer([(0, 64, False)], DISK, 3)]), files.create(0))
    before = stack.read_at(0, DISK)
    blocks = DISK // 4096
    last = [0] * blocks
    stop = threading.Event()
    failures: list[object] = []

    def work(first: int) -> None:
        try:
            turn = 0
            while not stop.is_set():
                turn = turn % 250 + 1
                for block in range(first, blocks, 3):
                    stack.write_at(block * 4096, bytes([turn]) * 4096)
                    last[block] = turn
                    if stack.read_at(block * 4096, 4096) != bytes([turn]) * 4096:
                        failures.append((block, turn))
                stack.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(6):
            kind = KINDS[number % 2]
            stack.restack(Files.named(tmp_path, kind, f"fresh{number}").create(0))
            stop.wait(0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures
    assert stack.lowers is not None
    assert len(stack.lowers.layers) == 7
    wanted = b"".join(
        bytes([value]) * 4096 if value else before[at * 4096 : at * 4096 + 4096] for at, value in enumerate(last)
    )
    assert stack.read_at(0, DISK) == wanted
    stack.close()


def test_a_restack_whose_switch_fails_changes_nothing(files: Files, tmp_path: Path) -> None:
    stack = WritableStack(None, files.create(DISK))
    stack.write_at(0, b"x" * 4096)
    fresh = Files.named(tmp_path, files.kind, "fresh").create(DISK)

    def switch() -> None:
        raise SourceError("no room for the configuration")

    with fresh, pytest.raises(SourceError, match="no room"):
        stack.restack(fresh, switch)
    stack.write_at(4096, b"y" * 4096)
    stack.close()
    assert not list(tmp_path.glob("*.restacking"))
    with files.open() as upper:
        assert upper.read_at(0, 8192) == b"x" * 4096 + b"y" * 4096


def test_a_seal_that_cannot_be_undone_is_undone_by_the_next_opening(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = WritableStack(None, files.create(DISK))
    stack.write_at(0, b"x" * 4096)
    fresh = Files.named(tmp_path, files.kind, "fresh").create(DISK)

    def fail(*_: object) -> None:
        raise SourceError("sick disk")

    with monkeypatch.context() as patched, fresh:
        patched.setattr(type(stack.upper), "unseal", fail)
        with pytest.raises(SourceError, match="sick disk"):
            stack.restack(fresh, fail)
        stack.close()
    assert list(tmp_path.glob("*.restacking"))
    with files.open() as upper:
        assert upper.read_at(0, 4096) == b"x" * 4096


def test_restack_wants_an_empty_layer_of_the_same_size(files: Files, tmp_path: Path) -> None:
    stack = WritableStack(None, files.create(DISK))
    small = Files.named(tmp_path, files.kind, "small").create(DISK // 2)
    used = Files.named(tmp_path, files.kind, "used").create(DISK)
    used.write_at(0, bytes(512))
    for upper in (small, used):
        with upper, pytest.raises(FormatError, match="not an empty one"):
            stack.restack(upper)
    stack.close()


def test_other_files_are_refused(files: Files) -> None:
    files.create(DISK).close()
    for name in ("l1.plain.lsmt", "l1.lz4.lsmt", "l1.ops", "l1.index"):
        with pytest.raises(FormatError):
            open_upper(LSMT / name, files.index)
    with pytest.raises(SourceError, match="No such file"):
        open_upper(files.data.with_name("none"), files.index)


def test_a_restack_that_cannot_read_back_what_it_sealed_goes_on_and_heals(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = WritableStack(Stack([layer([(0, 64, False)], DISK, 3)]), files.create(0))
    stack.write_at(4096, b"x" * 4096)
    stack.discard(8192, 4096)
    before = stack.read_at(0, DISK)

    def refuse(blob: object) -> LsmtLayer:
        raise SourceError("reading failed", blob="data")

    fresh = [Files.named(tmp_path, files.kind, f"fresh{number}").create(0) for number in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr("obdlab.layers.stack.LsmtLayer", refuse)
        with pytest.raises(SourceError, match="reading failed"):
            stack.restack(fresh[0])
    assert stack.upper is fresh[0]
    assert stack.read_at(0, DISK) == before
    stack.write_at(4100, b"y" * 10)  # fills up a block from what is not merged yet
    stack.discard(0, 512)
    wanted = bytearray(before)
    wanted[4100:4110] = b"y" * 10
    wanted[:512] = bytes(512)
    assert stack.read_at(0, DISK) == wanted
    stack.restack(fresh[1])
    assert stack.lowers is not None
    assert len(stack.lowers.layers) == 3
    assert stack.lowers.read_at(0, DISK) == wanted
    stack.close()
