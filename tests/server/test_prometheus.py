"""A real Prometheus scrapes the exporter of two real devices."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import capabilities
from tests.registry.server import RegistryServer
from tests.server.exporting import KIB, two_devices, until

MIB = 1 << 20
CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: obdlab
    static_configs: [{{targets: ["{target}"]}}]
rule_files: ["{rules}"]
"""


@contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}", timeout=60) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> dict[str, float]:
        """The values of an expression by device; "" without one."""
        try:
            found = self._get(f"query?query={urllib.parse.quote(expression)}")["result"]
        except OSError:  # not up yet
            return {}
        return {entry["metric"].get("device", ""): float(entry["value"][1]) for entry in found}

    def failed_rules(self) -> dict[str, str]:
        rules = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
        assert rules
        return {rule["name"]: rule["lastError"] for rule in rules if rule["health"] == "err"}


def sample_alerts() -> str:
    """The alerts that come with the package."""
    return (Path(__file__).parents[2] / "packaging" / "prometheus" / "alerts.yml").read_text()


@pytest.mark.kernel
@pytest.mark.registry
def test_a_real_prometheus_has_the_right_values(tmp_path: Path, registry_server: RegistryServer) -> None:
    capabilities.require("prometheus")
    (tmp_path / "rules.yml").write_text(sample_alerts())
    target, port = f"127.0.0.1:{free_port()}", free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.format(target=target, rules=tmp_path / "rules.yml"))
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    exporter = [sys.executable, "-m", "obdlab", "serve", "exporter", "--listen", target, "--deadline", "0.3", *places]
    prometheus = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    prometheus += [f"--web.listen-address=127.0.0.1:{port}"]
    asked = Prometheus(port)
    with (
        two_devices(tmp_path, registry_server) as devices,
        running(exporter, tmp_path / "exporter.log"),
        running(prometheus, tmp_path / "prometheus.log"),
    ):
        local, remote = devices.attach("local"), devices.attach("remote")
        until(lambda: asked.query("obdlab_device_up == 1").keys() == {"local", "remote"}, 120)
        before = asked.query("obdlab_device_read_bytes_total")
        for _ in range(2):  # the second time from the cache
            for offset in range(0, 4 * MIB, MIB):
                assert devices.read(local, offset, 64 * KIB) == devices.read(remote, offset, 64 * KIB)
        wanted = {name: before[name] + 8 * 64 * KIB for name in ("local", "remote")}
        until(lambda: asked.query("obdlab_device_read_bytes_total") == wanted)
        source = devices.service.statistics("remote")["source"]
        fetched = source["demand_bytes"] + source["readahead_bytes"]
        until(lambda: asked.query("sum by (device) (obdlab_device_fetched_bytes_total) > 0") == {"remote": fetched})
        requests = {"remote": source["requests"]}
        assert asked.query('obdlab_device_registry_requests_total{status="206"}') == requests
        assert asked.query("obdlab_device_cache_misses_total > 0") == {"remote": source["misses"]}
        assert asked.query("obdlab_device_miss_seconds_count > 0") == {"remote": source["misses"]}
        assert asked.query("obdlab_device_io_errors_total") == {"local": 0, "remote": 0}
        total = asked.query("obdlab_read_bytes_total")[""]
        assert total == sum(wanted.values())
        assert asked.query('OverlayBD_Count{type="pread"}')[""] == total
        assert 0 < asked.query("histogram_quantile(0.99, sum by (le) (obdlab_read_seconds_bucket))")[""] < 137
        assert asked.failed_rules() == {}
        # They go, and their bytes stay in the sum.
        devices.service.detach("local")
        devices.service.detach("remote")
        until(lambda: not asked.query("obdlab_device_up"))
        assert asked.query("obdlab_read_bytes_total")[""] == total


def test_prometheus_accepts_the_sample_alerts(tmp_path: Path) -> None:
    capabilities.require("prometheus")
    (tmp_path / "rules.yml").write_text(sample_alerts())
    command = ["promtool", "check", "rules", str(tmp_path / "rules.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout
