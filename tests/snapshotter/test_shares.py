"""A registry that never answers delays no container but its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
from obdlab.snapshotter.shares import BusyRegistryError, Shares, registry_of
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
    # The device host's own processes would wait for the registry until the deadline.
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(process.run_dir) in (entry / "cmdline").read_text():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            pass  # has ended
    process.take_down()


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


@pytest.mark.kernel
def test_a_silent_registry_delays_no_other_image(
    snapshotter: SnapshotterProcess, registry_server: RegistryServer
) -> None:
    wire = WireSnapshotter(str(snapshotter.address))
    (layer, *_), _ = imagefiles.golden_layers()
    image = imagefiles.push(registry_server.host, "shares/good", *imagefiles.image_documents([layer], compress=False))
    good = pull(wire, image.rpartition(":")[0], oci.digest_of(layer), len(layer))
    with socket.create_server(("127.0.0.1", 0), backlog=MAX_REQUESTS * 2) as silent, ExitStack() as kept:
        place = f"127.0.0.1:{silent.getsockname()[1]}/a/b"
        calls = []
        for number in range(MAX_REQUESTS + 20):
            digest = f"sha256:{hashlib.sha256(bytes([number])).hexdigest()}"
            request = pb.PrepareSnapshotRequest(key=f"silent-{number}", parent=pull(wire, place, digest, 1000))
            calls.append(wire._stub.Prepare.future(request, timeout=600))
        silent.settimeout(_DEADLINE_S)
        for _ in range(shares.MOST_ATTACHES):
            kept.enter_context(silent.accept()[0])
        assert wire.prepare("container", good, {})
        assert {snapshot.key for snapshot in wire.walk(["kind==active"])} == {"container"}
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()
    wire.close()


def test_the_bounds_fit_together() -> None:
    assert shares.MOST_CALLS < shares.MOST_CALLS_TOGETHER < _WORKERS
    assert shares.MOST_ATTACHES * 4 <= MAX_REQUESTS


def test_calls_beyond_the_share_are_refused_at_once() -> None:
    share = Shares(calls=2, calls_together=3)
    with share.call("a"), share.call("a"):
        with (
            pytest.raises(BusyRegistryError, match=r"registry a: 2 calls wait for it already, 2 for all"),
            share.call("a"),
        ):
            pass
        with share.call("b"), pytest.raises(SourceError, match=r"registry b: 1 calls .*, 3 for all"), share.call("b"):
            pass
        with share.call("b"):
            pass
    for _ in range(3):
        with share.call("a"), share.call("a"):
            pass


def test_an_attach_waits_for_its_registrys_others_alone() -> None:
    share = Shares(attaches=1)
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
            busy = pytest.raises(BusyRegistryError, match=r"registry a: 1 attaches have waited for it for 0 s")
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
