"""Lists of images spread by a real Dask scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from tests.convert.batch.test_run import _WAIT_S, broken, digests_at, image, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.registry.server import RegistryServer


@contextmanager
def dask_cluster(directory: Path, workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and workers as on other hosts: processes that share nothing but the network."""
    told = directory / "scheduler.json"
    with ExitStack() as ended:

        def start(module: str, *options: str) -> subprocess.Popen[bytes]:
            log = ended.enter_context((directory / f"{module}.log").open("ab"))
            command = [sys.executable, "-m", f"distributed.cli.{module}", "--no-dashboard", *options]
            process = ended.enter_context(subprocess.Popen(command, stdout=log, stderr=log, cwd=directory))
            ended.callback(process.terminate)
            return process

        start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(told))
        wait_for(lambda: told.exists() and told.read_text().rstrip().endswith("}"))
        address = json.loads(told.read_text())["address"]
        nothing = ("--no-nanny", "--nthreads", "1", "--local-directory", str(directory / "spill"))
        yield address, [start("dask_worker", address, *nothing) for _ in range(workers)]


@pytest.mark.registry
@pytest.mark.slow  # a scheduler and two workers take long to start
@pytest.mark.parametrize("count", [3, 20])
def test_spread_by_dask(count: int, registry_server: RegistryServer, tmp_path: Path) -> None:
    host = f"{registry_server.host}/dask{count}"
    names = [f"{host}/image{number}:v1" for number in range(count)]
    lines = [f"{image(tmp_path / str(number), number)} {name}\n" for number, name in enumerate(names)]
    (tmp_path / "list").write_text("".join(lines) + f"{broken(tmp_path / 'broken')} {host}/broken:v1\n")
    report = tmp_path / "report.json"
    with dask_cluster(tmp_path, 2) as (address, workers):
        command = [
            "image",
            "convert-list",
            str(tmp_path / "list"),
            "--work-dir",
            str(tmp_path),
            "--report",
            str(report),
        ]
        with subprocess.Popen([sys.executable, "-m", "obdlab", *command, "--scheduler", address]) as process:
            if count > 3:  # a worker is lost: the other one does its work
                wait_for(lambda: any(digests_at(registry_server, names)))
                workers[0].kill()
            assert process.wait(6 * _WAIT_S) == 1
    rows = {row["destination"]: row for row in json.loads(report.read_text())}
    assert [rows[name]["digest"] for name in names] == digests_at(registry_server, names)
    assert all(rows[name]["digest"] for name in names)
    assert "leads out" in rows[f"{host}/broken:v1"]["error"]


def test_a_scheduler_that_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obdlab.contrib.dask.conversions._CONNECT_S", 1.0)
    (tmp_path / "list").write_text("oci:a oci:b\n")
    assert main(["image", "convert-list", str(tmp_path / "list"), "--scheduler", "tcp://127.0.0.1:9"]) == 1
    assert "Dask scheduler does not answer" in capsys.readouterr().err
