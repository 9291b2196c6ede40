"""Overlaybd images under a real containerd: lazily pulled, run, and alive whatever happens to the snapshotter."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.errors import ObdlabError
from obdlab.formats import oci
from obdlab.server.cleanup import clean_up
from obdlab.snapshotter.errors import FailedPreconditionError
from obdlab.system import mount
from tests import capabilities
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.registry.server import RegistryServer, registry_server, running_registry
from tests.server.killing import kill_for_good
from tests.snapshotter import imagefiles
from tests.snapshotter.mounting import mounted
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.snapshotter.store import Snapshot

__all__ = ["registry_server"]

pytestmark = pytest.mark.containerd

EXPECTED = Path(__file__).parents[1] / "golden" / "ext4"
_DEADLINE_S = 60.0


def push_golden(server: RegistryServer, name: str, *, depth: int = 2, on_top: tuple[bytes, ...] = ()) -> str:
    layers, annotations = imagefiles.golden_layers()
    layers, annotations = layers[:depth] + list(on_top), annotations[:depth] + [{} for _ in on_top]
    documents = imagefiles.image_documents(layers, annotations, compress=False)
    return imagefiles.push(server.host, f"snapshotter/{name}", *documents)


@pytest.fixture
def image(registry_server: RegistryServer) -> str:
    return push_golden(registry_server, "golden")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    with containerd_with_obdlab(tmp_path / "host") as running:
        yield running


@pytest.fixture
def wire(host: ObdlabHost) -> Iterator[WireSnapshotter]:
    client = WireSnapshotter(str(host.snapshotter.address))
    yield client
    client.close()


def run(host: ObdlabHost, image: str, name: str, command: str, *options: str, check: bool = True) -> str:
    # The golden image holds odd files and no programs.
    shell = ("--mount", f"type=bind,src={imagefiles.busybox()},dst=/busybox,options=rbind:ro")
    arguments = ("run", "--snapshotter", NAME, *shell, *(options or ("--rm",)), image, name)
    return host.ctr(*arguments, "/busybox", "sh", "-c", command, check=check)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def top(wire: WireSnapshotter) -> str:
    """The name of the image's top layer: the one nothing committed lies on."""
    snapshots = wire.walk(["kind==committed"])
    (name,) = {s.key for s in snapshots} - {s.parent for s in snapshots}
    return name


def device_mounts(host: ObdlabHost) -> list[Path]:
    return [entry.mountpoint for entry in mount.mounts() if host.snapshotter.root in entry.mountpoint.parents]


def assert_lists(root: Path, expected: Path) -> None:
    for entry in json.loads(expected.read_text()):
        path = root / entry["path"].lstrip("/")
        status = path.lstat()
        assert oct(status.st_mode) == entry["mode"], path
        assert (status.st_uid, status.st_gid) == (entry["uid"], entry["gid"]), path
        if "sha256" in entry:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"], path
        if stat.S_ISLNK(status.st_mode):
            assert os.readlink(path) == entry["target"]


def test_a_pulled_image_runs_lazily(host: ObdlabHost, image: str) -> None:
    assert host.rpull(image).layer_bytes == 0
    assert host.snapshotter.devices.list() == []
    command = "echo new > /written; /busybox cat /written; /busybox stat -c '%a %u' /"
    assert run(host, image, "first", command).split() == ["new", "755", "0"]
    # The second container shares the device and sees nothing of the first.
    assert run(host, image, "second", "/busybox ls /written 2>&1 || true").count("No such file") == 1
    assert len(host.snapshotter.devices.list()) == 1
    assert len(device_mounts(host)) == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_a_view_shows_the_image(
    host: ObdlabHost, wire: WireSnapshotter, registry_server: RegistryServer, tmp_path: Path, depth: int
) -> None:
    host.rpull(push_golden(registry_server, f"depth{depth}", depth=depth))
    (view,) = wire.view("look", top(wire), {})
    assert (view.type, view.options) == ("bind", ("ro", "rbind"))
    with mounted([view], tmp_path / "mnt") as root:
        assert_lists(root, EXPECTED / f"expected.m{depth}.json")
        with pytest.raises(OSError, match="Read-only"):
            (root / "new").touch()


def test_removing_the_image_takes_its_device_away(host: ObdlabHost, image: str) -> None:
    host.rpull(image)
    run(host, image, "once", "true")
    host.ctr("images", "rm", "--sync", image)
    wait_for(lambda: host.snapshotter.devices.list() == [])
    assert device_mounts(host) == []
    wait_for(lambda: list((host.snapshotter.root / "snapshots").iterdir()) == [])


def test_a_client_that_downloads_is_served_too(
    host: ObdlabHost, wire: WireSnapshotter, registry_server: RegistryServer, image: str, tmp_path: Path
) -> None:
    host.ctr("images", "pull", "--plain-http", "--snapshotter", NAME, image)
    assert host.snapshotter.devices.list() == []
    before = len(registry_server.requests())
    assert run(host, image, "local", "echo ran") == "ran\n"
    with mounted(wire.view("look", top(wire), {}), tmp_path / "mnt") as root:
        assert_lists(root, EXPECTED / "expected.m2.json")
    assert len(registry_server.requests()) == before


def test_namespaces_share_an_image(host: ObdlabHost, image: str) -> None:
    host.rpull(image)
    host.rpull(image, namespace="other")
    assert run(host, image, "here", "echo ran") == "ran\n"
    host.ctr("images", "rm", "--sync", image)
    assert len(list((host.snapshotter.root / "snapshots").iterdir())) == 2
    shell = f"type=bind,src={imagefiles.busybox()},dst=/busybox,options=rbind:ro"
    arguments = ("run", "--rm", "--snapshotter", NAME, "--mount", shell, image, "there", "/busybox", "echo", "ran")
    assert host.containerd.ctr("--namespace", "other", *arguments) == "ran\n"
    host.containerd.ctr("--namespace", "other", "images", "rm", "--sync", image)
    wait_for(lambda: list((host.snapshotter.root / "snapshots").iterdir()) == [])
    assert host.snapshotter.devices.list() == []


def test_containers_outlive_a_killed_snapshotter(host: ObdlabHost, image: str, tmp_path: Path) -> None:
    host.rpull(image)
    # Reads from the image each time it is told to.
    (tmp_path / "work").mkdir()
    loop = "for i in 1 2 3 4 5 6; do while [ ! -e /work/go$i ]; do /busybox usleep 10000; done; "
    loop += "/busybox sha256sum /big | /busybox cut -c-64 > /work/new; /busybox mv /work/new /work/sum$i; done"
    share = ("--mount", f"type=bind,src={tmp_path}/work,dst=/work,options=rbind:rw")
    run(host, image, "survivor", loop, "-d", *share)
    expected = next(e for e in json.loads((EXPECTED / "expected.m2.json").read_text()) if e["path"] == "big")

    def reads(number: int) -> bool:
        (tmp_path / "work" / f"go{number}").touch()
        result = tmp_path / "work" / f"sum{number}"
        wait_for(result.exists)
        return result.read_text().strip() == expected["sha256"]

    assert host.snapshotter.stop(signal.SIGKILL) == -signal.SIGKILL
    assert reads(1)
    host.snapshotter.devices.stop_host()
    assert reads(2)
    host.start_snapshotter()
    assert reads(3)
    assert run(host, image, "another", "/busybox cat /abs && echo ran").endswith("ran\n")
    assert reads(4)
    host.ctr("tasks", "kill", "-s", "KILL", "survivor")


def test_a_dead_device_is_replaced(host: ObdlabHost, image: str) -> None:
    host.rpull(image)
    run(host, image, "loser", "/busybox sleep 1000", "-d")
    (device,) = host.snapshotter.devices.list()
    kill_for_good(device)
    output = run(host, image, "winner", "/busybox sha256sum /big && echo ran")
    assert output.endswith("ran\n")
    host.ctr("tasks", "rm", "-f", "loser")
    wait_for(lambda: [found.alive for found in host.snapshotter.devices.list()] == [True])
    assert run(host, image, "later", "echo ran") == "ran\n"
    host.ctr("containers", "rm", "loser")
    host.ctr("images", "rm", "--sync", image)
    wait_for(lambda: host.snapshotter.devices.list() == [])


def test_devices_come_back_after_a_reboot(
    host: ObdlabHost, wire: WireSnapshotter, image: str, tmp_path: Path
) -> None:
    host.rpull(image)
    mounts = wire.prepare("container", top(wire), {})
    host.snapshotter.stop()
    assert clean_up(host.snapshotter.devices).in_use == []
    assert device_mounts(host) == []
    shutil.rmtree(host.snapshotter.run_dir)
    host.start_snapshotter()
    client = WireSnapshotter(str(host.snapshotter.address))
    assert client.mounts("container") == mounts
    with mounted(mounts, tmp_path / "mnt") as root:
        (root / "new").touch()
        assert (root / "abs").read_bytes()
    client.close()


def test_an_image_in_use_is_not_removed(host: ObdlabHost, wire: WireSnapshotter, image: str, tmp_path: Path) -> None:
    host.rpull(image)
    name = top(wire)
    mounts = wire.prepare("container", name, {})
    with pytest.raises(FailedPreconditionError, match="with child"):
        wire.remove(name)
    with mounted(mounts, tmp_path / "mnt") as root:
        wire.remove("container")
        with pytest.raises(FailedPreconditionError, match="in use"):
            wire.remove(name)
        assert hashlib.sha256((root / "big").read_bytes()).hexdigest()
    # It still serves.
    with mounted(wire.view("look", name, {}), tmp_path / "mnt") as root:
        assert_lists(root, EXPECTED / "expected.m2.json")
    wire.remove("look")
    wire.remove(name)
    assert host.snapshotter.devices.list() == []


def test_a_copied_mount_does_not_keep_an_image(host: ObdlabHost, wire: WireSnapshotter, image: str) -> None:
    host.rpull(image)
    wire.prepare("container", top(wire), {})
    # Any program may have copied all mounts into a namespace of its own.
    with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "1000"]) as other:
        try:
            wait_for(lambda: str(device_mounts(host)[0]) in Path(f"/proc/{other.pid}/mounts").read_text())
            wait_for(lambda: os.readlink(f"/proc/{other.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"))
            wire.remove("container")
            host.ctr("images", "rm", "--sync", image)
            wait_for(lambda: list((host.snapshotter.root / "snapshots").iterdir()) == [])
        finally:
            other.kill()
    wait_for(lambda: host.snapshotter.devices.list() == [])


def test_a_plain_layer_lies_on_an_overlaybd_image(host: ObdlabHost, registry_server: RegistryServer) -> None:
    layer = imagefiles.LayerTar()
    layer.add("busybox", imagefiles.busybox_bytes(), mode=0o755)
    layer.add(".wh.abs")
    image = push_golden(registry_server, "mixed", on_top=(layer.bytes(),))
    assert host.rpull(image).layer_bytes > 0
    output = host.ctr(
        *("run", "--rm", "--snapshotter", NAME, image, "mixed", "/busybox", "sh", "-c"),
        "/busybox ls /abs 2>&1; /busybox sha256sum /big",
    )
    expected = next(e for e in json.loads((EXPECTED / "expected.m2.json").read_text()) if e["path"] == "big")
    assert "No such file" in output
    assert expected["sha256"] in output


def test_a_failed_attach_tells_its_cause_and_leaves_nothing(host: ObdlabHost, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as server:
        image = push_golden(server, "broken")
        host.rpull(image)
        layers, _ = imagefiles.golden_layers()
        digest = hashlib.sha256(layers[1]).hexdigest()
        shutil.rmtree(next(server.storage.rglob(f"sha256/{digest[:2]}/{digest}")))
        output = run(host, image, "never", "true", check=False)
        assert digest in output
        assert "404" in output
    assert host.snapshotter.devices.list() == []
    assert device_mounts(host) == []
    assert host.ctr("snapshots", "--snapshotter", NAME, "ls").count("Active") == 0
    host.ctr("images", "rm", "--sync", image)
    wait_for(lambda: list((host.snapshotter.root / "snapshots").iterdir()) == [])


def test_containers_started_together_share_the_device(host: ObdlabHost, image: str) -> None:
    host.rpull(image)
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda n: run(host, image, f"c{n}", f"echo {n}; /busybox cat /abs"), range(8)))
    assert [output.split("\n")[0] for output in outputs] == [str(n) for n in range(8)]
    assert len(host.snapshotter.devices.list()) == 1
    assert len(device_mounts(host)) == 1


def test_an_accelerated_image_runs(host: ObdlabHost, registry_server: RegistryServer) -> None:
    layers, annotations = imagefiles.golden_layers()
    trace = (EXPECTED.parent / "image" / "acceleration-layer.tar").read_bytes()
    layers.append(trace)
    annotations.append(
        {oci.BLOB_DIGEST: oci.digest_of(trace), oci.BLOB_SIZE: str(len(trace)), oci.ACCELERATION_LAYER: "yes"}
    )
    documents = imagefiles.image_documents(layers, annotations, compress=False)
    image = imagefiles.push(registry_server.host, "snapshotter/accelerated", *documents)
    assert host.rpull(image).layer_bytes == 0
    assert run(host, image, "fast", "/busybox ls /trace 2>/dev/null; echo ran") == "ran\n"


def test_a_bad_image_is_refused_at_the_pull(host: ObdlabHost, registry_server: RegistryServer) -> None:
    layers, annotations = imagefiles.golden_layers()
    annotations[1][oci.TURBO_TARGET_DIGEST] = annotations[0][oci.BLOB_DIGEST]
    documents = imagefiles.image_documents(layers, annotations, compress=False)
    with pytest.raises(ObdlabError, match=r"turboOCI.*media type"):
        host.rpull(imagefiles.push(registry_server.host, "snapshotter/turbo", *documents))


def host_snapshots(host: ObdlabHost) -> list[Snapshot]:
    client = WireSnapshotter(str(host.snapshotter.address))
    try:
        return client.walk()
    finally:
        client.close()


@pytest.mark.slow
def test_many_rounds_leave_nothing(host: ObdlabHost, wire: WireSnapshotter, image: str) -> None:
    before = len(mount.mounts())
    for _ in range(10):
        host.rpull(image)
        name = top(wire)
        for number in range(100):
            wire.prepare(f"c{number}", name, {})
        for number in range(100):
            wire.remove(f"c{number}")
        host.ctr("images", "rm", "--sync", image)
        wait_for(lambda: host.snapshotter.devices.list() == [])
        wait_for(lambda: list((host.snapshotter.root / "snapshots").iterdir()) == [])
    assert len(mount.mounts()) == before


def test_downloaded_blobs_need_no_registry(host: ObdlabHost, registry_server: RegistryServer, tmp_path: Path) -> None:
    layers, annotations = imagefiles.golden_layers()
    with running_registry(tmp_path / "registry") as server:
        documents = imagefiles.image_documents(layers, annotations, compress=False)
        image = imagefiles.push(server.host, "snapshotter/downloaded", *documents)
        result = host.rpull(image, download=True)
        assert result.fetched_bytes >= sum(map(len, layers))
    assert "new" in run(host, image, "offline", "echo new > /written; /busybox cat /written")


def test_containers_write_to_a_device_of_their_own(tmp_path: Path, image: str) -> None:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"rwMode": "dir", "writableLayerType": "sparse", "autoRemoveDev": True}))
    with containerd_with_obdlab(tmp_path / "host", "--config", str(config)) as host:
        host.rpull(image)
        command = "echo new > /written; /busybox cat /written; /busybox grep ' / ' /proc/mounts"
        printed = run(host, image, "first", command).split()
        assert printed[0] == "new"
        assert printed[1].startswith("/dev/")
        assert printed[3] == "ext4"
        # Gone with its container (containerd collects its garbage in a moment), the next one sees nothing of it.
        wait_for(lambda: host.snapshotter.devices.list() == [])
        assert "No such file" in run(host, image, "second", "/busybox ls /written 2>&1 || true")


def test_a_device_goes_with_its_last_container(tmp_path: Path, image: str) -> None:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"autoRemoveDev": True}))
    with containerd_with_obdlab(tmp_path / "host", "--config", str(config)) as host:
        host.rpull(image)
        run(host, image, "stays", "true", "--null-io")
        run(host, image, "goes", "true")
        assert len(host.snapshotter.devices.list()) == 1
        host.ctr("containers", "rm", "stays")
        wait_for(lambda: host.snapshotter.devices.list() == [])
        assert run(host, image, "again", "echo back").split() == ["back"]
