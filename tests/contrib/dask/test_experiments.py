"""Experiments on several hosts: here two network namespaces, each with its own mounts and a Dask worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from obdlab.contrib.dask.experiments import Cluster
from obdlab.lab.paths import LabPaths
from obdlab.lab.run.experiment import Experiment
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.ownership import DEFAULT_STATE_DIR
from obdlab.lab.testbed.process import Daemon, LabError, run
from tests import capabilities
from tests.lab.declared import declared

distributed = capabilities.require_package("distributed")

# No warm starts: these hosts share a page cache, which each drops before a cold start.
SPEC = declared("tiny", images=("tiny",), repeats=2, warm_starts=0, rtts_ms=(2.0,), load_limit=1000.0, a_a=False)
# A host of its own: another network, another place for locks and for what experiments keep.
_AS_HOST = f"""
mount -t tmpfs tmpfs {DEFAULT_STATE_DIR}
mkdir {DEFAULT_STATE_DIR}/groups
mount --rbind /sys/fs/cgroup {DEFAULT_STATE_DIR}/groups
mount -t sysfs sysfs /sys  # of this network
mount --rbind {DEFAULT_STATE_DIR}/groups /sys/fs/cgroup
umount --lazy {DEFAULT_STATE_DIR}/groups
rmdir {DEFAULT_STATE_DIR}/groups
mount --bind "$1" "$2"
hostname "$(basename "$1")"
shift 2
exec "$@"
"""


@pytest.fixture
def hosts(state_dir: Path) -> Iterator[list[ExperimentNetwork]]:
    with ExitStack() as stack:
        networks = [stack.enter_context(ExperimentNetwork(state_dir=state_dir)) for _ in range(2)]
        for network in networks:
            # The scheduler is behind the first one's link; a host reaches what its default route leads to.
            gateway = (
                network.benchmark_address.rpartition(".")[0] + f".{int(network.benchmark_address.split('.')[3]) - 1}"
            )
            run([*network.enter, "ip", "route", "add", "default", "via", gateway])
            run([*network.enter, "ip", "link", "set", "lo", "up"])
        yield networks


def _scheduler(stack: ExitStack, address: str, log: Path) -> str:
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", address, "--port", "0"]
    scheduler = Daemon("scheduler", [*command, "--no-dashboard", "--no-show"], log)
    stack.callback(scheduler.stop)
    scheduler.wait_for(lambda: "Scheduler at" in log.read_text(), "address", 120.0)
    (line,) = [line for line in log.read_text().splitlines() if "Scheduler at" in line][:1]
    return line.split()[-1]


def _worker(stack: ExitStack, enter: list[str], address: str, log: Path, *options: str) -> None:
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--no-dashboard", *options]
    worker = Daemon("worker", [*enter, *command], log)
    stack.callback(worker.stop)
    worker.wait_for(lambda: "Registered to" in log.read_text(), "registration", 120.0)


@pytest.mark.containerd
@pytest.mark.slow
def test_two_hosts_measure_what_one_would(hosts: list[ExperimentNetwork], tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    DEFAULT_STATE_DIR.mkdir(exist_ok=True)
    datasets = (Path(__file__).parents[3] / "datasets",)
    paths = LabPaths(datasets=datasets, images=tmp_path / "images", work=work)
    with ExitStack() as stack:
        first = hosts[0].benchmark_address.rpartition(".")
        address = _scheduler(stack, f"{first[0]}.{int(first[2]) - 1}", tmp_path / "scheduler.log")
        for number, network in enumerate(hosts):
            own = tmp_path / f"host{number}"
            own.mkdir()
            words = ["sh", "-euc", _AS_HOST, "sh", str(own), str(work)]
            enter = [*network.enter, "unshare", "--uts", "--mount", *words]
            _worker(stack, enter, address, tmp_path / f"worker{number}.log", "--nthreads", "1")
        experiment = Experiment(SPEC, tmp_path / "results", paths)
        assert experiment.run(scheduler=address) == 4
        rows = experiment.rows()
        assert [row.get("error") for row in rows] == [None] * 4
        # A repeat is measured by one host, and each had one.
        places: dict[int, set[str]] = {row["repeat"]: set() for row in rows}
        for row in rows:
            places[row["repeat"]].add(row["host"])
        assert sorted(places.values(), key=str) == [{"host0"}, {"host1"}]
        assert {(row["arm"], row["repeat"]) for row in rows} == {(a, r) for a in SPEC.arms for r in range(2)}
        assert [path.name for path in tmp_path.glob("host*/registry")] == ["registry", "registry"]


@pytest.mark.kernel
def test_a_worker_measures_points_of_another_kind(tmp_path: Path) -> None:
    spec = declared(kind="index", axes={"segments": [100], "layers": [1, 4]}, repeats=2, load_limit=1000.0)
    paths = LabPaths(datasets=(), images=tmp_path / "images", work=tmp_path / "work")
    with ExitStack() as stack:
        address = _scheduler(stack, "127.0.0.1", tmp_path / "scheduler.log")
        _worker(stack, [], address, tmp_path / "worker.log", "--nthreads", "1")
        experiment = Experiment(spec, tmp_path / "results", paths)
        assert experiment.run(scheduler=address) == 4
        rows = experiment.rows()
        assert [row.get("error") for row in rows] == [None] * 4
        assert {(row["layers"], row["repeat"]) for row in rows} == {(1, 0), (1, 1), (4, 0), (4, 1)}
        assert experiment.run(scheduler=address) == 0
    # This host alone finds the same rows measured.
    assert list(experiment.progress().values()) == [(4, 4)]


def test_a_scheduler_that_is_not_there_is_told() -> None:
    with pytest.raises(LabError, match=r"tcp://127\.0\.0\.1:1: no Dask scheduler"):
        Cluster("tcp://127.0.0.1:1", "start", LabPaths(), connect_timeout_s=2.0)


@pytest.mark.slow
def test_workers_that_would_measure_side_by_side_are_refused(tmp_path: Path) -> None:
    with ExitStack() as stack:
        address = _scheduler(stack, "127.0.0.1", tmp_path / "scheduler.log")
        with pytest.raises(LabError, match="has no workers"):
            Cluster(address, "index", LabPaths())
        _worker(stack, [], address, tmp_path / "worker.log", "--nthreads", "2")
        with pytest.raises(LabError, match="a worker with 2 threads"):
            Cluster(address, "index", LabPaths())


def test_without_dask_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(LabError, match=r"pip install .*\[mass\]'"):
        Cluster("tcp://127.0.0.1:1", "start", LabPaths())
