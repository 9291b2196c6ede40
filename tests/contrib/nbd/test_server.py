"""The NBD server against clients that know the protocol, and against some that do not care."""

from __future__ import annotations

import errno
import random
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.contrib.nbd import protocol
from obdlab.contrib.nbd import server as nbd_server
from obdlab.contrib.nbd.connection import Connection, ConnectionLostError
from obdlab.contrib.nbd.export import Extents, NbdExport
from obdlab.contrib.nbd.protocol import Chunk, Command, Export, Flag, Option, Reply
from obdlab.contrib.nbd.server import Budget, Client, NbdServer
from obdlab.errors import DeviceError
from obdlab.system.pauses import wait_until
from tests.contrib.nbd.speaking import Speaker, go, meta, option, request
from tests.devices.blobs import Gated, MemoryWritable, Short, Troubled

CONTENT = random.Random(5).randbytes(1 << 20)


@contextmanager
def serving(
    tmp_path: Path, blob: Blob, name: str = "", *, read_only: bool = False, extents: Extents | None = None
) -> Iterator[Path]:
    place = tmp_path / "nbd.sock"
    server = NbdServer(NbdExport(blob, name, read_only=read_only, extents=extents), place)
    server.start()
    try:
        yield place
    finally:
        assert server.stop()
        assert server.connections == 0
        assert not place.exists()


def halves(offset: int, length: int) -> list[tuple[int, bool]]:
    middle = len(CONTENT) // 2
    before = max(0, min(length, middle - offset))
    return [piece for piece in ((before, True), (length - before, False)) if piece[0]]


def test_reads(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryBlob(CONTENT)) as place, Speaker(place) as client:
        size, flags = client.begin()
        assert size == len(CONTENT)
        assert Export(flags) == Export.HAS_FLAGS | Export.READ_ONLY | Export.FLUSH | Export.DF | Export.MULTI_CONN
        for offset, length in ((0, 1), (511, 4097), (0, len(CONTENT)), (len(CONTENT) - 1, 1)):
            assert client.read(offset, length) == CONTENT[offset : offset + length]
        assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_structured_reads_and_extents(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryBlob(CONTENT), extents=halves) as place, Speaker(place) as client:
        client.begin(structured=True)
        client.say(request(Command.READ, 100, 5000, cookie=7, flags=Flag.DF))
        assert client.chunk() == (7, Chunk.OFFSET_DATA, protocol.OFFSET.pack(100) + CONTENT[100:5100])
        client.say(request(Command.BLOCK_STATUS, 0, len(CONTENT)))
        half = len(CONTENT) // 2
        both = struct.pack(">5I", 0, half, 0, half, protocol.EXTENT_HOLE | protocol.EXTENT_ZERO)
        assert client.chunk() == (1, Chunk.BLOCK_STATUS, both)
        client.say(request(Command.BLOCK_STATUS, 0, len(CONTENT), flags=Flag.REQUEST_ONE))
        assert client.chunk() == (1, Chunk.BLOCK_STATUS, both[:12])
        client.say(request(Command.READ, len(CONTENT), 1))
        _, kind, payload = client.chunk()
        assert kind == Chunk.ERROR
        number, length = protocol.ERROR.unpack_from(payload)
        assert number == errno.EINVAL
        assert payload[protocol.ERROR.size :].decode().startswith("[1048576, 1048577) is not inside")
        assert length == len(payload) - protocol.ERROR.size


def test_writes(tmp_path: Path) -> None:
    disk = MemoryWritable(1 << 20)
    with serving(tmp_path, disk) as place, Speaker(place) as client:
        _, flags = client.begin()
        assert not Export(flags) & Export.READ_ONLY
        client.say(request(Command.WRITE, 1000, 3000, data=b"a" * 3000))
        assert client.simple() == (1, 0, b"")
        assert bytes(disk.data[999:4001]) == b"\0" + b"a" * 3000 + b"\0"
        assert disk.flushes == 0
        client.say(request(Command.WRITE, 0, 1, data=b"b", flags=Flag.FUA) + request(Command.FLUSH))
        assert [client.simple()[1] for _ in range(2)] == [0, 0]
        assert disk.flushes == 2
        client.say(request(Command.TRIM, 1000, 1000) + request(Command.WRITE_ZEROES, 2000, 500, flags=Flag.NO_HOLE))
        assert [client.simple()[1] for _ in range(2)] == [0, 0]
        assert client.read(0, 4000) == b"b" + bytes(2499) + b"a" * 1500


@pytest.mark.parametrize(
    ("sent", "number"),
    [
        (request(Command.WRITE, 0, 4, data=b"abcd"), errno.EPERM),
        (request(Command.TRIM, 0, 4), errno.EPERM),
        (request(Command.WRITE_ZEROES, 0, 4), errno.EPERM),
        (request(Command.READ, 0, protocol.MAX_TRANSFER + 1), errno.EINVAL),
        (request(Command.READ, (1 << 64) - 1, 1), errno.EINVAL),
        (request(Command.READ, 0, 0), errno.EINVAL),
        (request(Command.READ, 0, 1, flags=1 << 7), errno.EINVAL),
        (request(Command.BLOCK_STATUS, 0, 1), errno.EINVAL),
        (request(99, 0, 1), errno.EINVAL),
        (request(Command.FLUSH), 0),
    ],
)
def test_requests_that_are_refused(tmp_path: Path, sent: bytes, number: int) -> None:
    disk = MemoryWritable(4096)
    with serving(tmp_path, disk, read_only=True) as place, Speaker(place) as client:
        client.begin()
        client.say(sent)
        assert client.simple()[1] == number
        assert client.read(0, 4096) == bytes(4096), "the connection lives on"


def test_writes_past_the_end(tmp_path: Path) -> None:
    disk = MemoryWritable(4096)
    with serving(tmp_path, disk) as place, Speaker(place) as client:
        client.begin()
        client.say(request(Command.WRITE, 4095, 2, data=b"ab"))
        assert client.simple()[1] == errno.ENOSPC
        assert not any(disk.data)


def test_the_largest_transfers(tmp_path: Path) -> None:
    """On a disk that holds more: it is the bound on one request that refuses the longer ones, not the disk's end."""
    most = protocol.MAX_TRANSFER
    disk = MemoryWritable(most + 4096)
    with serving(tmp_path, disk) as place, Speaker(place) as client:
        client.begin()
        client.say(request(Command.WRITE, 4096, most, data=b"w" * most))
        assert client.simple() == (1, 0, b"")
        assert disk.data[4095:4097] == b"\0w"
        assert disk.data[-1:] == b"w"
        assert client.read(4096, most) == b"w" * most
        client.say(request(Command.READ, 0, most + 1))
        assert client.simple()[1] == errno.EINVAL
        assert client.read(0, 1) == b"\0"


@pytest.mark.parametrize("length", [protocol.MAX_TRANSFER + 1, 2 * protocol.MAX_TRANSFER, (1 << 32) - 1])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_longer_write_is_hung_up_on_before_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, read_only: bool
) -> None:
    monkeypatch.setattr(nbd_server, "TRANSFER_S", 600.0)  # neither data nor memory is waited for
    disk = MemoryWritable(protocol.MAX_TRANSFER + 4096)
    with serving(tmp_path, disk, read_only=read_only) as place, Speaker(place) as client:
        client.begin()
        client.say(request(Command.WRITE, 0, length))
        assert client.is_hung_up_on()
    assert not any(disk.data[:4096])


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (go(b"other"), Reply.UNKNOWN),
        (go(b"other", Option.INFO), Reply.UNKNOWN),
        (option(Option.GO), Reply.INVALID),
        (option(Option.GO, b"\xff\xff\xff\xff"), Reply.INVALID),
        (option(Option.GO, struct.pack(">IH", 0, 3)), Reply.INVALID),
        (option(Option.LIST, b"x"), Reply.INVALID),
        (option(Option.STRUCTURED_REPLY, b"x"), Reply.INVALID),
        (meta(protocol.ALLOCATION), Reply.INVALID),  # structured replies come first
        (option(Option.LIST_META_CONTEXT, struct.pack(">II", 0, 1 << 31)), Reply.INVALID),
        (option(5), Reply.UNSUPPORTED),  # TLS
        (option(12345, b"data"), Reply.UNSUPPORTED),
        (option(Option.GO, bytes(1 << 20)), Reply.TOO_BIG),
    ],
)
def test_options_that_are_refused(tmp_path: Path, sent: bytes, kind: int) -> None:
    with serving(tmp_path, MemoryBlob(CONTENT), "disk", extents=halves) as place, Speaker(place) as client:
        assert [answer for answer, _ in client.ask(sent)] == [kind]
        assert client.begin()[0] == len(CONTENT), "the client may go on"


def test_options(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryBlob(CONTENT), "disk", extents=halves) as place:
        with Speaker(place) as client:
            assert client.ask(option(Option.LIST)) == [(Reply.SERVER, protocol.lengthed(b"disk")), (Reply.ACK, b"")]
            listed = client.ask(meta(number=Option.LIST_META_CONTEXT))
            assert [kind for kind, _ in listed] == [Reply.META_CONTEXT, Reply.ACK]
            assert [kind for kind, _ in client.ask(go(b"disk", Option.INFO))] == [Reply.INFO, Reply.INFO, Reply.ACK]
            assert client.ask(option(Option.ABORT)) == [(Reply.ACK, b"")]
            assert client.is_hung_up_on()
        with Speaker(place, protocol.FIXED_NEWSTYLE) as client:
            client.say(option(Option.EXPORT_NAME, b"disk"))
            size, _ = protocol.EXPORT.unpack(client.take(protocol.EXPORT.size))
            assert (size, client.take(protocol.EXPORT_PADDING)) == (len(CONTENT), bytes(protocol.EXPORT_PADDING))
            assert client.read(5, 5) == CONTENT[5:10]
            client.say(request(Command.DISCONNECT))
            assert client.is_hung_up_on()


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        (0, b""),
        (1 << 31, b""),
        (protocol.FIXED_NEWSTYLE, bytes(16)),
        (protocol.FIXED_NEWSTYLE, protocol.OPTION.pack(protocol.OPTION_MAGIC, 99, protocol.MAX_TRANSFER + 1)),
        (protocol.FIXED_NEWSTYLE, option(Option.EXPORT_NAME, b"other")),
        (protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES, go() + bytes(protocol.REQUEST.size)),
        (protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES, go() + request(Command.WRITE, 0, protocol.MAX_TRANSFER + 1)),
    ],
)
def test_who_does_not_speak_it_is_hung_up_on(tmp_path: Path, flags: int, sent: bytes) -> None:
    with serving(tmp_path, MemoryBlob(CONTENT), "disk") as place, Speaker(place, flags) as client:
        with suppress(ConnectionError):  # hung up on before a word
            client.say(sent)
        with pytest.raises((EOFError, ConnectionResetError)):
            client.take(1 << 16)


def test_endless_options_end(tmp_path: Path) -> None:
    with serving(tmp_path, MemoryBlob(CONTENT)) as place, Speaker(place) as client:
        for _ in range(64):
            assert client.ask(option(77)) == [(Reply.UNSUPPORTED, b"")]
        assert client.is_hung_up_on()


def test_what_the_blob_cannot_give_is_an_error(tmp_path: Path) -> None:
    trouble = Troubled(CONTENT, 8192)
    with serving(tmp_path, trouble, extents=halves) as place, Speaker(place) as client, Speaker(place) as other:
        client.begin()
        client.say(request(Command.READ, 8192, 4096))
        assert client.simple(4096)[1] == errno.EIO
        assert client.read(0, 8192) == CONTENT[:8192]
        other.begin(structured=True)
        other.say(request(Command.READ, 8192, 4096))
        assert b"registry answered 500" in other.chunk()[2]
        trouble.error = None
        assert client.read(8192, 4096) == CONTENT[8192:12288]
        trouble.error = ValueError("a bug")
        client.say(request(Command.READ, 8192, 4096))
        assert client.simple(4096)[1] == errno.EIO


def test_too_little_is_an_error(tmp_path: Path) -> None:
    with serving(tmp_path, Short(CONTENT)) as place, Speaker(place) as client:
        client.begin()
        client.say(request(Command.READ, 0, 4096))
        assert client.simple(4096)[1] == errno.EIO


def test_a_hit_does_not_wait_behind_a_miss(tmp_path: Path) -> None:
    blob = Gated(CONTENT, 512 << 10)
    with serving(tmp_path, blob) as place, Speaker(place) as client:
        client.begin()
        for cookie in range(10):
            client.say(request(Command.READ, (512 << 10) + 4096 * cookie, 4096, cookie=100 + cookie))
        client.say(request(Command.READ, 0, 4096, cookie=1))
        assert client.simple(4096) == (1, 0, CONTENT[:4096])
        blob.gate.set()
        late = {cookie: data for cookie, _, data in (client.simple(4096) for _ in range(10))}
        assert late == {100 + n: CONTENT[(512 << 10) + 4096 * n :][:4096] for n in range(10)}


@pytest.mark.parametrize("tcp", [False, True])
def test_stopping_answers_what_is_under_way(tmp_path: Path, *, tcp: bool) -> None:
    blob = Gated(CONTENT, 0)
    server = NbdServer(NbdExport(blob), ("127.0.0.1", 0) if tcp else tmp_path / "nbd.sock")
    server.start()
    with Speaker(("127.0.0.1", server.port) if tcp else tmp_path / "nbd.sock") as client:
        client.begin()
        client.say(request(Command.READ, 0, 4096))
        assert blob.waiting.acquire(timeout=60)
        (served,) = server._clients
        stopped: list[bool] = []
        stopping = threading.Thread(target=lambda: stopped.append(server.stop(60)))
        stopping.start()
        try:
            assert wait_until(lambda: served._crew._ended, 60, look_s=0.01), "it goes on to take requests"
            assert stopping.is_alive()
        finally:
            blob.gate.set()
        assert client.simple(4096) == (1, 0, CONTENT[:4096])
        assert client.is_hung_up_on()
        stopping.join(60)
    assert stopped == [True]


def test_stopping_ends_with_its_time(tmp_path: Path) -> None:
    blob = Gated(CONTENT, 0)
    server = NbdServer(NbdExport(blob), ("127.0.0.1", 0))
    server.start()
    with Speaker(("127.0.0.1", server.port)) as client:
        client.begin()
        client.say(request(Command.READ, 0, 4096))
        assert blob.waiting.acquire(timeout=60)
        (serving_thread,) = server._clients.values()
        assert not server.stop(0.2)
        blob.gate.set()
        serving_thread.join(60)


class Clogged:
    """A connection whose client takes no answer."""

    def __init__(self) -> None:
        self.hung_up_under_lock: list[bool] = []
        self.lock: threading.Lock | None = None

    def send(self, parts: list[bytes], timeout_s: float) -> None:
        raise ConnectionLostError("client did not take the last 9 bytes in 1 s")

    def hang_up(self) -> None:
        assert self.lock is not None
        self.hung_up_under_lock.append(self.lock.locked())


def test_no_answer_follows_a_part_of_one() -> None:
    connection = Clogged()
    client = Client(connection, NbdExport(MemoryBlob(CONTENT)), Budget(0))  # type: ignore[arg-type]
    connection.lock = client._send_lock
    with pytest.raises(ConnectionLostError):
        client._send([b"an answer"])
    assert connection.hung_up_under_lock == [True]


def test_a_lack_of_threads_costs_one_client_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, refused = threading.Thread.start, threading.Event()

    def lacking(self: threading.Thread) -> None:
        if self.name == "nbd-client" and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        start(self)

    with serving(tmp_path, MemoryBlob(CONTENT)) as place:
        monkeypatch.setattr(threading.Thread, "start", lacking)
        with pytest.raises((EOFError, OSError)):
            Speaker(place)
        assert refused.is_set()
        with Speaker(place) as client:
            client.begin()
            assert client.read(0, 1) == CONTENT[:1]
    assert "nbd: refused a client: can't start new thread" in caplog.text


def test_clients_that_leave_in_the_middle(tmp_path: Path) -> None:
    disk = MemoryWritable(1 << 20)
    with serving(tmp_path, disk) as place:
        for sent in (b"", option(99, b"abc")[:-1], go(), go() + request(Command.WRITE, 0, 4096, data=b"x" * 4095)):
            with Speaker(place) as client:
                client.say(sent)
        with Speaker(place) as client:
            client.begin()
            client.say(request(Command.READ, 0, 1 << 20) * 20)  # and takes none of it
        with Speaker(place) as client:
            client.begin()
            assert client.read(0, 1 << 20) == bytes(1 << 20), "a write that did not come whole is not done"


def test_deadlines() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours)
    with theirs:
        with pytest.raises(ConnectionLostError, match=r"sent 0 of 5 bytes in 0\.1 s"):
            connection.receive(5, 0.1)
        theirs.sendall(b"abc")
        with pytest.raises(ConnectionLostError, match=r"sent 3 of 5 bytes in 0\.1 s"):
            connection.receive(5, 0.1, may_idle=True)
        with pytest.raises(ConnectionLostError, match=r"did not take the last \d+ bytes"):
            connection.send([b"head", bytes(8 << 20)], 0.1)
    with pytest.raises(ConnectionLostError, match="gone"):
        connection.send([b"head"], 1)
    connection.close()


def test_memory_of_all_clients_together() -> None:
    budget = Budget(100)
    with budget.take(60):
        with pytest.raises(ConnectionLostError, match="hold all memory"), budget.take(41, 0.05):
            pass
        with budget.take(40):
            pass
    with budget.take(100):
        pass


def test_too_many_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_server, "MAX_CONNECTIONS", 1)
    with serving(tmp_path, MemoryBlob(CONTENT)) as place, Speaker(place) as client:
        with pytest.raises((EOFError, OSError)):
            Speaker(place)
        client.begin()
        assert client.read(0, 1) == CONTENT[:1]


def test_where_it_listens(tmp_path: Path) -> None:
    export, place = NbdExport(MemoryBlob(CONTENT)), tmp_path / "nbd.sock"
    with serving(tmp_path, MemoryBlob(CONTENT)), pytest.raises(DeviceError, match="another server listens there"):
        NbdServer(export, place)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place))
    with serving(tmp_path, MemoryBlob(CONTENT)), Speaker(place) as client:
        client.begin()
    place.write_text("mine")
    with pytest.raises(DeviceError, match="a file that is no socket"):
        NbdServer(export, place)
    assert place.read_text() == "mine"
    with pytest.raises(DeviceError, match="No such file"):
        NbdServer(export, tmp_path / "none" / "nbd.sock")


def test_many_clients_at_once(tmp_path: Path) -> None:
    disk, failures = MemoryWritable(1 << 20), []

    def work(place: Path, number: int) -> None:
        chance, base, size = random.Random(number), number << 17, 1 << 17
        model = bytearray(size)
        try:
            with Speaker(place) as client:
                client.begin()
                for _ in range(150):
                    at = chance.randrange(size - 1)
                    length = chance.randint(1, min(9000, size - at))
                    if chance.random() < 0.5:
                        data = chance.randbytes(length)
                        client.say(request(Command.WRITE, base + at, length, data=data))
                        assert client.simple() == (1, 0, b"")
                        model[at : at + length] = data
                    else:
                        assert client.read(base + at, length) == model[at : at + length]
        except BaseException as error:
            failures.append(error)

    def threads(place: Path, run: Callable[[Path, int], None]) -> list[threading.Thread]:
        return [threading.Thread(target=run, args=(place, number)) for number in range(8)]

    with serving(tmp_path, disk) as place:
        started = threads(place, work)
        for thread in started:
            thread.start()
        for thread in started:
            thread.join(120)
    assert not failures
