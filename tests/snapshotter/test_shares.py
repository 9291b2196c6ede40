"""A registry that never answers delays no container but its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from obdlab.containerd._pb import snapshots_pb2 as pb
from obdlab.errors import SourceError
from obdlab.formats import oci
from obdlab.image.config import ImageConfig
from obdlab.server.host import MAX_REQUESTS
from obdlab.snapshotter import shares
from obdlab.snapshotter.errors import AlreadyExistsError
from obdlab.snapshotter.service import _WORKERS
from obdlab.snapshotter.shares import Bounds, BusyRegistryError, Shares, registry_of
from tests import capabilities
from tests.containerd_host import SnapshotterProcess
from tests.registry.server import RegistryServer, registry_server
from tests.snapshotter import imagefiles
from tests.snapshotter.wire import WireSnapshotter

__all__ = ["registry_server"]

_DEADLINE_S = 120.0


@pytest.fixture
def snapshotter(tmp_path: Path) -> Iterator[SnapshotterProcess]:
    capabilities.require("kernel")
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"open_deadline_s": 600, "request_timeout_s": 600, "index_at_pull": False}))
    process = SnapshotterProcess(tmp_path / "s", "--settings", str(settings))
    process.start()
    yield process
    process.stop(signal.SIGKILL)
    # The device host's own processes would wait for the registry until the deadline. One that is forked while they
    # are listed is found the next time.
    while pids := list(_processes_of(process.run_dir)):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    process.take_down()


def _processes_of(run_dir: Path) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended; one that is dead and not reaped has no command line
            if str(run_dir) in (entry / "cmdline").read_text():
                yield int(entry.name)


def pull(wire: WireSnapshotter, repository: str, digest: str, size: int) -> str:
    """Pull an image of one layer; return its snapshot."""
    labels = {
        "containerd.io/snapshot.ref": digest,
        "containerd.io/snapshot/image-ref": f"{repository}:1",
        oci.BLOB_DIGEST: digest,
        oci.BLOB_SIZE: str(size),
    }
    with pytest.raises(AlreadyExistsError):
        wire.prepare(f"extract-{digest}", "", labels)
    return digest


class Silent:
    """Registries that accept connections and never answer; notes the digests that they were asked for."""

    def __init__(self, count: int, kept: ExitStack) -> None:
        self._listeners = [
            kept.enter_context(socket.create_server(("127.0.0.1", 0), backlog=MAX_REQUESTS * 2)) for _ in range(count)
        ]
        self._kept = kept
        self.places = [f"127.0.0.1:{listener.getsockname()[1]}/a/b" for listener in self._listeners]
        self.asked_for: set[str] = set()

    def wait_for(self, attaches: int) -> None:
        """Wait until so many images are being attached."""
        deadline = time.monotonic() + _DEADLINE_S
        while len(self.asked_for) < attaches:
            ready = select.select(self._listeners, [], [], deadline - time.monotonic())[0]
            assert ready, f"only {len(self.asked_for)} attaches in time"
            for listener in ready:
                connection = self._kept.enter_context(listener.accept()[0])
                connection.settimeout(_DEADLINE_S)
                self.asked_for.update(re.findall(r"sha256:[0-9a-f]{64}", connection.recv(4096).decode()))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("names", "calls", "attaches"), [(1, 112, 10), (40, MAX_REQUESTS + 20, 60)], ids=["one", "forty"]
)
def test_silent_registries_delay_no_other_image(
    snapshotter: SnapshotterProcess, registry_server: RegistryServer, names: int, calls: int, attaches: int
) -> None:
    wire = WireSnapshotter(str(snapshotter.address))
    (layer, *_), _ = imagefiles.golden_layers()
    image = imagefiles.push(registry_server.host, "shares/good", *imagefiles.image_documents([layer], compress=False))
    good = pull(wire, image.rpartition(":")[0], oci.digest_of(layer), len(layer))
    with ExitStack() as kept:
        silent = Silent(names, kept)
        waiting = []
        for number in range(calls):
            digest = f"sha256:{hashlib.sha256(bytes([number])).hexdigest()}"
            parent = pull(wire, silent.places[number % names], digest, 1000)
            request = pb.PrepareSnapshotRequest(key=f"silent-{number}", parent=parent)
            waiting.append(wire._stub.Prepare.future(request, timeout=600))
        silent.wait_for(attaches)  # as many as they get at least, in whichever order they come
        assert wire.prepare("container", good, {})
        assert {snapshot.key for snapshot in wire.walk(["kind==active"])} == {"container"}
        assert not any(call.done() for call in waiting)
        for call in waiting:
            call.cancel()
    wire.close()


def test_the_bounds_fit_together() -> None:
    assert shares.CALLS.firsts < shares.CALLS.unproven < shares.CALLS.most < _WORKERS
    assert shares.ATTACHES.firsts < shares.ATTACHES.unproven < shares.ATTACHES.most < MAX_REQUESTS
    assert shares.ATTACHES.firsts <= shares.CALLS.firsts


def taken_by(share: Shares, registry: str, kept: ExitStack) -> tuple[int, int]:
    """Take all calls and attaches that a registry gets, until ``kept`` is left; return how many these are."""
    counts = []
    for take in (lambda: share.call(registry), lambda: share.attach(registry, 0)):
        count = 0
        with suppress(BusyRegistryError):
            while True:
                kept.enter_context(take())
                count += 1
        counts.append(count)
    return counts[0], counts[1]


def test_registries_that_never_answer_leave_room_for_others() -> None:
    share = Shares()
    with share.attach("proven", 0):
        pass
    with ExitStack() as kept:
        found = [taken_by(share, f"silent {number}", kept) for number in range(8)]
        assert found[0] == (112, 10)
        assert sum(attaches for _, attaches in found) == 41
        for number in range(3):
            with share.call(f"new {number}"), share.attach(f"new {number}", 0):
                pass
        for number in range(8, 80):  # until unproven registries have all that they can have together
            taken_by(share, f"silent {number}", kept)
        assert taken_by(share, "another", kept) == (0, 0)
        assert taken_by(share, "proven", kept) == (37, 4)
    with ExitStack() as kept:  # all have been given back
        assert taken_by(share, "another", kept) == (112, 10)


def test_a_new_registry_has_room_beside_as_many_silent_ones_as_the_reserve_has_places() -> None:
    share = Shares()
    with ExitStack() as kept:
        for number in range(shares.ATTACHES.firsts):
            calls, attaches = taken_by(share, f"silent {number}", kept)
            assert calls >= 1
            assert attaches >= 1
            with share.call("new"), pytest.raises(SourceError, match="no success"), share.attach("new", 0):
                raise SourceError("no success")


def test_a_registry_is_proven_by_a_success_and_stays_so() -> None:
    share = Shares(attaches=Bounds(8, 1, 0, 4))
    with pytest.raises(SourceError, match="down"), share.attach("a", 0):
        raise SourceError("down")
    with share.attach("a", 0), pytest.raises(BusyRegistryError), share.attach("b", 0):
        pass
    with pytest.raises(SourceError, match="down"), share.attach("a", 0):
        raise SourceError("down")
    with share.attach("a", 0), share.attach("b", 0):
        pass


def test_a_thousand_registries_are_remembered() -> None:
    share = Shares()
    for number in range(1025):
        with share.attach(f"registry {number}", 0):
            pass
        with share.attach("usual", 0):
            pass
    assert len(share._proven) == 1024
    assert "usual" in share._proven
    assert "registry 0" not in share._proven
    assert "registry 1024" in share._proven


def test_calls_beyond_the_share_are_refused_at_once() -> None:
    share = Shares(calls=Bounds(9, 6, 0, 2))
    with share.call("a"), share.call("a"):
        with (
            pytest.raises(BusyRegistryError, match=r"registry a: 2 calls wait for it already, 2 for all"),
            share.call("a"),
        ):
            pass
        with share.call("b"), share.call("c"):
            with pytest.raises(SourceError, match=r"registry b: 1 calls .*, 4 for all"), share.call("b"):
                pass
            full = pytest.raises(SourceError, match=r"registry f: 0 calls .*, 6 for all")
            with share.call("d"), share.call("e"), full, share.call("f"):
                pass
    for _ in range(3):
        with share.call("a"), share.call("a"):
            pass


def test_an_attach_waits_for_its_registrys_others_alone() -> None:
    share = Shares(attaches=Bounds(4, 4, 0, 4))
    begun = threading.Event()

    def attach() -> float:
        begun.set()
        with share.attach("a", _DEADLINE_S):
            return time.monotonic()

    with ThreadPoolExecutor(1) as pool:
        with share.attach("a", 0):
            waiting = pool.submit(attach)
            assert begun.wait(_DEADLINE_S)
            with share.attach("b", 0):
                assert not waiting.done()
            busy = pytest.raises(BusyRegistryError, match=r"registry a: 1 attaches have waited for it for 0 s, 1 for")
            with busy, share.attach("a", 0):
                pass
            left_s = time.monotonic()
        assert waiting.result(_DEADLINE_S) >= left_s


def test_the_registry_of_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.v1.json"
    assert registry_of(path) == ""
    for url, wanted in (("https://host:5/v2/a/blobs", "host:5"), ("", ""), ("http://[::1/v2", "")):
        ImageConfig(repo_blob_url=url).save(path)
        assert registry_of(path) == wanted
    path.write_text("not JSON")
    assert registry_of(path) == ""
