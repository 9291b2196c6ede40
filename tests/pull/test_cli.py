"""The command ``obdlab image pull``."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from obdlab.cli import main
from obdlab.containerd.snapshots import Kind
from obdlab.formats.oci import OCI_CONFIG, OCI_MANIFEST, Descriptor, Manifest, digest_of
from tests.pull import images
from tests.pull.images import layer, push_image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.containerd.client import Containerd
    from obdlab.registry.client import RegistryClient
    from tests.containerd.host import ContainerdHost
    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry]


def arguments(host: ContainerdHost, containerd: Containerd, reference: str) -> list[str]:
    where = ["--address", host.address, "--namespace", containerd.namespace]
    return ["image", "pull", *where, "--snapshotter", "overlayfs", reference]


def test_summary(
    containerd: Containerd,
    containerd_host: ContainerdHost,
    registry: RegistryClient,
    registry_server: RegistryServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference, manifest = push_image(registry, f"{registry_server.host}/cli/ok", [layer({"a": b"1"})])
    assert main.main(arguments(containerd_host, containerd, str(reference))) == 0
    first = capsys.readouterr().out
    assert f"{reference} {digest_of(manifest.to_bytes())}" in first
    assert "1 unpacked" in first
    assert main.main(arguments(containerd_host, containerd, str(reference))) == 0
    assert "1 present" in capsys.readouterr().out
    assert main.main([*arguments(containerd_host, containerd, str(reference)), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main.main([*arguments(containerd_host, containerd, str(reference)), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["name"], document["digest"]) == (str(reference), digest_of(manifest.to_bytes()))
    assert [(each["digest"], each["outcome"]) for each in document["layers"]] == [
        (manifest.layers[0].digest, "present")
    ]
    assert document["layer_bytes"] == 0 < document["metadata_bytes"]


def test_environment_names_containerd(
    containerd: Containerd,
    containerd_host: ContainerdHost,
    registry: RegistryClient,
    registry_server: RegistryServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, _ = push_image(registry, f"{registry_server.host}/cli/environment", [layer({"a": b"e"})])
    monkeypatch.setenv("CONTAINERD_ADDRESS", f"unix://{containerd_host.address}")
    monkeypatch.setenv("CONTAINERD_NAMESPACE", containerd.namespace)
    monkeypatch.setenv("CONTAINERD_SNAPSHOTTER", "overlayfs")
    assert main.main(["image", "pull", str(reference)]) == 0
    assert containerd.images.get(str(reference)).name == str(reference)


@pytest.mark.parametrize(
    ("reference", "options", "said"),
    [
        ("127.0.0.1:1/UPPER", (), "malformed image reference"),
        ("127.0.0.1:1/no/registry", (), "127.0.0.1:1"),
        ("127.0.0.1:1/no/registry", ("--snapshotter", "absent"), "no snapshotter 'absent'"),
        (
            "127.0.0.1:1/no/registry",
            ("--address", "/nonexistent.sock"),
            "is containerd running at /nonexistent.sock? (",
        ),
    ],
)
def test_failures_are_told_in_one_line(
    containerd: Containerd,
    containerd_host: ContainerdHost,
    capsys: pytest.CaptureFixture[str],
    reference: str,
    options: tuple[str, ...],
    said: str,
) -> None:
    assert main.main([*arguments(containerd_host, containerd, reference), *options]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_registry_is_silent(
    containerd: Containerd, containerd_host: ContainerdHost, number: signal.Signals
) -> None:
    with stalling_registry() as (name, stalled, _):
        # The registry would hold the reader for much longer than this waits.
        status, errors = signal_while_stalled(arguments(containerd_host, containerd, name), stalled, number)
    assert status == 130, errors
    assert errors.strip().endswith("interrupted")
    assert containerd.snapshots("overlayfs").list() == []
    assert containerd.content.list() == []
    assert containerd.leases.list() == []
    assert "obdlab-" not in containerd_host.ctr("-n", containerd.namespace, "content", "active")


def test_pull_after_a_killed_one(containerd: Containerd, containerd_host: ContainerdHost) -> None:
    with stalling_registry() as (name, stalled, release):
        signal_while_stalled(arguments(containerd_host, containerd, name), stalled, signal.SIGKILL)
        snapshots = containerd.snapshots("overlayfs")
        assert [info.kind for info in snapshots.list()] == [Kind.ACTIVE]
        (lease,) = containerd.leases.list()
        release.set()
        assert main.main(arguments(containerd_host, containerd, name)) == 0
    assert containerd.leases.list() == [lease]
    # What the dead one had begun goes with its lease, which ends by itself.
    containerd.leases.delete(lease, sync=True)
    assert [info.kind for info in snapshots.list()] == [Kind.COMMITTED]
    assert containerd.images.get(name).name == name


def signal_while_stalled(command: list[str], stalled: threading.Event, number: signal.Signals) -> tuple[int, str]:
    """Run the command until the registry stalls, send the signal; return its exit status and errors."""
    process = subprocess.Popen(
        [sys.executable, "-m", "obdlab", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert stalled.wait(30)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(60)
    return process.returncode, errors


@contextmanager
def stalling_registry() -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """A registry that sends half a layer, sets one event, and goes on when the other is set."""
    bottom = layer({"stalls": os.urandom(100_000)})
    config = images.config_of([bottom])
    manifest = Manifest(Descriptor(OCI_CONFIG, digest_of(config), len(config)), (bottom.descriptor,)).to_bytes()
    stalled, release = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            media_type, data = "application/octet-stream", config
            if "/manifests/" in self.path:
                media_type, data = OCI_MANIFEST, manifest
            elif self.path.endswith(bottom.descriptor.digest):
                data = bottom.data
            self.send_response(200)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if data is not bottom.data:
                self.wfile.write(data)
                return
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            stalled.set()
            release.wait(60)
            with suppress(OSError):  # the reader may have been killed
                self.wfile.write(data[len(data) // 2 :])

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}/stalls/image:latest", stalled, release
    finally:
        release.set()
        server.shutdown()
        server.server_close()
        thread.join(60)


def test_a_malformed_platform_is_a_wrong_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["image", "pull", "127.0.0.1:1/no/registry", "--platform", "linux"])
    assert ended.value.code == 2
    assert "malformed platform" in capsys.readouterr().err
