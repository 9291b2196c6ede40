"""Agents as processes on loopback: every byte is right, whatever happens to other agents, and pauses are short."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from obdlab.blob import Blob
from obdlab.image.config import LowerConfig
from obdlab.image.remote import RemoteLayers
from obdlab.peers.agent.asked import HOPS_HEADER
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.p2p import TREE_HEADER, P2PProxy
from obdlab.registry.remoteblob import RemoteBlob
from obdlab.settings.settings import Settings
from tests.peers.agent.swarm import WAIT_S, Image, Read, Swarm, all_at_once, make_image, running_swarm
from tests.registry.faulty import Answer, FaultyRegistry, faulty_registry

SIZE = 3_000_000
#: Longest pause of a reader that the design allows; other processes on the test's machine may add to it.
PAUSE_S = 2.0


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with faulty_registry() as registry:
        yield registry


def throttled(answer: Answer) -> None:
    """Send about 1 MiB/s, so that a test can do something in the middle."""
    answer.handler.start(answer.status, {**answer.headers, "Content-Length": str(len(answer.body))})
    for at in range(0, len(answer.body), 1 << 15):
        answer.handler.wfile.write(answer.body[at : at + (1 << 15)])
        if answer.handler.closing.wait(0.03):
            return


def chosen(swarm: Swarm, image: Image, depth: int) -> list[str]:
    """Return an agent that deep in the blob's tree and all above it, the root last."""
    parents = swarm.parents(image)
    for id_ in parents:
        chain = [id_]
        while (above := parents[chain[-1]]) is not None:
            chain.append(above)
        if len(chain) == depth + 1:
            return chain
    raise AssertionError(f"no agent at depth {depth}: {parents}")


def check(swarm: Swarm, image: Image, reads: dict[str, Read], begin: int, end: int) -> None:
    for id_, read in reads.items():
        assert read.data == image.data[begin:end], (id_, read, swarm.log(id_)[-3000:])


def origin_bytes(swarm: Swarm, ids: list[str] | None = None) -> float:
    return sum(swarm.metric(id_, 'received_bytes_total{source="origin"}') for id_ in ids or swarm.processes)


def test_a_burst_of_cold_agents_reads_each_byte_from_the_registry_once(
    registry: FaultyRegistry, tmp_path: Path
) -> None:
    image = make_image(registry, SIZE)
    with running_swarm(registry, tmp_path, 5) as swarm:
        reads = all_at_once(swarm, list(swarm.addresses), image, 5000, SIZE - 5)
        check(swarm, image, reads, 5000, SIZE - 5)
        assert origin_bytes(swarm) <= 1.05 * (SIZE + len(image.tree.file)) + 32768
        root = next(iter(swarm.parents(image)))
        # At most two children, so at most two copies of a block leave an agent, to others.
        for id_ in swarm.addresses:
            assert swarm.metric(id_, 'sent_bytes_total{to="peer"}') <= 2.1 * (SIZE + len(image.tree.file))
        assert swarm.metric(root, 'sent_bytes_total{to="peer"}') >= SIZE * 0.99
        # What is cached is read from nowhere.
        before = len(registry.requests)
        for id_ in swarm.addresses:
            assert swarm.read(id_, image, 0, 1).data == image.data[:1]
            assert swarm.read(id_, image, SIZE - 1, SIZE).data == image.data[-1:]
        assert len(registry.requests) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", ["parent", "root"])
def test_an_agent_above_dies_or_stops_in_mid_body(
    number: int, victim: str, registry: FaultyRegistry, tmp_path: Path
) -> None:
    image = make_image(registry, SIZE)
    with running_swarm(registry, tmp_path, 5) as swarm:
        chain = chosen(swarm, image, 2)
        reader, hit = chain[0], chain[1 if victim == "parent" else 2]
        assert swarm.read(reader, image, 0, 1).data  # rights and tree are known now
        registry.always(throttled)
        found = {}
        thread = threading.Thread(target=lambda: found.update(read=swarm.read(reader, image, 20_000, SIZE)))
        thread.start()
        end = time.monotonic() + WAIT_S
        while swarm.metric(reader, 'sent_bytes_total{to="local"}') < 300_000 and time.monotonic() < end:
            time.sleep(0.01)
        swarm.signal(hit, number)
        thread.join(WAIT_S)
        read = found["read"]
        print(f"{victim} {number!r}: longest pause {read.longest_pause_s:.2f} s of {read.seconds:.2f} s")
        check(swarm, image, {reader: read}, 20_000, SIZE)
        assert read.longest_pause_s <= PAUSE_S
        assert sum(swarm.metric(id_, "failovers_total") for id_ in chain if id_ != hit) >= 1


def test_a_tenth_of_the_agents_dies_in_a_burst(registry: FaultyRegistry, tmp_path: Path) -> None:
    image = make_image(registry, SIZE)
    with running_swarm(registry, tmp_path, 10) as swarm:
        parents = swarm.parents(image)
        inner = [id_ for id_ in parents if id_ in parents.values()]
        victim = inner[1]  # not the root, and with children
        registry.always(throttled)
        readers = [id_ for id_ in swarm.addresses if id_ != victim]
        killer = threading.Timer(1.0, swarm.kill, [victim])
        killer.start()
        reads = all_at_once(swarm, readers, image, 0, SIZE)
        killer.join()
        print(f"longest pause {max(read.longest_pause_s for read in reads.values()):.2f} s")
        check(swarm, image, reads, 0, SIZE)
        assert max(read.longest_pause_s for read in reads.values()) <= 2 * PAUSE_S


@contextmanager
def false_agent(
    behave: Callable[[BaseHTTPRequestHandler, bytes], None], data: bytes
) -> Iterator[tuple[str, list[str]]]:
    """Run an agent that answers every range with what ``behave`` writes; return its address and its requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.startswith("/alive"):
                self.send_response(204)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            asked.append(str(self.headers))
            begin, end = (int(each) for each in self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Length", str(end + 1 - begin))
            self.send_header("Content-Range", f"bytes {begin}-{end}/{len(data)}")
            self.end_headers()
            behave(self, data[begin : end + 1])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _one_wrong_bit(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    at = len(data) // 2
    handler.wfile.write(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def _half(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def _nothing(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    time.sleep(4)


def _dribble(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    try:
        for at in range(0, len(data), 2000):
            handler.wfile.write(data[at : at + 2000])
            time.sleep(0.1)
    except OSError:
        pass


@pytest.mark.parametrize("behave", [_one_wrong_bit, _half, _nothing, _dribble])
def test_an_agent_above_that_lies_breaks_off_or_is_slow(
    behave: Callable[[BaseHTTPRequestHandler, bytes], None], registry: FaultyRegistry, tmp_path: Path
) -> None:
    # Of several blobs, one whose root is the false agent; the only other agent is its child.
    two = Swarm(registry, tmp_path, {"a0": "", "evil": ""})
    image = next(
        image
        for image in (make_image(registry, SIZE, seed) for seed in range(50))
        if next(iter(two.parents(image))) == "evil"
    )
    with (
        false_agent(behave, image.data) as (address, asked),
        running_swarm(registry, tmp_path, 1, strangers={"evil": address}) as swarm,
    ):
        read = swarm.read("a0", image, 100_000, 1_500_000)
        print(f"{behave.__name__}: longest pause {read.longest_pause_s:.2f} s of {read.seconds:.2f} s")
        check(swarm, image, {"a0": read}, 100_000, 1_500_000)
        assert read.longest_pause_s <= PAUSE_S
        assert asked, "the false agent was not asked"
        again = len(asked)
        if behave is _one_wrong_bit:
            assert "agent evil (" in swarm.log("a0")
            assert "dropped for this blob" in swarm.log("a0")
            assert swarm.metric("a0", "verification_failures_total") >= 1
            read = swarm.read("a0", image, 1_500_000, SIZE)
            check(swarm, image, {"a0": read}, 1_500_000, SIZE)
            assert len(asked) == again, "it is asked for this blob again"
        # Whatever is in the cache now is right.
        check(swarm, image, {"a0": swarm.read("a0", image, 0, SIZE)}, 0, SIZE)


def test_tokens_are_not_sent_to_other_agents_and_private_blobs_need_one(tmp_path: Path) -> None:
    with faulty_registry(auth="bearer") as registry:
        image = make_image(registry, 200_000)
        (tmp_path / "docker").mkdir()
        (tmp_path / "docker" / "config.json").write_text(
            json.dumps({"auths": {registry.host: {"username": registry.user, "password": registry.password}}})
        )
        with running_swarm(registry, tmp_path, 2) as swarm:
            root, child = swarm.parents(image)
            assert swarm.read(child, image, 0, 1000).status == 403, "a private blob was given to anybody"
            assert swarm.read(child, image, 0, 1000, {"Authorization": "Bearer wrong"}).status == 403
            # A device's client, whose own token is good, reads through the agent.
            credentials = Credentials({registry.host: (registry.user, registry.password)})
            proxy = P2PProxy(f"http://{swarm.addresses[child]}/peer")
            with closing(RegistryClient(credentials, p2p=proxy)) as client:
                blob = remote_blob(client, registry, image)
                assert blob.read_at(50_000, 100_000) == image.data[50_000:150_000]
            assert swarm.metric(child, 'received_bytes_total{source="peer"}') >= 100_000
            assert swarm.metric(root, 'sent_bytes_total{to="peer"}') >= 100_000
            for id_ in (root, child):
                assert "Bearer" not in swarm.log(id_)
            # Another agent that has no key gets nothing, with or without a signature.
            for headers in ({HOPS_HEADER: "stranger"}, {HOPS_HEADER: "stranger", "X-Obdlab-Signature": "1:00"}):
                assert swarm.read(root, image, 0, 1000, headers).status == 403


def remote_blob(client: RegistryClient, registry: FaultyRegistry, image: Image) -> Blob:
    aside = {TREE_HEADER: str(image.tree.reference)}
    return RemoteBlob(client, registry.repository(), image.digest, len(image.data), aside=aside)


def test_without_a_key_only_public_blobs_are_passed_on(registry: FaultyRegistry, tmp_path: Path) -> None:
    image = make_image(registry, 200_000)
    with running_swarm(registry, tmp_path, 2, keyed=False) as swarm:
        root, child = swarm.parents(image)
        check(swarm, image, {child: swarm.read(child, image, 0, 200_000)}, 0, 200_000)
        assert origin_bytes(swarm, [child]) <= len(image.tree.file)
        assert origin_bytes(swarm, [root]) >= 200_000


def test_a_blob_without_a_tree(registry: FaultyRegistry, tmp_path: Path) -> None:
    small, large = make_image(registry, 100_000, 2), make_image(registry, 5_000_000, 3)
    with running_swarm(registry, tmp_path, 2) as swarm:
        plain = {TREE_HEADER: ""}
        for image in (small, large):
            child = list(swarm.parents(image))[1]
            before = swarm.metric(child, 'received_bytes_total{source="peer"}')
            read = swarm.read(child, image, 10, 90_000, plain)
            check(swarm, image, {child: read}, 10, 90_000)
            came = swarm.metric(child, 'received_bytes_total{source="peer"}') - before
            # The small one came whole, and its digest was checked; nothing could check a part of the large one.
            assert came == (100_000 if image is small else 0)


def test_requests_that_went_round_are_cut(registry: FaultyRegistry, tmp_path: Path) -> None:
    image = make_image(registry, 100_000)
    with running_swarm(registry, tmp_path, 1, keyed=False) as swarm:
        assert swarm.read("a0", image, 0, 10, {HOPS_HEADER: "x,a0"}).status == 508
        assert swarm.metric("a0", "loops_total") == 1
        assert swarm.get("a0", swarm.url(image.digest), method="HEAD").status == 200
        assert swarm.get("a0", swarm.url(f"sha256:{'0' * 64}")).status == 404
        assert swarm.get("a0", "/peer/http://127.0.0.1:1/v2/a/blobs/sha256:" + "0" * 64).status == 403
        assert swarm.read("a0", image, 100_000, 100_001).status == 416


def test_a_registry_that_is_slow_to_answer_does_not_scatter_the_tree(
    registry: FaultyRegistry, tmp_path: Path
) -> None:
    image = make_image(registry, 600_000)

    def late(answer: Answer) -> None:
        answer.handler.closing.wait(2.5)
        answer.send()

    with running_swarm(registry, tmp_path, 4) as swarm:
        for id_ in swarm.addresses:
            assert swarm.read(id_, image, 0, 1).data
        before = origin_bytes(swarm)
        registry.always(late)
        reads = all_at_once(swarm, list(swarm.addresses), image, 50_000, 550_000)
        check(swarm, image, reads, 50_000, 550_000)
        assert origin_bytes(swarm) - before <= 1.1 * 550_000


def test_a_client_that_sends_half_a_request_is_hung_up_on(registry: FaultyRegistry, tmp_path: Path) -> None:
    with running_swarm(registry, tmp_path, 1) as swarm:
        host, _, port = swarm.addresses["a0"].rpartition(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
            connection.sendall(b"GET /alive HTTP/1.1\r\nX: ")
            assert connection.recv(1) == b""
        assert swarm.is_alive("a0")


def test_devices_share_the_cache_with_their_agents(registry: FaultyRegistry, tmp_path: Path) -> None:
    image = make_image(registry, SIZE)
    lower = LowerConfig(digest=image.digest, size=SIZE, hash_tree=str(image.tree.reference))
    with running_swarm(registry, tmp_path, 3) as swarm:

        def read(id_: str, found: dict[str, bytes]) -> None:
            settings = Settings(
                cache_dir=tmp_path / id_, p2p_address=f"http://{swarm.addresses[id_]}/peer", read_deadline_s=30
            )
            layers = RemoteLayers(registry.repository().blobs_url, settings)
            with closing(layers), closing(layers.open_layer(lower)) as blob:
                layers.opened()
                found[id_] = b"".join(blob.read_at(at, min(5000, SIZE - at)) for at in range(0, SIZE, 5000))

        found: dict[str, bytes] = {}
        began = time.monotonic()
        threads = [threading.Thread(target=read, args=(id_, found)) for id_ in swarm.addresses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        took = time.monotonic() - began
        print(f"three devices: {took:.2f} s")
        assert [found[id_] == image.data for id_ in swarm.addresses] == [True] * 3
        # A device that waits for its agent holds the units' locks; an agent that waited for these would wait for it.
        assert took < 10
        direct = [request for request in registry.blob_requests() if request.range != "bytes=0-0"]
        ranges = [request.range.removeprefix("bytes=").split("-") for request in direct if request.range]
        came = sum(int(end) + 1 - int(begin) for begin, end in ranges)
        assert came <= 1.2 * SIZE, [request.range for request in direct]


@pytest.mark.parametrize("topology", ["rooted", "redirect", "balanced"])
def test_trees_that_a_manager_keeps(topology: str, registry: FaultyRegistry, tmp_path: Path) -> None:
    image = make_image(registry, SIZE)
    with running_swarm(registry, tmp_path, 5, "--topology", topology, "--manager", "a0") as swarm:
        for id_ in swarm.addresses:
            assert swarm.read(id_, image, 0, 1).data == image.data[:1]
        reads = all_at_once(swarm, list(swarm.addresses), image, 0, SIZE // 2)
        check(swarm, image, reads, 0, SIZE // 2)
        assert origin_bytes(swarm) <= 1.05 * (SIZE // 2 + len(image.tree.file)) + 65536
        # Without their manager, agents go on in the trees that they know; then also without one of these agents.
        swarm.kill("a0")
        others = [id_ for id_ in swarm.addresses if id_ != "a0"]
        reads = all_at_once(swarm, others, image, SIZE // 2, SIZE - 400_000)
        check(swarm, image, reads, SIZE // 2, SIZE - 400_000)
        swarm.signal("a1", signal.SIGSTOP)
        reads = all_at_once(swarm, others[1:], image, SIZE - 400_000, SIZE)
        check(swarm, image, reads, SIZE - 400_000, SIZE)
        print(f"{topology}: longest pause {max(read.longest_pause_s for read in reads.values()):.2f} s")
        assert max(read.longest_pause_s for read in reads.values()) <= PAUSE_S


def test_an_agent_that_died_leaves_the_managers_tree(registry: FaultyRegistry, tmp_path: Path) -> None:
    image = make_image(registry, SIZE)
    with running_swarm(registry, tmp_path, 5, "--topology", "balanced", "--manager", "a0") as swarm:
        for id_ in swarm.addresses:  # in this order: a1 and a2 below a0, a3 and a4 below a1
            assert swarm.read(id_, image, 0, 1).data == image.data[:1]
        swarm.kill("a1")
        for begin in (100_000, 200_000):
            check(swarm, image, {"a3": swarm.read("a3", image, begin, begin + 50_000)}, begin, begin + 50_000)
        assert swarm.metric("a0", "left") == 1
        assert 1 <= swarm.metric("a0", "moved") <= 2
        before = swarm.metric("a3", 'received_bytes_total{source="peer"}')
        check(swarm, image, {"a3": swarm.read("a3", image, 500_000, 600_000)}, 500_000, 600_000)
        assert swarm.metric("a3", 'received_bytes_total{source="peer"}') > before


def test_a_request_cannot_name_another_blobs_tree_as_its_own(registry: FaultyRegistry, tmp_path: Path) -> None:
    one, other = make_image(registry, SIZE, 1), make_image(registry, 1_000_000, 2)
    with running_swarm(registry, tmp_path, 1, keyed=False) as swarm:
        file = other.tree.reference.file
        wrong = {TREE_HEADER: f"{one.tree.reference.root},{file}"}
        assert swarm.read("a0", one, 0, 1000, wrong).status == 400
        # The other blob, and the file of its tree, are served as if nothing had been.
        whole = swarm.get("a0", swarm.url(file))
        assert (whole.status, whole.data) == (200, other.tree.file)
        read = swarm.read("a0", other, 0, 1_000_000)
        assert read.status == 206
        check(swarm, other, {"a0": read}, 0, 1_000_000)
