from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.testbed.coldness import NotColdError, NotWarmError, make_cold, prove_cold, prove_warm
from obdlab.lab.testbed.containerd import OwnContainerd
from obdlab.lab.testbed.events import parse_event
from obdlab.lab.testbed.leftovers import cleanup_leftovers
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.probe import ContainerEndedError
from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.registry import RegistryHost
from obdlab.system import mount

if TYPE_CHECKING:
    from obdlab.lab.images.recipe import Recipe


def below(directory: Path) -> list[Path]:
    return [entry.mountpoint for entry in mount.mounts() if entry.mountpoint.is_relative_to(directory.resolve())]


def processes_naming(text: str) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(text.encode() in word for word in words):
                found.append(b" ".join(words).decode(errors="replace"))
    return found


def in_cgroups_of(namespace: str) -> list[str]:
    """Processes of containers of a containerd namespace, and its cgroups themselves."""
    found = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{namespace}")]
    for process in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            status = (process.parent / "status").read_text()
            # A container's init that was killed is a zombie until this machine's init has seen to it.
            if f"/{namespace}/" in process.read_text() and "\nState:\tZ" not in status:
                found.append(status)
        except OSError:
            continue
    return found


@pytest.mark.containerd
def test_cold_and_warm_starts_of_a_whole_image(
    tiny_recipe: Recipe, tiny_layout: Path, tmp_path: Path, state_dir: Path
) -> None:
    compressed = sum(layer.size for layer in OciLayout(tiny_layout).manifest.layers)
    with (
        ExperimentNetwork(state_dir=state_dir) as network,
        RegistryHost(tmp_path / "registry", network) as registry,
        OwnContainerd(tmp_path / "host", state_dir) as host,
    ):
        reference = registry.push_layout(tiny_layout, "tiny")
        assert set(make_cold(host, registry).values()) == {0}
        begin = registry.mark()
        host.pull(reference)
        pulled = registry.mark()
        assert registry.traffic(begin, pulled).blob_written >= compressed
        with pytest.raises(NotColdError, match="snapshots"):
            prove_cold(host)

        container = host.start(reference, "first", "overlayfs", tiny_recipe.probe)
        phases = container.times.phases_s()
        assert list(phases) == ["create", "start", "ready"]
        assert phases["create"] > 0
        assert min(phases.values()) >= 0
        assert sum(phases.values()) == pytest.approx(container.times.ready_s - container.times.requested_s)
        container.remove()
        evidence = prove_warm(host.layer_directories["overlayfs"], registry.traffic(pulled, registry.mark()))
        assert evidence["resident_bytes"] > 0
        with pytest.raises(NotWarmError, match="asked"):
            prove_warm(host.layer_directories["overlayfs"], registry.traffic(begin, pulled))

        for command, error, words in [
            (("sh", "-c", "echo no luck; exit 3"), ContainerEndedError, "no luck"),
            (("/no/such/program",), ContainerEndedError, "no such file"),
            (("sleep", "600"), LabError, "not ready after 0.5 s"),
        ]:
            with pytest.raises(error, match=words):
                host.start(reference, "bad", "overlayfs", replace(tiny_recipe.probe, command=command, timeout_s=0.5))
        # Given up before its task exists.
        with pytest.raises(LabError, match="not ready"):
            host.start(reference, "bad", "overlayfs", replace(tiny_recipe.probe, timeout_s=0.001))
        host.remove_image(reference)
        with closing(host.client()) as client:
            assert host.leftovers(client) == []
        assert set(prove_cold(host).values()) == {0}
        # Left running on purpose: the end of the experiment takes it down.
        host.pull(reference)
        host.start(reference, "running", "overlayfs", tiny_recipe.probe)
        state = host.state
        assert in_cgroups_of(host.namespace)
    assert below(tmp_path) == []
    assert processes_naming(str(tmp_path)) == []
    assert in_cgroups_of(state.name) == []
    assert not state.exists()
    assert sorted(path.name for path in (tmp_path / "host").iterdir()) == ["logs"]


_KILLED = """
import sys
from pathlib import Path
from obdlab.lab.testbed.containerd import OwnContainerd
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.images.recipe import find_recipe
from obdlab.lab.testbed.registry import RegistryHost
base, layout, datasets = map(Path, sys.argv[1:])
with (
    ExperimentNetwork(rtt_ms=1, state_dir=base / "state") as network,
    RegistryHost(base / "registry", network) as registry,
    OwnContainerd(base / "host", base / "state") as host,
):
    reference = registry.push_layout(layout, "tiny")
    host.pull(reference)
    host.start(reference, "one", "overlayfs", find_recipe("tiny", [datasets]).probe)
    print(network.namespace, host.namespace, flush=True)
    sys.stdin.read()
"""


@pytest.mark.containerd
def test_an_arm_chooses_whether_unpigz_unpacks(
    tiny_layout: Path, tmp_path: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, programs = tmp_path / "used", tmp_path / "programs"
    programs.mkdir()
    (programs / "unpigz").write_text(f'#!/bin/sh\necho unpigz >> {used}\nexec gzip "$@"\n')
    (programs / "unpigz").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    layers = len(OciLayout(tiny_layout).manifest.layers)
    with (
        ExperimentNetwork(state_dir=state_dir) as network,
        RegistryHost(tmp_path / "registry", network) as registry,
        OwnContainerd(tmp_path / "host", state_dir) as host,
    ):
        reference = registry.push_layout(tiny_layout, "tiny")
        for with_unpigz in (False, True, False):
            used.unlink(missing_ok=True)
            with host.unpacking_by_unpigz() if with_unpigz else nullcontext():
                assert host.unpigz is with_unpigz
                assert set(make_cold(host, registry).values()) == {0}
                host.pull(reference)
                host.remove_image(reference)
            assert (used.read_text().count("unpigz") if used.exists() else 0) == (layers if with_unpigz else 0)
    assert not below(state_dir)
    assert not processes_naming(host.namespace)


@pytest.mark.containerd
def test_what_a_killed_experiment_left_is_taken_down(tiny_layout: Path, tmp_path: Path, state_dir: Path) -> None:
    datasets = Path(__file__).parents[3] / "datasets"
    command = [sys.executable, "-c", _KILLED, *map(str, (tmp_path, tiny_layout, datasets))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as experiment:
        assert experiment.stdout is not None
        namespace, containers = experiment.stdout.readline().split()
        assert namespace.startswith("obdlab-")
        assert cleanup_leftovers(state_dir) == []
        assert Path(f"/run/netns/{namespace}").exists()
        experiment.send_signal(signal.SIGKILL)
    assert below(tmp_path)
    assert in_cgroups_of(containers)
    removed = cleanup_leftovers(state_dir)
    assert namespace in removed
    assert len(removed) == 2
    assert below(tmp_path) == []
    assert processes_naming(str(tmp_path)) == []
    assert not Path(f"/run/netns/{namespace}").exists()
    assert f"{namespace}h" not in {name for _, name in socket.if_nameindex()}
    assert in_cgroups_of(containers) == []
    assert cleanup_leftovers(state_dir) == []


def test_events_of_ctr_are_read() -> None:
    line = '2026-11-24 14:10:00.5 +0000 UTC obdlab-lab /tasks/start {"container_id":"c1","pid":7}\n'
    event = parse_event(line)
    assert event is not None
    assert (event.topic, event.values["container_id"]) == ("/tasks/start", "c1")
    assert event.time_s % 60 == 0.5
    assert parse_event("2026-99-24 14:10:00.5 +0000 UTC n /t {}") is None
    assert parse_event("Error: no such thing") is None
