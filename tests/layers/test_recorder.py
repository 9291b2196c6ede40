"""Recorders of reads: what they keep, and in which order reads come back."""

from __future__ import annotations

import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.errors import FormatError, OutOfRangeError
from obdlab.layers.recorder import Recorder, reads_of
from obdlab.layers.stack import Stack
from tests.layers.lsmt_samples import layer as layer_of

SIZE = 1 << 10
reads = st.lists(st.tuples(st.integers(0, 254), st.integers(0, SIZE - 100), st.integers(0, 100)), max_size=30)


@given(reads, st.integers(0, 30))
def test_the_first_reads_are_kept_and_the_others_counted(asked: list[tuple[int, int, int]], most: int) -> None:
    content = bytes(range(256)) * (SIZE // 256)
    recorder = Recorder(most)
    for layer, offset, length in asked:
        blob = recorder.watched(layer, MemoryBlob(content))
        assert blob.read_at(offset, length) == content[offset : offset + length]
    assert reads_of(recorder.to_bytes()) == asked[:most]
    assert recorder.left_out == max(0, len(asked) - most)


def test_reads_of_several_recorders_come_in_the_order_they_began() -> None:
    one, other = Recorder(), Recorder()
    asked = [(layer, offset, 10 - layer) for offset in (500, 30, 700) for layer in (5, 1)]
    for number, (layer, offset, length) in enumerate(asked):
        (one, other)[number % 2].around(layer, MemoryBlob(bytes(1000)).read_at)(offset, length)
    assert reads_of(one.to_bytes(), other.to_bytes()) == asked
    assert reads_of(other.to_bytes(), one.to_bytes()) == asked
    assert reads_of() == []


def test_a_failed_read_is_not_recorded() -> None:
    recorder = Recorder()
    blob = recorder.watched(3, MemoryBlob(b"abc", name="layer"))
    with pytest.raises(OutOfRangeError):
        blob.read_at(2, 2)
    assert (reads_of(recorder.to_bytes()), recorder.left_out, blob.size, blob.name) == ([], 0, 3, "layer")


def test_a_stack_is_watched_layer_by_layer_until_that_ends() -> None:
    stack = Stack([layer_of([(0, 8, False)], 8192), layer_of([(8, 8, False)], 8192)])
    wanted = stack.read_at(0, 8192)
    recorder = Recorder()
    stack.watch(recorder.around)
    assert stack.watched
    assert stack.read_at(0, 8192) == wanted
    stack.watch(None)
    assert not stack.watched
    assert stack.read_at(0, 8192) == wanted
    assert reads_of(recorder.to_bytes()) == [(0, 4096, 4096), (1, 4096, 4096)]  # the bottom is number 0


def test_reads_of_threads_do_not_mix() -> None:
    recorder = Recorder(4000)

    def read(layer: int) -> None:
        read_at = recorder.around(layer, MemoryBlob(bytes(1000)).read_at)
        for offset in range(500):
            read_at(offset, layer)

    threads = [threading.Thread(target=read, args=(layer,)) for layer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(reads_of(recorder.to_bytes())) == [(layer, at, layer) for layer in range(8) for at in range(500)]


@pytest.mark.parametrize("cut", [1, 27])
def test_records_that_are_cut_short(cut: int) -> None:
    recorder = Recorder()
    recorder.around(1, MemoryBlob(b"abc").read_at)(0, 1)
    assert len(recorder.to_bytes()) == struct.calcsize("<qIQQ")
    with pytest.raises(FormatError, match="cut short"):
        reads_of(recorder.to_bytes(), recorder.to_bytes()[:cut])
