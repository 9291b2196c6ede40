"""Collecting an append-mode layer: what it frees, and that nobody notices."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from obdlab.errors import SourceError
from obdlab.layers import readers
from obdlab.layers.append import AppendUpper
from obdlab.layers.gc import collect
from obdlab.layers.layerfile import LayerFile
from obdlab.layers.stack import Stack, WritableStack
from tests.layers.lsmt_samples import layer

DISK = 8 << 20


def new_layer(folder: Path, size: int = DISK) -> AppendUpper:
    return AppendUpper.create(folder / "data", folder / "index", size)


def used(folder: Path) -> int:
    """Storage of both files, as du counts."""
    return sum((folder / name).stat().st_blocks * 512 for name in ("data", "index"))


@pytest.mark.parametrize("piece", [512, 4096, 12800, 1 << 20])
def test_overwriting_ten_times_takes_little_more_than_once(tmp_path: Path, piece: int) -> None:
    size = DISK if piece > 4096 else 1 << 20
    rng = random.Random(piece)
    with new_layer(tmp_path, size) as upper:
        model = bytearray(size)
        for _ in range(10):
            starts = list(range(0, size, piece))
            rng.shuffle(starts)
            for start in starts:
                data = rng.randbytes(min(piece, size - start))
                upper.write_at(start, data)
                model[start : start + len(data)] = data
        assert used(tmp_path) > 9 * size
        done = collect(upper)
        assert used(tmp_path) <= 1.2 * size
        assert done.allocated_before - done.allocated_after > 8 * size
        assert done.records_after <= 2 * len(upper.index) + 256
        assert upper.read_at(0, size) == model
        again = collect(upper)
        assert again.moved_size == 0
        assert again.allocated_after == done.allocated_after
        upper.write_at(0, b"n" * 512)
        upper.flush()
        model[:512] = b"n" * 512
    with AppendUpper.open(tmp_path / "data", tmp_path / "index") as upper:
        assert not upper.dropped
        assert upper.read_at(0, size) == model


def test_scattered_data_is_moved_together(tmp_path: Path) -> None:
    # Every eighth sector stays: each keeps a whole block of the file.
    with new_layer(tmp_path, 2 << 20) as upper:
        upper.write_at(0, os.urandom(2 << 20))
        kept = upper.read_at(0, 2 << 20)
        for sector in range(0, 4096, 8):
            upper.discard(sector * 512, 7 * 512)
        upper.flush()
        done = collect(upper)
        assert done.moved_size == 512 * 512
        assert done.allocated_after <= 4096 + 512 * 512 + 8192
        data = upper.read_at(0, 2 << 20)
        assert data == b"".join(bytes(3584) + kept[at + 3584 : at + 4096] for at in range(0, 2 << 20, 4096))
        assert collect(upper).moved_size == 0


def test_an_empty_layer(tmp_path: Path) -> None:
    with new_layer(tmp_path) as upper:
        done = collect(upper)
        assert (done.moved_size, done.records_before, done.records_after) == (0, 0, 0)
        upper.discard(0, DISK)
        collect(upper)
        assert upper.read_held(0, 4096) == [(4096, bytes(4096))]


def test_the_index_file_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    index = tmp_path / "real" / "index"
    AppendUpper.create(tmp_path / "data", index, DISK).close()
    index.chmod(0o640)
    (tmp_path / "index").symlink_to(index)
    with AppendUpper.open(tmp_path / "data", tmp_path / "index") as upper:
        for _ in range(1000):
            upper.write_at(0, bytes(512))
        assert collect(upper).records_after == 1
        upper.set_virtual_size(2 * DISK)
    assert (tmp_path / "index").is_symlink()
    assert index.stat().st_mode & 0o777 == 0o640
    assert index.stat().st_size == 4096 + 16
    with AppendUpper.open(tmp_path / "data", tmp_path / "index") as upper:
        assert upper.virtual_size == 2 * DISK
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "index", "index", "real"]


def test_an_interrupt_after_the_rename_leaves_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the old log, of up to 2 GB that has no name any more, takes long."""
    close = LayerFile.close

    def interrupted(file: LayerFile) -> None:
        close(file)
        if file is log:
            raise KeyboardInterrupt

    with AppendUpper.create(tmp_path / "data", tmp_path / "index", DISK) as upper:
        for number in range(40):
            upper.write_at(number % 4 * 4096, bytes([number]) * 4096)
        assert upper._log is not None
        log = upper._log._file
        wanted = upper.read_at(0, DISK)
        with monkeypatch.context() as patched:
            patched.setattr(LayerFile, "close", interrupted)
            with pytest.raises(KeyboardInterrupt):
                upper.compact_log()
    with AppendUpper.open(tmp_path / "data", tmp_path / "index") as upper:
        assert upper.read_at(0, DISK) == wanted


def test_sealed_or_read_only_layers_are_refused(tmp_path: Path) -> None:
    with new_layer(tmp_path) as upper:
        upper.write_at(0, bytes(4096))
        upper.write_at(0, bytes(4096))
        upper.seal()
        with pytest.raises(SourceError, match="cannot be written"):
            collect(upper)
    with (
        AppendUpper.open(tmp_path / "data", tmp_path / "index", read_only=True) as upper,
        pytest.raises(SourceError, match="cannot be written"),
    ):
        collect(upper)


def test_reads_and_writes_go_on(tmp_path: Path) -> None:
    lower = layer([(0, 512, False)], 1 << 20, 1)
    stack = WritableStack(Stack([lower]), AppendUpper.create(tmp_path / "data", tmp_path / "index", 0))
    blocks = (1 << 20) // 4096
    stop = threading.Event()
    failures: list[object] = []
    final = [0] * blocks

    def attempt(call) -> None:  # type: ignore[no-untyped-def]
        try:
            call()
        except BaseException as error:
            failures.append(error)
            stop.set()

    def write(first: int) -> None:
        rng = random.Random(first)
        while not stop.is_set():
            block = rng.randrange(blocks // 2) * 2 + first
            final[block] = rng.randrange(1, 256)
            time.sleep(0.0002)  # leaves the interpreter to the others
            if rng.random() < 0.2:
                for part in range(8):
                    stack.write_at(block * 4096 + part * 512, bytes([final[block]]) * 512)
            else:
                stack.write_at(block * 4096, bytes([final[block]]) * 4096)

    def read() -> None:
        rng = random.Random(7)
        written: set[int] = set()
        while not stop.is_set():
            block = rng.randrange(blocks)
            data = stack.read_at(block * 4096, 4096)
            sectors = [data[at : at + 512] for at in range(0, 4096, 512)]
            # Once written, a sector is of one value that is not zero; before, it is the lower layer's.
            whole = all(sector[0] and sector == sector[:1] * 512 for sector in sectors)
            if whole:
                written.add(block)
            elif block in written:
                failures.append((block, [sector[:4] for sector in sectors]))

    threads = [threading.Thread(target=attempt, args=(lambda first=first: write(first),)) for first in (0, 1)]
    threads += [threading.Thread(target=attempt, args=(read,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(12):
            collect(stack.upper)  # type: ignore[arg-type]
            if stop.wait(0.02):
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures
    wanted = b"".join(
        bytes([value]) * 4096 if value else lower.data.read_at(4096 + at * 4096, 4096) if at < 64 else bytes(4096)
        for at, value in enumerate(final)
    )
    assert stack.read_at(0, 1 << 20) == wanted
    stack.close()
    with AppendUpper.open(tmp_path / "data", tmp_path / "index") as upper:
        assert Stack([lower, upper]).read_at(0, 1 << 20) == wanted


def test_a_read_under_way_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_layer(tmp_path) as upper:
        upper.write_at(0, b"o" * 8192)
        inside, go_on = threading.Event(), threading.Event()
        real = type(upper.data).read_at

        def slow(file, offset, length):  # type: ignore[no-untyped-def]
            inside.set()
            assert go_on.wait(30)
            return real(file, offset, length)

        answers: list[bytes] = []
        with monkeypatch.context() as patch:
            patch.setattr(type(upper.data), "read_at", slow)
            reader = threading.Thread(target=lambda: answers.append(upper.read_at(0, 8192)))
            reader.start()
            assert inside.wait(30)
        upper.write_at(0, b"n" * 8192)
        monkeypatch.setattr(readers, "READERS_DEADLINE_S", 0.05)
        with pytest.raises(SourceError, match="reads did not end in time"):
            collect(upper)
        monkeypatch.setattr(readers, "READERS_DEADLINE_S", 30.0)
        collector = threading.Thread(target=collect, args=(upper,))
        collector.start()
        collector.join(0.1)
        assert collector.is_alive()
        go_on.set()
        collector.join(30)
        reader.join(30)
        assert answers == [b"o" * 8192]
        assert upper.data.read_at(4096, 8192) == bytes(8192)  # punched after the read
