"""Serving a ring: a simulated kernel on the other side, which breaks the rules as well."""

from __future__ import annotations

import random
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.devices.tcmu import ring
from obdlab.devices.tcmu.ring import Ring, RingError
from tests.devices.blobs import Gated, MemoryWritable, Troubled
from tests.devices.tcmu.simulated import KernelRing, read_10, read_16, served, write_10
from tests.devices.tcmu.speaking import data_of

MIB = 1 << 20
DATA = random.Random(1).randbytes(MIB)


def test_reads_and_writes_against_a_model() -> None:
    blob, rng, model = MemoryWritable(MIB), random.Random(2), bytearray(MIB)
    with served(blob) as (kernel, server):
        for _ in range(300):
            batch, wanted = [], {}
            for _ in range(rng.randrange(1, 8)):
                blocks = rng.choice((1, 7, 8, 64, 256))
                lba = rng.randrange(2048 - blocks)
                at, size, scattered = lba * 512, blocks * 512, rng.random() < 0.5
                if rng.random() < 0.5:
                    number = kernel.put(read_10(lba, blocks), room=size, scattered=scattered)
                    wanted[number] = bytes(model[at : at + size])
                else:
                    data = rng.randbytes(size)
                    model[at : at + size] = data
                    number = kernel.put(write_10(lba, blocks), data, scattered=scattered)
                batch.append(number)
            kernel.publish()
            answers = kernel.wait(batch)
            for number, data in wanted.items():  # one thread answers in order
                assert answers[number].data == data
            assert not any(answer.status for answer in answers.values())
        assert blob.data == model
        assert server.statistics().errors == 0


def test_commands_overtake_one_that_waits() -> None:
    blob = Gated(DATA, at=MIB // 2)
    with served(blob) as (kernel, _):
        slow = kernel.put(read_10(1024, 8), room=4096)
        fast = [kernel.put(read_10(8 * n, 8), room=4096) for n in range(5)]
        kernel.publish()
        assert blob.waiting.acquire(timeout=30)
        answers = kernel.wait(fast)
        assert slow not in answers
        more = [
            kernel.put(read_16(8 * (n % 100), 8), room=4096) for n in range(300)
        ]  # the ring wraps around the waiting one
        kernel.publish()
        kernel.wait(more)
        threading.Timer(0.05, blob.gate.set).start()
        assert kernel.wait([slow])[slow].data == DATA[MIB // 2 :][:4096]


def test_bad_commands_get_sense_data_and_others_are_served() -> None:
    bad = {
        "past the end": ({"cdb": read_10(2047, 2), "room": 1024}, (5, 0x2100)),
        "far past the end": ({"cdb": read_16((1 << 64) - 1, 1), "room": 512}, (5, 0x2100)),
        "unknown": ({"cdb": bytes((0xA3, *bytes(11)))}, (5, 0x2000)),
        "of no known length": ({"cdb": b"\xff" * 16}, (5, 0x2000)),
        "of any length": ({"cdb": bytes((0x7F, 0, 0, 0, 0, 0, 0, 24, *bytes(24)))}, (5, 0x2000)),
        "outside of all": ({"cdb": read_10(0, 1), "room": 512, "iovecs": [(1 << 40, 512)]}, (4, 0x4400)),
        "over the end": ({"cdb": read_10(0, 8), "room": 4096, "iovecs": [((1 << 64) - 512, 4096)]}, (4, 0x4400)),
        "over the mailbox": ({"cdb": read_10(0, 1), "room": 512, "iovecs": [(0, 512)]}, (4, 0x4400)),
        "CDB outside": ({"cdb": read_10(0, 1), "room": 512, "cdb_at": 1 << 40}, (5, 0x2000)),
        "data missing": ({"cdb": write_10(0, 8), "data": bytes(512)}, (5, 0x2400)),
    }
    with served(MemoryWritable(MIB)) as (kernel, _):
        for what, (command, sense) in bad.items():
            answer = kernel.do(**command)  # type: ignore[arg-type]
            assert (answer.status, answer.sense) == (2, sense), what
            assert kernel.do(read_10(0, 8), room=4096).data == bytes(4096), what


@pytest.mark.parametrize(
    ("cdb", "whole"),
    [
        (bytes((0x12, 0, 0, 0, 96, 0)), 6),
        (read_10(8, 1), 10),
        (read_16(8, 1), 16),
        (bytes((0x7F, 0, 0, 0, 0, 0, 0, 24, *range(24))), 32),
        (bytes((0x7F, 0, 0, 0, 0, 0, 0, 0)), 8),
        (bytes((0x80, *range(23))), 16),
        (bytes((0x7E, *range(23))), 0),
    ],
    ids=["6", "10", "16", "of variable length", "of variable length, no more", "16, not variable", "unknown"],
)
def test_a_command_is_as_long_as_its_operation_code_says(cdb: bytes, whole: int) -> None:
    kernel = KernelRing()
    kernel.put(cdb)
    kernel.publish()
    ((_, taken, data),) = Ring(kernel.memory).take()  # type: ignore[misc]
    assert (taken, data) == (cdb[:whole], ())
    kernel.close()


def test_a_failing_source_is_a_medium_error() -> None:
    with served(Troubled(DATA, at=4096)) as (kernel, server):
        assert kernel.do(read_10(8, 8), room=4096).sense == (3, 0x1100)
        assert kernel.do(read_10(0, 8), room=4096).data == DATA[:4096]
        assert "registry answered 500" in server.statistics().last_error
        assert kernel.do(write_10(0, 8), bytes(4096)).sense == (5, 0x3005)


def test_short_answers_say_how_long_they_are_and_leak_nothing() -> None:
    with served(MemoryBlob(DATA)) as (kernel, _):
        answer = kernel.do(bytes((0x12, 0, 0, 0, 200, 0)), room=200)
        assert (answer.read_length, answer.data[36:]) == (36, bytes(164))
        assert kernel.do(read_10(0, 1), room=512).read_length is None


def test_padding_task_management_and_unknown_entries_are_passed_over() -> None:
    with served(MemoryBlob(DATA)) as (kernel, _):
        for op in (ring.OP_TASK_MANAGEMENT, 5):
            first = kernel.put(read_10(0, 8), room=4096)
            at = kernel.entry(op, 40)
            second = kernel.put(read_10(8, 8), room=4096)
            kernel.publish()
            answers = kernel.wait([first, second])
            assert answers[second].data == DATA[4096:8192]
            assert kernel.memory[at + 7] & ring.UFLAG_UNKNOWN_OP == (op == 5)
        kernel.entry(ring.OP_TASK_MANAGEMENT, 40)
        assert kernel.do(read_10(0, 8), room=4096).status == 0


def test_answers_without_commands_are_refused() -> None:
    kernel = KernelRing()
    with pytest.raises(RingError, match="none is outstanding"):
        Ring(kernel.memory).complete(1, 0)
    shared = Ring(kernel.memory)
    shared.finished.append(1)
    with pytest.raises(RingError, match="none is outstanding"):
        shared.publish()
    kernel.close()


def test_what_was_finished_is_answered_when_published() -> None:
    kernel = KernelRing()
    shared = Ring(kernel.memory)
    numbers = [kernel.put(read_10(lba, 8), room=4096) for lba in range(4)]
    kernel.publish()
    shared.take()
    for number in (numbers[2], numbers[0]):
        shared.finished.append(number)
    assert not kernel.answers()
    shared.complete(numbers[1], 2)
    assert sorted(kernel.answers()) == [numbers[1]]
    shared.publish()
    assert sorted(kernel.answers()) == sorted([numbers[0], numbers[2]])
    shared.publish()
    assert not shared.is_empty
    shared.finished.append(numbers[3])
    shared.publish()
    assert shared.is_empty
    kernel.close()


@pytest.mark.parametrize("length", [0, 8, 120, 4088, 8192])
def test_an_entry_that_does_not_end_where_the_kernel_is_ends_the_serving(length: int) -> None:
    # Followed further, the ring would be gone around without an end.
    with served(MemoryBlob(DATA)) as (kernel, server):
        assert kernel.do(read_10(0, 8), room=4096).status == 0
        at = kernel.entry(ring.OP_COMMAND, ring.ENTRY_LEAST)
        struct.pack_into("=I", kernel.memory, at, length | ring.OP_COMMAND)
        kernel.publish()
        assert server.wait(30)
        assert "an entry at" in server.statistics().last_error or "a command at" in server.statistics().last_error


@pytest.mark.parametrize(
    ("at", "fmt", "value", "message"),
    [
        (0, "=H", 1, "version"),
        (2, "=H", 0, "in order"),
        (4, "=I", 0, "outside"),
        (8, "=I", 0xFFFFFFF8, "outside"),
        (ring.TAIL_AT, "=I", 1 << 30, "position"),
    ],
)
def test_a_mailbox_that_is_none(at: int, fmt: str, value: int, message: str) -> None:
    kernel = KernelRing()
    struct.pack_into(fmt, kernel.memory, at, value)
    with pytest.raises(RingError, match=message):
        Ring(kernel.memory)
    kernel.close()


@given(st.binary(max_size=64), st.integers(0, 64), st.integers(0, 1 << 12))
@settings(max_examples=200)
def test_a_scribbled_ring_gives_commands_or_an_error(noise: bytes, at: int, head: int) -> None:
    kernel = KernelRing(ring_size=4096, data_pages=8)
    kernel.put(read_10(0, 8), room=4096)
    kernel.memory[kernel.offset + at : kernel.offset + at + len(noise)] = noise
    kernel.head = head
    struct.pack_into("=I", kernel.memory, ring.HEAD_AT, head)
    try:
        shared = Ring(kernel.memory)
        for command in shared.take():
            for begin, length in data_of(command):
                assert kernel.offset + 4096 <= begin
                assert begin + length <= len(kernel.memory)
            shared.complete(command[0], 0)
    except RingError:
        pass
    kernel.close()
