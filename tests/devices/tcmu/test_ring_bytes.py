"""The ring byte by byte, in memory that the test lays out: the limits of each field, and each byte of an answer."""

from __future__ import annotations

import struct

import pytest

from obdlab.devices.tcmu.ring import Ring, RingError

OFFSET, LENGTH, SIZE = 128, 1024, 2048
DATA = OFFSET + LENGTH
COMMAND = 112
READ_10 = bytes.fromhex("28 00 00000007 00 0008 00")


def memory(
    *, version: int = 2, flags: int = 3, offset: int = OFFSET, length: int = LENGTH, head: int = 0, tail: int = 0
) -> bytearray:
    """Return a mapping with a mailbox."""
    found = bytearray(SIZE)
    struct.pack_into("=HHIII", found, 0, version, flags, offset, length, head)
    struct.pack_into("=I", found, 64, tail)
    return found


def put(
    found: bytearray,
    at: int,
    number: int,
    *iovecs: tuple[int, int],
    cdb: bytes = READ_10,
    cdb_at: int | None = None,
    count: int | None = None,
    length: int = COMMAND,
    op: int = 1,
) -> int:
    """Write a command's entry at a position of the ring; return the position behind it."""
    begin = OFFSET + at
    behind = begin + 48 + 16 * max(1, len(iovecs)) if cdb_at is None else cdb_at
    struct.pack_into("=IHBB", found, begin, length | op, number, 0, 0)
    struct.pack_into("=III4xQ", found, begin + 8, len(iovecs) if count is None else count, 0, 0, behind)
    for n, iovec in enumerate(iovecs):
        struct.pack_into("=QQ", found, begin + 48 + 16 * n, *iovec)
    if cdb_at is None:
        found[behind : behind + len(cdb)] = cdb
    struct.pack_into("=I", found, 12, (at + length) % LENGTH)
    return at + length


def tail(found: bytearray) -> int:
    return int(struct.unpack_from("=I", found, 64)[0])


@pytest.mark.parametrize(
    ("mailbox", "message"),
    [
        (memory(), None),
        (memory(flags=1), None),
        (memory(offset=SIZE - LENGTH), None),  # all of the mapping is ring
        (memory(offset=SIZE - LENGTH + 8), r"ring outside the mapping \(got \[1032, 2056\), mapping 2048\)"),
        (memory(offset=120), "ring outside"),
        (memory(length=0), "ring outside"),
        (memory(length=1020), "ring outside"),
        (memory(version=3), r"mailbox version \(got 3, wanted 2\)"),
        (memory(flags=2), r"completions in order \(mailbox flags 0x2\)"),
        (memory(tail=LENGTH - 8), None),
        (memory(tail=LENGTH), r"a position outside the ring \(got 1024, wanted a multiple of 8 below 1024\)"),
        (memory(tail=4), "a position outside the ring"),
        (bytearray(127), r"too small for a mailbox \(got 127 bytes, wanted 128\)"),
        (bytearray(128), "mailbox version"),
    ],
)
def test_mailboxes(mailbox: bytearray, message: str | None) -> None:
    if message is None:
        assert Ring(mailbox).is_empty is (tail(mailbox) == 0)
        return
    with pytest.raises(RingError, match=message):
        Ring(mailbox)


@pytest.mark.parametrize(
    ("iovec", "inside"),
    [
        ((DATA, 4096), False),
        ((DATA, SIZE - DATA), True),
        ((DATA, SIZE - DATA + 1), False),
        ((DATA - 1, 16), False),
        ((SIZE, 0), True),
    ],
)
def test_data_lies_behind_the_ring_and_inside_the_mapping(iovec: tuple[int, int], inside: bool) -> None:
    found = memory()
    put(found, 0, 5, iovec)
    assert Ring(found).take() == ([(5, 7, 8, *iovec)] if inside else [(5, READ_10, None)])
    two = memory()
    put(two, 0, 5, iovec, (DATA, 8))
    assert Ring(two).take() == [(5, READ_10, (iovec, (DATA, 8)) if inside else None)]


def test_commands_with_and_without_data() -> None:
    found = memory()
    at = put(found, 0, 1, cdb=bytes(6))
    at = put(found, at, 2, (DATA, 512), cdb=bytes.fromhex("2a 00 00000007 00 0001 00"))
    put(found, at, 3, (DATA, 8), (DATA + 8, 8), (DATA + 16, 8))
    assert Ring(found).take() == [
        (1, bytes(6), ()),
        (2, bytes.fromhex("2a 00 00000007 00 0001 00"), ((DATA, 512),)),
        (3, READ_10, ((DATA, 8), (DATA + 8, 8), (DATA + 16, 8))),
    ]


@pytest.mark.parametrize(("count", "known"), [(4, True), (5, False), (1 << 31, False)])
def test_an_entry_has_as_many_pieces_as_fit(count: int, known: bool) -> None:
    found = memory()
    put(found, 0, 5, *[(DATA, 8)] * 4, count=count, cdb_at=DATA)
    ((_, _, pieces),) = Ring(found).take()  # type: ignore[misc]
    assert pieces == (((DATA, 8),) * 4 if known else None)


def test_a_read_whose_command_lies_elsewhere_is_a_command_like_others() -> None:
    found = memory()
    found[DATA : DATA + 10] = READ_10
    put(found, 0, 5, (DATA + 64, 8), cdb_at=DATA)
    assert Ring(found).take() == [(5, READ_10, ((DATA + 64, 8),))]


@pytest.mark.parametrize(
    ("cdb_at", "known"), [(SIZE - 16, True), (SIZE - 15, False), (SIZE, False), (1 << 63, False)]
)
def test_a_command_lies_inside_the_mapping(cdb_at: int, known: bool) -> None:
    found = memory()
    put(found, 0, 5, (DATA, 8), cdb_at=cdb_at)
    assert Ring(found).take() == [(5, bytes(6) if known else b"", ((DATA, 8),))]


@pytest.mark.parametrize(
    ("length", "message"), [(104, r"a command at 0 of 104 bytes \(wanted 112 at least\)"), (112, "")]
)
def test_a_command_has_room_for_its_answer(length: int, message: str) -> None:
    found = memory()
    put(found, 0, 5, (DATA, 8), length=length)
    if message:
        with pytest.raises(RingError, match=message):
            Ring(found).take()
    else:
        assert len(Ring(found).take()) == 1


@pytest.mark.parametrize(("length", "head", "fits"), [(112, 112, True), (120, 112, False), (0, 112, False)])
def test_an_entry_ends_where_the_kernel_says(length: int, head: int, fits: bool) -> None:
    found = memory()
    put(found, 0, 5, (DATA, 8), length=length)
    struct.pack_into("=I", found, 12, head)
    if fits:
        assert len(Ring(found).take()) == 1
        return
    with pytest.raises(RingError, match=f"an entry at 0 of {length} bytes, in a ring of 1024, filled up to {head}"):
        Ring(found).take()


def test_an_entry_does_not_go_around_the_end_of_the_ring() -> None:
    found = memory(tail=LENGTH - 112)
    put(found, LENGTH - 112, 5, (DATA, 8))
    assert len(Ring(found).take()) == 1
    struct.pack_into("=I", found, 64, LENGTH - 112)
    struct.pack_into("=I", found, OFFSET + LENGTH - 112, 120 | 1)
    struct.pack_into("=I", found, 12, 8)
    with pytest.raises(RingError, match="an entry at 912 of 120 bytes"):
        Ring(found).take()


def test_the_ring_goes_on_at_its_begin() -> None:
    found = memory(tail=LENGTH - 120)
    put(found, LENGTH - 120, 5, (DATA, 8))
    struct.pack_into("=I", found, OFFSET + LENGTH - 8, 8 | 0)  # padding
    put(found, 0, 6, (DATA, 8))
    ring = Ring(found)
    assert [command[0] for command in ring.take()] == [5, 6]
    assert ring.take() == []
    ring.complete(6, 0)
    assert tail(found) == 0  # behind the first entry and the padding
    ring.complete(5, 0)
    assert tail(found) == COMMAND
    assert ring.is_empty


def test_padding_alone_needs_no_answer() -> None:
    found = memory()
    struct.pack_into("=I", found, OFFSET, 64 | 0)
    struct.pack_into("=I", found, 12, 64)
    ring = Ring(found)
    assert not ring.is_empty
    assert ring.take() == []
    assert tail(found) == 64
    assert ring.is_empty


def test_padding_behind_a_command_waits_for_its_answer() -> None:
    found = memory()
    put(found, 0, 5, (DATA, 8))
    struct.pack_into("=I", found, OFFSET + COMMAND, 64 | 2)  # task management
    struct.pack_into("=I", found, 12, COMMAND + 64)
    ring = Ring(found)
    ring.take()
    assert tail(found) == 0
    ring.complete(5, 0)
    assert tail(found) == COMMAND + 64


@pytest.mark.parametrize(("op", "unknown"), [(0, False), (2, False), (3, True), (7, True)])
def test_entries_of_unknown_kinds_are_marked(op: int, unknown: bool) -> None:
    found = memory()
    put(found, 0, 5, (DATA, 8), op=op)
    found[OFFSET + 7] = 0x80
    before = bytes(found[OFFSET:])
    assert Ring(found).take() == []
    assert found[OFFSET + 7] == (0x81 if unknown else 0x80)
    assert found[OFFSET + 8 :] == before[8:]


def test_what_succeeded_is_published_with_zeros_and_its_number() -> None:
    found = memory()
    at = put(found, 0, 0x1234, (DATA, 8))
    put(found, at, 0x5678, (DATA, 8))
    ring = Ring(found)
    ring.take()
    found[OFFSET + 6 : OFFSET + 9] = b"\xff" * 3
    ring.publish()
    assert tail(found) == 0  # nothing is finished
    ring.finished.append(0x5678)
    ring.publish()
    # The oldest entry answers, whichever command it was: number, two kinds of flags, status.
    assert struct.unpack_from("=HBBB", found, OFFSET + 4) == (0x5678, 0, 0, 0)
    assert struct.unpack_from("=I", found, OFFSET)[0] == COMMAND | 1
    assert tail(found) == COMMAND
    ring.finished.append(0x1234)
    ring.publish()
    assert struct.unpack_from("=HBBB", found, OFFSET + COMMAND + 4) == (0x1234, 0, 0, 0)
    assert tail(found) == 2 * COMMAND


@pytest.mark.parametrize(("flags", "read_length", "uflags"), [(3, 0, 2), (3, 7, 2), (3, -1, 0), (1, 7, 0)])
def test_an_answer_byte_by_byte(flags: int, read_length: int, uflags: int) -> None:
    found = memory(flags=flags)
    put(found, 0, 0x1234, (DATA, 8))
    found[OFFSET + 8 : OFFSET + COMMAND] = b"\xee" * (COMMAND - 8)
    ring = Ring(found)
    ring._places.append(0)
    ring._taken = COMMAND
    ring.complete(0x1234, 2, b"sense", read_length)
    assert struct.unpack_from("=IHBBB", found, OFFSET) == (COMMAND | 1, 0x1234, 0, uflags, 2)
    assert found[OFFSET + 9 : OFFSET + 12] == b"\xee" * 3
    wanted = struct.pack("=I", read_length) if uflags else b"\xee" * 4
    assert found[OFFSET + 12 : OFFSET + 16] == wanted
    assert found[OFFSET + 16 : OFFSET + COMMAND] == b"sense" + bytes(91)
    assert found[OFFSET + COMMAND] == 0
    assert tail(found) == COMMAND


def test_an_answer_without_sense_leaves_its_place() -> None:
    found = memory()
    put(found, 0, 5, (DATA, 8))
    ring = Ring(found)
    ring.take()
    before = bytes(found[OFFSET + 16 : OFFSET + COMMAND])
    ring.complete(5, 0)
    assert found[OFFSET + 16 : OFFSET + COMMAND] == before
    with pytest.raises(RingError, match="an answer to command 9, but none is outstanding"):
        ring.complete(9, 0)


def test_no_command_is_taken_twice() -> None:
    found = memory()
    at = put(found, 0, 1, (DATA, 8))
    ring = Ring(found)
    assert [command[0] for command in ring.take()] == [1]
    put(found, at, 2, (DATA, 8))
    assert [command[0] for command in ring.take()] == [2]
    assert ring.take() == []
    struct.pack_into("=I", found, 12, LENGTH)
    with pytest.raises(RingError, match="a position outside the ring"):
        ring.take()


def test_an_entry_that_reaches_out_of_the_mapping() -> None:
    found = memory(offset=SIZE - LENGTH, tail=LENGTH - 8)
    struct.pack_into("=I", found, 12, 0)
    with pytest.raises(RingError, match="an entry at 1016 that reaches out of the mapping"):
        Ring(found).take()


@pytest.mark.parametrize(
    ("code", "length"),
    [(0x1F, 6), (0x20, 10), (0x3F, 10), (0x41, 10), (0x5F, 10), (0x80, 16), (0x9F, 16), (0xA8, 12)],
)
def test_the_group_of_its_code_says_how_long_a_command_is(code: int, length: int) -> None:
    found = memory()
    cdb = bytes((code, *range(1, 24)))
    put(found, 0, 5, (DATA, 8), (DATA, 8), cdb=cdb)
    ((_, taken, _),) = Ring(found).take()  # type: ignore[misc]
    assert taken == cdb[:length]
    for unknown in (0x60, 0x7E, 0xC0, 0xFF):
        put(found, 0, 5, (DATA, 8), (DATA, 8), cdb=bytes((unknown, *range(1, 24))))
        ((_, taken, _),) = Ring(found).take()  # type: ignore[misc]
        assert taken == b""
