"""overlaybd-snapshotter and ctr as the original's guide uses them, with a real containerd and a real registry."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.formats import oci
from tests import capabilities
from tests.cli.dropin.running import Tools
from tests.containerd.host import ContainerdHost, running_containerd
from tests.containerd_host import SnapshotterProcess
from tests.e2e.images import push_plain
from tests.registry.server import RegistryServer
from tests.snapshotter import imagefiles

pytestmark = [pytest.mark.containerd, pytest.mark.registry, pytest.mark.kernel]


class InstalledSnapshotter(SnapshotterProcess):
    """The installed ``overlaybd-snapshotter``, with a configuration file alone."""

    def __init__(self, program: Path, directory: Path) -> None:
        super().__init__(directory)
        self._program, self._config = program, directory / "config.json"
        document = {"root": str(self.root), "address": str(self.address), "verbose": "info", "rwMode": "overlayfs"}
        self._config.write_text(json.dumps(document))

    def command(self) -> list[str]:
        return [str(self._program), str(self._config)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the commands; obdlab's own directories are below it, too."""
    directory = tmp_path_factory.mktemp("ctr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OBDLAB_RUN_DIR", str(directory / "snapshotter" / "run"))
        patch.setenv("OBDLAB_CACHE_DIR", str(directory / "snapshotter" / "cache"))
        assert main(["install-tools", str(directory / "bin")]) == 0
        yield directory


@pytest.fixture(scope="module")
def host(place: Path) -> Iterator[ContainerdHost]:
    """A containerd with the installed snapshotter as "overlaybd"."""
    capabilities.require("containerd")
    imagefiles.require_busybox()
    snapshotter = InstalledSnapshotter(place / "bin" / "overlaybd-snapshotter", place / "snapshotter")
    with ExitStack() as stack:
        stack.callback(snapshotter.take_down)
        snapshotter.start()
        running = running_containerd(place / "containerd", {"overlaybd": str(snapshotter.address)})
        yield stack.enter_context(running)


@pytest.fixture(scope="module")
def images(host: ContainerdHost, place: Path, registry_server: RegistryServer) -> tuple[str, str]:
    """An image and the one that ``ctr obdconv`` made of it, both in containerd and in the registry."""
    plain = push_plain(registry_server.host, "dropin/ctr", imagefiles.busybox_layers())
    converted = f"{plain.rpartition(':')[0]}:obd"
    run = partial(ctr, Tools(place / "bin", place), host)
    run("images", "pull", "--plain-http", "--snapshotter", "overlayfs", plain)
    told = run("obdconv", "--vsize", "1", plain, converted)
    assert told.startswith("filesystem type: ext4\nnew image digest: sha256:")
    run("images", "push", "--plain-http", converted)
    run("images", "rm", converted)
    return plain, converted


def ctr(tools: Tools, host: ContainerdHost, *words: str) -> str:
    """Run the installed ctr in the namespace "test"."""
    return tools.ok("ctr", "--address", host.address, "--namespace", "test", *words)


@pytest.fixture
def run(host: ContainerdHost, place: Path) -> partial[str]:
    return partial(ctr, Tools(place / "bin", place), host)


def test_a_converted_image_is_pulled_lazily_and_runs(images: tuple[str, str], run: partial[str]) -> None:
    plain, converted = images
    assert run("rpull", "--plain-http", converted).splitlines()[-1] == "done"
    command = ("/bin/sh", "-c", "find /data -type f | sort | xargs sha256sum")
    lazily = run("run", "--rm", "--snapshotter", "overlaybd", converted, "lazily", *command)
    whole = run("run", "--rm", "--snapshotter", "overlayfs", plain, "whole", *command)
    assert lazily == whole != ""
    labels = run("snapshots", "--snapshotter", "overlaybd", "ls")
    assert "sha256:" in labels


def test_the_snapshotter_of_the_environment_is_used(
    images: tuple[str, str], run: partial[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTAINERD_SNAPSHOTTER", "overlayfs")
    assert run("rpull", "--plain-http", "--user", "someone:else", images[0]).splitlines()[-1] == "done"


def test_a_recorded_trace_is_a_layer_of_the_new_image(images: tuple[str, str], run: partial[str]) -> None:
    _, converted = images
    run("rpull", "--plain-http", "--download-blobs", converted)
    for new, words in (
        (f"{converted}-traced", ["--time", "3"]),
        (f"{converted}-listed", ["--priority_list", "list"]),
    ):
        if "list" in words:
            (Path(run.args[0].cwd) / "list").write_text("/bin/busybox\n")
        command = [] if "list" in words else ["/bin/sh", "-c", "cat /data/* >/dev/null 2>&1; exit 0"]
        words += ["--working-dir", str(run.args[0].cwd / "work")]
        assert run("record-trace", *words, converted, new, *command).splitlines()[-1] == f"New image {new} is created"
        assert new in run("images", "ls", "-q").split()
        run("images", "push", "--plain-http", new)
        fetch = [sys.executable, "-m", "obdlab", "image", "pull-blob", new]
        text = subprocess.run(fetch, capture_output=True, text=True, timeout=60, check=True).stdout
        top = oci.Manifest.parse(text.encode()).layers[-1]
        assert top.annotations[oci.ACCELERATION_LAYER] == "yes"
        again = run.args[0].run(
            "ctr", "-a", run.args[1].address, "-n", "test", "record-trace", *words, converted, new
        )
        assert (again.returncode, f"{new} exists" in again.stderr) == (1, True)


def test_other_commands_are_containerds_own(
    host: ContainerdHost, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = Tools(place / "bin", place)
    assert "overlayfs" in tools.ok("ctr", "--address", host.address, "plugins", "ls")
    wanted = subprocess.run(["ctr", "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert tools.ok("ctr", "--version") == wanted
    monkeypatch.setenv("PATH", f"{place / 'bin'}:/nonexistent")
    done = tools.run("ctr", "version")
    assert (done.returncode, "containerd's ctr is not in the PATH" in done.stderr) == (1, True)
