"""Clients that send anything, in numbers, while honest ones read and write: these notice nothing."""

from __future__ import annotations

import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from obdlab.contrib.nbd import protocol
from obdlab.contrib.nbd.protocol import Command, Option
from tests.contrib.nbd.speaking import Speaker, go, meta, option, request
from tests.contrib.nbd.test_server import serving
from tests.devices.blobs import MemoryWritable
from tests.server.killing import until

MIB = 1 << 20
#: Honest clients have the first of it, each some for itself; others may write behind it.
HONEST, EACH = 4, MIB // 4
_FIELDS = (0, 1, 0xFF, 0xFFFF, 1 << 31, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)


def conversation(rng: random.Random) -> bytes:
    """What a client might say, most of it right, then changed in some places and cut off somewhere."""
    said = [protocol.CLIENT_FLAGS.pack(protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES)]
    for _ in range(rng.randrange(4)):
        choices = (
            option(Option.STRUCTURED_REPLY),
            meta(protocol.ALLOCATION),
            option(Option.LIST),
            option(rng.randrange(20)),
        )
        said.append(rng.choice(choices))
    said.append(go())
    for _ in range(rng.randrange(8)):
        command, length = rng.choice([*Command, 99]), rng.choice((1, 512, 4096, 70000, *_FIELDS)) & 0xFFFFFFFF
        data = rng.randbytes(min(length, 4096)) if command == Command.WRITE else b""
        offset = rng.choice((HONEST * EACH + rng.randrange(MIB), rng.choice(_FIELDS) | HONEST * EACH))
        flags = rng.choice((0, 0, 1, rng.randrange(1 << 16)))
        said.append(request(command, offset, length, flags=flags, cookie=rng.randrange(1 << 64), data=data))
    text = bytearray(b"".join(said))
    for _ in range(rng.choice((0, 0, 1, 3))):
        # Not in a request's offset: what one writes must stay where nobody else does.
        text[rng.randrange(min(len(text), 60))] = rng.randrange(256)
    return bytes(text[: rng.randrange(1, len(text) + 1)])


def attack(place: Path, seed: int) -> None:
    """One hostile client; it reads some of what it gets, or nothing."""
    rng = random.Random(seed)
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.settimeout(rng.choice((0.01, 0.05)))
        sock.connect(str(place))
        text = conversation(rng)
        cut = rng.randrange(len(text) + 1)
        sock.sendall(text[:cut])
        sock.recv(rng.choice((1, 4096)))
        sock.sendall(text[cut:])
        sock.recv(1 << 16)
        if rng.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1 << 16)


def use_honestly(place: Path, number: int, over: threading.Event) -> int:
    """Read and write the client's own part until it is over; the number of checks."""
    rng, base, model, checked = random.Random(number), number * EACH, bytearray(EACH), 0
    with Speaker(place) as client:
        client.begin()
        while not over.is_set() or not checked:
            at, length = rng.randrange(EACH - 8192), rng.randrange(1, 8192)
            data = rng.randbytes(length)
            client.say(request(Command.WRITE, base + at, length, data=data))
            assert client.simple()[1] == 0
            model[at : at + length] = data
            at, length = rng.randrange(EACH - 8192), rng.randrange(1, 8192)
            assert client.read(base + at, length) == model[at : at + length]
            checked += 1
    return checked


@pytest.mark.parametrize("count", [200, pytest.param(50_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_hostile_clients_harm_nobody(tmp_path: Path, count: int) -> None:
    before = threading.active_count()
    with serving(tmp_path, MemoryWritable(4 * MIB)) as place:
        over = threading.Event()
        with ThreadPoolExecutor(HONEST + 8) as pool:
            honest = [pool.submit(use_honestly, place, number, over) for number in range(HONEST)]
            try:
                list(pool.map(attack, [place] * count, range(count)))
            finally:
                over.set()
            assert all(each.result(60) for each in honest)
        until(lambda: threading.active_count() <= before + 1)  # who accepts
        with Speaker(place) as client:
            assert client.begin()[0] == 4 * MIB
    until(lambda: threading.active_count() <= before)
