"""A run directory with a device host of its own, for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from obdlab.devices.fuse_loop import devices_of
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.rundir import device_id_of
from obdlab.settings.settings import Settings
from tests.server.killing import until


@dataclass
class Bed:
    run_dir: Path
    service: DeviceService
    host: subprocess.Popen[str]
    #: Every device id that a test uses, and those made from a config's path.
    ids: set[str] = field(
        default_factory=lambda: {"a", "b", "bad", "dev-1", "one", "other", "quick", "rw", "slow", "t", "x"}
    )

    def config(self, name: str, **what: Any) -> Path:
        path = self.run_dir.parent / f"{name}.json"
        path.write_text(json.dumps(what))
        self.ids.add(device_id_of(path))
        return path

    # Its servers keep its standard output open, so the end of that is not waited for.
    def kill_host(self) -> None:
        self.host.kill()
        self.host.wait(60)
        assert self.host.stdout is not None
        self.host.stdout.close()

    def leftovers(self) -> list[str]:
        """Loop devices of this run directory."""
        return [str(path) for name in self.ids for path in devices_of(self.run_dir / "devices" / name)]


def start_host(run_dir: Path, *options: str) -> subprocess.Popen[str]:
    with (run_dir.parent / "host.stderr").open("a") as log:
        host = subprocess.Popen(
            [sys.executable, "-m", "tests.server.hosting", str(run_dir), *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).parents[2],
        )
    assert host.stdout is not None
    assert host.stdout.readline() == "True\n"
    return host


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    run_dir = tmp_path.resolve() / "run"
    host = start_host(run_dir)
    made = Bed(run_dir, DeviceService(run_dir, Settings()), host)
    try:
        yield made
    finally:
        clean_up(made.service, force=True)
        made.kill_host()
    until(lambda: made.leftovers() == [], timeout_s=60)
    assert list(run_dir.iterdir()) == []
