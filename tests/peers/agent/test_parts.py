"""The agent's parts by themselves: what it accepts, signatures, lists of agents, routes, transfers."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.call import Call
from obdlab.errors import SourceError
from obdlab.formats.hashtree import TreeReference
from obdlab.peers.agent import rights
from obdlab.peers.agent.asked import HOPS_HEADER, MOST_HOPS, Asked, RefusedError, Rules, parse_range
from obdlab.peers.agent.fetcher import Wanted
from obdlab.peers.agent.members import Members, MembersError, parse_members
from obdlab.peers.agent.rights import Rights
from obdlab.peers.agent.route import Router
from obdlab.peers.agent.sharedblob import Recent, SharedBlob
from obdlab.peers.agent.signature import SIGNATURE_HEADER, VALID_S, is_signed, sign
from obdlab.peers.agent.starting import PeerOptionsError, read_key
from obdlab.peers.agent.tallies import Tallies
from obdlab.peers.agent.transfer import Transfer
from obdlab.peers.agent.trees import MANAGED, ComputedTrees, Manager
from obdlab.peers.agent.watch import WAITS_HEADER, State, look
from obdlab.registry.errors import RegistryError
from obdlab.registry.p2p import BLOB_HEADER, TREE_HEADER
from obdlab.registry.reference import Repository

HEX, OTHER = "a" * 64, "b" * 64
URL = f"https://registry.example/v2/lib/app/blobs/sha256:{HEX}"
RULES = Rules("peer", frozenset({"registry.example", "127.0.0.1:5000"}))
REPOSITORY = Repository("registry.example", "lib/app")


@pytest.mark.parametrize(
    ("target", "headers", "wanted"),
    [
        (f"/peer/{URL}", {}, Asked(REPOSITORY, f"sha256:{HEX}")),
        (f"/v2/lib/app/blobs/sha256:{HEX}?ns=registry.example", {}, Asked(REPOSITORY, f"sha256:{HEX}")),
        (f"/peer/{URL}", {HOPS_HEADER: "a, b"}, Asked(REPOSITORY, f"sha256:{HEX}", hops=("a", "b"))),
        (
            f"/peer/{URL}",
            {TREE_HEADER: f"sha256:{OTHER},sha256:{HEX}"},
            Asked(REPOSITORY, f"sha256:{HEX}", TreeReference(f"sha256:{OTHER}", f"sha256:{HEX}")),
        ),
        # A reader that was redirected: the storage's URL is not used, the registry's is.
        (
            f"/peer/https://storage.example/docker/sha256/aa/{HEX}/data?signature=1",
            {BLOB_HEADER: URL},
            Asked(REPOSITORY, f"sha256:{HEX}"),
        ),
        (f"/peer/{URL[:-64]}{OTHER}", {BLOB_HEADER: URL}, 400),
        (f"/peer/https://storage.example/docker/sha256/bb/{OTHER}/data", {BLOB_HEADER: URL}, 400),
        ("/peer/https://registry.example/v2/lib/app/manifests/latest", {}, 400),
        (f"/peer/https://registry.example/v2/lib/../app/blobs/sha256:{HEX}", {}, 400),
        (f"/peer/https://user@registry.example/v2/lib/app/blobs/sha256:{HEX}", {}, 400),
        (f"/peer/file:///v2/lib/app/blobs/sha256:{HEX}", {}, 400),
        (f"/peer/{URL}", {TREE_HEADER: "sha256:1"}, 400),
        (f"/peer/{URL}", {HOPS_HEADER: "a b/c"}, 400),
        (f"/peer/http://169.254.169.254/v2/lib/app/blobs/sha256:{HEX}", {}, 403),
        (f"/peer/{URL.replace('https', 'http')}", {}, 403),
        (f"/v2/lib/app/blobs/sha256:{HEX}?ns=other.example", {}, 403),
        (f"/v2/lib/app/blobs/sha256:{HEX}", {}, 404),
        ("/v2/lib/app/manifests/latest?ns=registry.example", {}, 404),
        (f"/other/{URL}", {}, 404),
        (f"/peer/{URL}", {HOPS_HEADER: "a,me,b"}, 508),
        (f"/peer/{URL}", {HOPS_HEADER: ",".join(map(str, range(MOST_HOPS + 1)))}, 508),
    ],
)
def test_what_is_accepted(target: str, headers: dict[str, str], wanted: Asked | int) -> None:
    if isinstance(wanted, int):
        with pytest.raises(RefusedError) as refusal:
            RULES.parse(target, headers, "me")
        assert refusal.value.status == wanted
    else:
        assert RULES.parse(target, headers, "me") == wanted


def test_a_loopback_registry_needs_no_tls() -> None:
    asked = RULES.parse(f"/peer/http://127.0.0.1:5000/v2/a/blobs/sha256:{HEX}", {}, "me")
    assert asked.url == f"http://127.0.0.1:5000/v2/a/blobs/sha256:{HEX}"


@given(size=st.integers(1, 50), first=st.integers(0, 60), last=st.integers(0, 60))
def test_ranges(size: int, first: int, last: int) -> None:
    for text, wanted in (
        (f"bytes={first}-{last}", range(size)[first : last + 1] if last >= first else range(0)),
        (f"bytes={first}-", range(size)[first:]),
        (f"bytes=-{last}", range(size)[-last:] if last else range(0)),
    ):
        if wanted:
            assert parse_range(text, size) == (wanted[0], wanted[-1] + 1)
        else:
            with pytest.raises(RefusedError) as refusal:
                parse_range(text, size)
            assert refusal.value.status == 416


@pytest.mark.parametrize("text", ["bytes=0-1,3-4", "bytes=-", "items=0-1", "bytes=a-b", "bytes=0 - 1"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        parse_range(text, 100)


def test_a_signature_is_for_one_request_one_receiver_and_one_minute() -> None:
    key, now = b"k" * 16, 1_000_000.0
    headers = {"Range": "bytes=0-9", HOPS_HEADER: "me", TREE_HEADER: "t"}
    headers[SIGNATURE_HEADER] = sign(key, "a1", "/x", headers, now)
    assert is_signed(key, "a1", "/x", headers, now + VALID_S - 1)
    assert not is_signed(key, "a1", "/x", headers, now + VALID_S + 2)
    assert not is_signed(key, "a1", "/x", headers, now - VALID_S - 2)
    assert not is_signed(key, "a2", "/x", headers, now)
    assert not is_signed(key, "a1", "/y", headers, now)
    assert not is_signed(b"l" * 16, "a1", "/x", headers, now)
    assert not is_signed(b"", "a1", "/x", {**headers, SIGNATURE_HEADER: sign(b"", "a1", "/x", headers, now)}, now)
    for name in ("Range", HOPS_HEADER, TREE_HEADER):
        assert not is_signed(key, "a1", "/x", {**headers, name: "other"}, now)
    for text in ("", "1", "x:y", ":", f"{int(now)}:é"):
        assert not is_signed(key, "a1", "/x", {**headers, SIGNATURE_HEADER: text}, now)


def test_a_key_that_others_may_read_or_guess_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"0123456789abcdef\n")
    path.chmod(0o640)
    with pytest.raises(PeerOptionsError, match="640"):
        read_key(path)
    path.chmod(0o600)
    assert read_key(path) == b"0123456789abcdef"
    path.write_bytes(b"short")
    with pytest.raises(PeerOptionsError, match="16"):
        read_key(path)


def test_lists_of_agents(tmp_path: Path) -> None:
    found = parse_members("10.0.0.1:80 a@h:81, [::1]:9 # no\n\nb@h:82", "here")
    assert {id_: each.address for id_, each in found.items()} == {
        "10.0.0.1:80": "10.0.0.1:80",
        "a": "h:81",
        "[::1]:9": "[::1]:9",
        "b": "h:82",
    }
    for text in ("host", "host:0", "host:99999", "a b@h:1 c@", "a/b@h:1"):
        with pytest.raises(MembersError):
            parse_members(text, "here")
    path = tmp_path / "members"
    path.write_text("a@h:1")
    members = Members(f"file:{path}", "me")
    assert set(members.known) == {"a", "me"}
    path.write_text("b@h:1")
    assert members.look()
    assert set(members.known) == {"b", "me"}
    assert not members.look()
    path.write_text("nonsense")
    with pytest.raises(MembersError):
        members.look()
    assert set(members.known) == {"b", "me"}, "a list that is wrong leaves the last one"
    assert set(Members("dns:localhost:9731", "me").known) > {"me"}
    for source in ("file:", "k8s:x", f"file:{path}.gone", "dns:localhost"):
        with pytest.raises(MembersError):
            Members(source, "me")


def test_routes_go_past_agents_that_failed_or_lied() -> None:
    ids = [f"a{number}" for number in range(40)]
    members = Members("static:" + ",".join(f"{id_}@h:1" for id_ in ids), ids[0])
    router = Router(members, ComputedTrees(ids[0], members, 2))
    digests = (f"sha256:{number:064x}" for number in range(1000))
    digest = next(digest for digest in digests if router.route(digest, 0).depth >= 4)
    parent, other = router.route(digest, 0).members
    assert router.failed(parent.id)
    assert not router.failed(parent.id), "it was not well any more"
    assert router.route(digest, 0).members[0] == other
    router.ban(other.id, digest)
    assert not {parent, other} & set(router.route(digest, 0).members)
    assert router.re_parented == 2
    assert Router(members, None).route(digest, 0).members == ()


def test_one_silence_is_forgiven() -> None:
    router = Router(Members("static:a@h:1", "me"), None)
    assert not router.silent("a")
    router.worked("a")
    assert not router.silent("a")
    assert router.silent("a")


def test_readers_of_a_transfer_get_all_of_it_whenever_they_come() -> None:
    data = os.urandom(1000)
    transfer = Transfer(500, 1500)
    found: list[bytes] = []

    def read() -> None:
        got, offset = b"", 500
        while offset < 1500:
            piece = transfer.after(offset, time.monotonic() + 60)
            got, offset = got + piece, offset + len(piece)
        found.append(got)

    threads = [threading.Thread(target=read) for _ in range(3)]
    threads[0].start()
    transfer.add(data[:300])
    threads[1].start()
    transfer.add(data[300:])
    transfer.finish()
    threads[2].start()
    for thread in threads:
        thread.join(60)
    assert found == [data] * 3
    with pytest.raises(ValueError, match="1001"):
        transfer.add(b"x")


def test_readers_of_a_failed_transfer_get_what_came_and_then_the_error() -> None:
    transfer = Transfer(0, 10)
    transfer.add(b"abc")
    transfer.finish(OSError("broken"))
    assert transfer.after(1, time.monotonic()) == b"bc"
    with pytest.raises(OSError, match="broken"):
        transfer.after(3, time.monotonic())
    with pytest.raises(TimeoutError):
        Transfer(0, 10).after(0, time.monotonic() + 0.01)


@pytest.mark.parametrize("topology", MANAGED)
def test_a_manager_gives_places_and_takes_out_only_agents_that_are_gone(topology: str) -> None:
    ids = [f"a{number}" for number in range(12)]
    members = Members("static:" + ",".join(f"{id_}@{id_}:1" for id_ in ids), "a0")
    dead: set[str] = set()
    manager = Manager("a0", members, topology, 2, alive=lambda address: address not in dead)
    digest = f"sha256:{HEX}"
    places = {id_: manager.place(digest, id_, "") for id_ in ids[1:]}
    assert all(id_ not in above for id_, above in places.items())
    children = [above[0] for above in places.values() if above]
    assert max(map(children.count, children)) == 2
    deepest = max(places, key=lambda id_: len(places[id_]))
    parent = places[deepest][0]
    assert manager.place(digest, deepest, parent)[0] == parent, "a child alone put its parent out"
    dead.add(f"{parent}:1")
    assert parent not in manager.place(digest, deepest, parent)
    assert manager.left == 1
    # The manager is never put out, and a stranger cannot be.
    dead.add("a0:1")
    manager.place(digest, deepest, "a0")
    manager.place(digest, deepest, "stranger")
    assert manager.left == 1


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server that reads one request of each connection and calls ``answer``; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.recv(4096)
                    answer(connection)
                except OSError:
                    pass

        def accept() -> None:
            threads = []
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    break
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()
            for thread in threads:
                thread.join()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", State.ALIVE),
        (f"HTTP/1.1 204 No Content\r\n{WAITS_HEADER.lower()}: yes\r\n\r\n".encode(), State.WAITS),
        (b"HTTP/1.1 500 No\r\n\r\n", State.DEAD),
        (b"HTTP/1.1 204 No Content\r\n", State.DEAD),
        (b"HTTP/1.1 204 No Content\r\n" + b"X: y\r\n" * 4096 + b"\r\n", State.DEAD),
        (b"\r\n\r\n", State.DEAD),
        (b"", State.DEAD),
    ],
)
def test_an_agent_is_alive_if_it_answers_so(answer: bytes, state: State) -> None:
    with answering(lambda connection: connection.sendall(answer)) as address:
        assert look(address, f"sha256:{HEX}", 5) is state


def test_where_nothing_listens_no_agent_is_alive() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert look(f"127.0.0.1:{probe.getsockname()[1]}") is State.DEAD


def test_an_agent_that_drips_its_answer_does_not_hold_the_probe() -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 204 No Content\r\nX: ")
        while not over.wait(0.05):
            connection.sendall(b"x")

    with answering(drip) as address:
        found: list[State] = []
        thread = threading.Thread(target=lambda: found.append(look(address)))
        thread.start()
        thread.join(60)
        ended = list(found)
        over.set()
        thread.join()
    assert ended == [State.DEAD], "the probe waits for the end of the answer"


def test_askers_behind_a_silent_registry_do_not_wait_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "_ASK_S", 0.2)
    asked, answer = threading.Semaphore(0), threading.Event()

    def blob_size(repository: Repository, digest: str, call: Call) -> int:
        asked.release()
        answer.wait(120)  # longer than its call's deadline
        return 5

    client: Any = SimpleNamespace(blob_size=blob_size)
    asking = Rights(client, client, client)
    errors: list[RegistryError] = []

    def ask() -> None:
        try:
            asking.of(REPOSITORY, f"sha256:{HEX}")
        except RegistryError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    threads[0].start()
    assert asked.acquire(timeout=60)
    for thread in threads[1:]:
        thread.start()
    end = time.monotonic() + 60
    try:
        for thread in threads[1:]:
            thread.join(max(0.0, end - time.monotonic()))
        assert len(errors) == 19
        assert all(error.temporary and error.timed_out for error in errors)
        assert not asked.acquire(blocking=False), "two asked at once"
    finally:
        answer.set()
        for thread in threads:
            thread.join()
    # The answer that came late counts for the next ones.
    assert asking.of(REPOSITORY, f"sha256:{HEX}") == rights.Known(5, public=True)
    assert len(errors) == 19


class _Units:
    """The part of CachedUnits that a shared blob uses: nothing is there, and ``store`` waits."""

    def __init__(self) -> None:
        self.files = SimpleNamespace(unit=4, units=1, present=lambda first, stop: [False], close=self._close)
        self.storing, self.go_on, self.closed = threading.Event(), threading.Event(), False

    def _close(self) -> None:
        self.closed = True

    def load(self, first: int, stop: int) -> bytes:
        return b""

    def reattach(self) -> None:
        pass

    def store(self, first: int, data: bytes) -> bool:
        self.storing.set()
        self.go_on.wait(60)
        assert not self.closed, "stored into files that are closed"
        return True


def shared_blob(units: Any, pool: ThreadPoolExecutor) -> SharedBlob:
    fetcher: Any = SimpleNamespace(fetch=lambda wanted, transfer, hops: transfer.add(b"data"))
    wanted = Wanted(Asked(REPOSITORY, f"sha256:{HEX}"), 4, None, whole=False, peers=False)
    return SharedBlob(wanted, units, None, fetcher, pool, Recent(1 << 20), Tallies())


def test_a_blob_is_not_closed_before_its_last_transfer_is_stored() -> None:
    units = _Units()
    with ThreadPoolExecutor(1) as pool:
        blob = shared_blob(units, pool)
        assert blob.hold()
        assert b"".join(piece for piece, _ in blob.read(0, 4, (), 60.0)) == b"data"
        blob.release()
        assert units.storing.wait(60)
        assert not blob.close_unused(), "closed while a transfer is being stored"
        units.go_on.set()
    assert blob.close_unused()
    assert units.closed


def test_a_transfer_that_cannot_begin_holds_no_blob_open() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    blob = shared_blob(_Units(), pool)
    assert blob.hold()
    with pytest.raises(SourceError, match="ending"):
        list(blob.read(0, 4, (), 60.0))
    blob.release()
    assert blob.close_unused()
