"""Lazily pulled images whose registry, mount or snapshotter fails."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from obdlab.errors import ObdlabError
from obdlab.snapshotter.errors import AlreadyExistsError
from obdlab.system import mount
from tests.containerd_host import ObdlabHost
from tests.registry.server import RegistryServer, registry_server
from tests.snapshotter import imagefiles
from tests.snapshotter.test_core import DIGESTS, pull_labels
from tests.snapshotter.test_lazy_images import device_mounts, host, host_snapshots, image, run, top, wait_for, wire
from tests.snapshotter.wire import WireSnapshotter

__all__ = ["host", "image", "registry_server", "wire"]

pytestmark = pytest.mark.containerd


class SlowRegistry(BaseHTTPRequestHandler):
    """Knows no blob, and takes its time to say so."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        time.sleep(0.3)
        self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_failure_is_shared_by_all_who_waited(host: ObdlabHost, wire: WireSnapshotter) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowRegistry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    labels = pull_labels(image=f"127.0.0.1:{server.server_port}/nothing/here:1")
    with pytest.raises(AlreadyExistsError):
        wire.prepare("extract", "", labels)

    def start(number: int) -> str:
        with pytest.raises(ObdlabError) as caught:
            wire.prepare(f"c{number}", DIGESTS[0], {})
        return str(caught.value)

    wait_for(lambda: SlowRegistry.asked != [])  # the pull's own attempt, which goes on behind it
    SlowRegistry.asked.clear()
    alone = start(0)
    once = len(SlowRegistry.asked)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(start, range(8))) == {alone}
    assert "404" in alone
    # One attempt serves those who waited for it; who comes later gets another.
    assert 2 * once <= len(SlowRegistry.asked) <= 4 * once
    server.shutdown()
    server.server_close()
    assert wire.walk(["kind==active"]) == []


def test_a_kill_at_any_moment_of_an_attach(host: ObdlabHost, wire: WireSnapshotter, image: str) -> None:
    host.rpull(image)
    name, process = top(wire), host.snapshotter
    wire.prepare("warm", name, {})
    for number, delay_s in enumerate((0.0, 0.004, 0.008, 0.016, 0.032)):
        client = WireSnapshotter(str(process.address))
        for path in device_mounts(host):
            mount.unmount(path)
        for device in process.devices.list():
            process.devices.detach(device.device_id)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.prepare, f"cut{number}", name, {})
            time.sleep(delay_s)
            process.stop(signal.SIGKILL)
            call.exception()  # it may have been in time
        client.close()
        process.start()
        client = WireSnapshotter(str(process.address))
        client.prepare(f"next{number}", name, {})
        assert len(device_mounts(host)) == 1
        assert [device.alive for device in process.devices.list()] == [True]
        for snapshot in client.walk(["kind==active"]):
            client.remove(snapshot.key)
        client.close()
    host.ctr("images", "rm", "--sync", image)
    wait_for(lambda: list((process.root / "snapshots").iterdir()) == [])
    assert process.devices.list() == []


def test_a_failed_mount_takes_its_device_away(host: ObdlabHost, registry_server: RegistryServer) -> None:
    layers, annotations = imagefiles.golden_layers()
    annotations[1]["containerd.io/snapshot/overlaybd/blob-fs-type"] = "ext4;nouuid"
    documents = imagefiles.image_documents(layers, annotations, compress=False)
    image = imagefiles.push(registry_server.host, "snapshotter/options", *documents)
    host.rpull(image)
    assert "cannot mount /dev/loop" in run(host, image, "never", "true", check=False)
    assert host.snapshotter.devices.list() == []
    assert device_mounts(host) == []


@pytest.mark.slow
def test_the_command_ends_while_a_registry_does_not_answer(host: ObdlabHost, wire: WireSnapshotter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        with pytest.raises(AlreadyExistsError):
            wire.prepare("extract", "", pull_labels(image=f"127.0.0.1:{silent.getsockname()[1]}/a/b:1"))
        waiting = pool.submit(wire.prepare, "container", DIGESTS[0], {})
        silent.accept()[0].close()
        assert not waiting.done()
        assert host.snapshotter.stop() == 0
        with pytest.raises(ObdlabError):
            waiting.result()
    host.start_snapshotter()
    assert [snapshot.key for snapshot in host_snapshots(host)] == [DIGESTS[0]]
    # The attach itself would go on to its deadline, in the device host.
    for process in Path("/proc").glob("[0-9]*"):
        if str(host.snapshotter.run_dir) in _command_line(process):
            os.kill(int(process.name), signal.SIGKILL)


def _command_line(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return " ".join(words) if "obdlab.cli.device_host" in words else ""
