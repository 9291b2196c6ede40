"""Registries and services that fail under pulls and running containers, and what users of the original met."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from obdlab.cli import main
from obdlab.containerd.errors import UnavailableError
from obdlab.formats.oci import digest_of
from obdlab.observe import stacks
from obdlab.pull.errors import PullError
from obdlab.pull.unpack import Outcome
from obdlab.system import mount
from tests.containerd_host import NAME, ObdlabHost
from tests.e2e.conftest import BIG
from tests.e2e.images import busybox_layer, file_layer, push_converted, push_mixed
from tests.e2e.running import device_mounts, execute, own, remove, run, start, stop, wait_for
from tests.outage.cases import case
from tests.outage.proxy import outage_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.outage.proxy import OutageProxy
    from tests.registry.faulty import Answer
    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry]

BIG_SUM = hashlib.sha256(BIG).hexdigest()


@pytest.fixture
def proxy(registry_server: RegistryServer) -> Iterator[OutageProxy]:
    with outage_proxy(registry_server.host) as proxy:
        yield proxy


def behind(proxy: OutageProxy, image: str) -> str:
    """The image's name in the registry behind the proxy: nothing of it is in any cache."""
    return f"{proxy.host}/{image.partition('/')[2]}"


def test_wrong_bytes_and_an_outage_under_a_container(
    host: ObdlabHost, proxy: OutageProxy, registry_server: RegistryServer, layers: list[bytes], tmp_path: Path
) -> None:
    # Units that a hash tree has proven are shared by all registries: other tests have read them.
    image = push_converted(registry_server.host, "e2e/unproven", layers, tmp_path, hash_trees=False)
    image = behind(proxy, image)
    host.rpull(image)
    start(host, image, "reader")
    execute(
        host, "reader", "/bin/busybox cat /bin/busybox /etc/issue > /dev/null"
    )  # what is read below, or the program fails
    wrong, gone = case("wrong bytes: a flipped bit in every 8 KiB"), case("connection closed without a word")
    proxy.always(wrong)
    said = execute(host, "reader", "/bin/busybox sha256sum /big", check=False)
    assert proxy.injected[wrong.name]
    assert "Input/output error" in said
    assert not re.search("[0-9a-f]{64}", said)
    with ThreadPoolExecutor(1) as pool:
        proxy.always(gone)
        reading = pool.submit(execute, host, "reader", "/bin/busybox sha256sum /big; true")
        wait_for(lambda: proxy.injected[gone.name] > 0)
        # A container on it that is new waits for nothing that it does not read.
        assert run(host, image, "another", "/bin/busybox cat /etc/issue") == "on top\n"
        assert not reading.done()
        proxy.good()
        assert reading.result(timeout=240).startswith(BIG_SUM)
    remove(host, "reader")
    host.ctr("images", "rm", "--sync", image)


class HeldUp:
    """Answers for one blob wait until they are let go."""

    name = "held up"

    def __init__(self, digest: str) -> None:
        self._digest = digest
        self.reached, self.let_go = threading.Event(), threading.Event()

    def fault(self, answer: Answer) -> None:
        if self._digest in answer.handler.path:
            self.reached.set()
            self.let_go.wait(120)
        answer.send()


@contextmanager
def pulling(host: ObdlabHost, image: str) -> Iterator[subprocess.Popen[str]]:
    """``obdlab image pull``, as a user runs it."""
    where = ("--address", host.containerd.address, "--namespace", "test", "--snapshotter", NAME)
    process = subprocess.Popen(
        [sys.executable, "-m", "obdlab", "image", "pull", *where, image],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "services",
    [
        pytest.param(("containerd",), id="containerd", marks=pytest.mark.slow),
        pytest.param(("snapshotter",), id="own", marks=pytest.mark.slow),
        pytest.param(("containerd", "snapshotter"), id="both"),
    ],
)
def test_services_are_killed_in_mid_pull(
    host: ObdlabHost, proxy: OutageProxy, image: str, services: tuple[str, ...]
) -> None:
    plain = file_layer({"plain": b"p" * 100_000})
    image = behind(proxy, push_mixed(image, "mixed", plain))
    layer = HeldUp(digest_of(plain))
    proxy.always(layer)
    with pulling(host, image) as process:
        assert layer.reached.wait(120)  # the lazy layers are there
        for name in services:
            getattr(host, name).stop(signal.SIGKILL)
        for name in services:
            getattr(host, name).start()
        layer.let_go.set()
        _, errors = process.communicate(timeout=240)
    # Whoever pulls speaks with containerd alone, which finds a snapshotter again.
    if services == ("snapshotter",):
        assert process.returncode == 0, errors
    else:
        assert process.returncode == 1
        assert re.fullmatch(r"obdlab image pull: (is containerd running at|containerd at) .*\n", errors), errors
    wait_for(lambda: succeeds(lambda: host.rpull(image)))
    assert run(host, image, "after", "/bin/busybox cat /etc/issue; /bin/busybox wc -c < /plain") == "on top\n100000\n"
    for lease in host.ctr("leases", "ls", "-q").split():  # of a pull whose containerd was killed: it expires in a day
        host.ctr("leases", "rm", "--sync", lease)
    host.ctr("images", "rm", "--sync", image)


# A service was just started.
def succeeds(action: Callable[[], object]) -> bool:
    try:
        action()
    except UnavailableError:
        return False
    return True


def test_cleanup_leaves_what_a_running_snapshotter_has(
    host: ObdlabHost, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cleanup = ["cleanup", "--run-dir", str(host.snapshotter.run_dir)]
    host.rpull(image)
    run(host, image, "before", "echo ran")
    mounted = device_mounts(host)
    assert main.main(cleanup) == 1
    told = capsys.readouterr().out
    assert (
        f"1 device and what is mounted from there: of the snapshotter that runs with --root {host.snapshotter.root}"
        in told
    )
    assert "removed" not in told
    assert device_mounts(host) == mounted
    assert run(host, image, "after", "echo ran") == "ran\n"
    host.snapshotter.stop(signal.SIGKILL)
    assert main.main(cleanup) == 0, "nobody counts on them now"
    assert device_mounts(host) == []
    host.start_snapshotter()
    wait_for(lambda: run(host, image, "again", "echo ran", check=False) == "ran\n")
    assert main.main([*cleanup, "--force"]) in (0, 1)
    assert device_mounts(host) == []
    host.ctr("images", "rm", "--sync", image)


def test_the_snapshotter_writes_its_stacks_and_goes_on(host: ObdlabHost, image: str) -> None:
    host.rpull(image)
    before = host.snapshotter.log.read_text().count(stacks.TITLE)
    for number in range(1, 21):
        os.kill(host.snapshotter.pid, signal.SIGUSR2)
        wait_for(lambda number=number: host.snapshotter.log.read_text().count(stacks.TITLE) == before + number)
    assert run(host, image, "after", "echo ran") == "ran\n"
    host.ctr("images", "rm", "--sync", image)


def test_an_image_of_one_layer(host: ObdlabHost, registry_server: RegistryServer, tmp_path: Path) -> None:
    image = push_converted(registry_server.host, "e2e/single", [busybox_layer({"one": b"1\n"})], tmp_path)
    assert host.rpull(image).count(Outcome.LAZY) == 1
    assert run(host, image, "single", "/bin/busybox cat /one; echo x > /one; /bin/busybox cat /one") == "1\nx\n"
    host.ctr("images", "rm", "--sync", image)


def test_a_pull_after_all_layers_were_removed(host: ObdlabHost, image: str) -> None:
    host.rpull(image)
    assert run(host, image, "first", "echo ran") == "ran\n"
    # By hand, the image's name being left: a layer goes only when none is on it.
    names = [line.split()[0] for line in host.ctr("snapshots", "--snapshotter", NAME, "ls").splitlines()[1:]]
    while names:
        names = [name for name in names if "cannot remove" in remove_snapshot(host, name)]
    assert host.rpull(image).count(Outcome.LAZY) == 2
    assert run(host, image, "second", "echo ran") == "ran\n"
    host.ctr("images", "rm", "--sync", image)


def remove_snapshot(host: ObdlabHost, name: str) -> str:
    return host.ctr("snapshots", "--snapshotter", NAME, "rm", name, check=False)


def test_a_pull_after_the_snapshotters_directory_was_emptied(host: ObdlabHost, image: str) -> None:
    host.rpull(image)
    start(host, image, "lost")
    stop(host, "lost")
    lose_everything(host)
    # containerd has all of it on record still.
    with pytest.raises(PullError, match=r"directory emptied.*remove the containers and images on it, and pull again"):
        host.rpull(image)
    host.ctr("containers", "rm", own("lost"))
    assert host.rpull(image).count(Outcome.LAZY) == 2
    assert run(host, image, "found", "echo ran") == "ran\n"
    host.ctr("images", "rm", "--sync", image)


def lose_everything(host: ObdlabHost) -> None:
    host.snapshotter.stop()
    for entry in reversed(mount.mounts()):
        if host.snapshotter.root in entry.mountpoint.parents:
            mount.unmount(entry.mountpoint)
    host.snapshotter.devices.shutdown(force=True)
    shutil.rmtree(host.snapshotter.root)
    host.start_snapshotter()
    wait_for(lambda: "connect" not in host.ctr("snapshots", "--snapshotter", NAME, "usage", check=False))


def test_a_device_that_turns_read_only_is_not_handed_out_for_writing(host: ObdlabHost, image: str) -> None:
    host.rpull(image)
    start(host, image, "writer", "--snapshotter-label", "containerd.io/snapshot/overlaybd.writable=dir")
    (device,) = [device for device in host.snapshotter.devices.list() if not device.read_only]
    (place,) = [entry.mountpoint for entry in mount.mounts() if entry.source == str(device.path)][:1]
    stop(host, "writer")
    mount.unmount(place)
    subprocess.run(["blockdev", "--setro", device.path], check=True)
    try:
        said = host.ctr("tasks", "start", "--detach", own("writer"), check=False)
    finally:
        subprocess.run(["blockdev", "--setrw", device.path], check=True)
    assert str(device.path) in said
    assert "read-only" in said
    host.ctr("tasks", "start", "--detach", own("writer"))
    assert execute(host, "writer", "echo new > /new; /bin/busybox cat /new") == "new\n"
    remove(host, "writer")
    host.ctr("images", "rm", "--sync", image)
