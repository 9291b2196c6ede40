"""What the exporter says of real devices: right numbers, through deaths and hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.metrics.exporter import Collected, ObdlabCollector
from obdlab.metrics.health import health_of
from obdlab.server import counterfiles
from tests.registry.server import RegistryServer
from tests.server.exporting import KIB, Devices, Samples, of, parsed, samples_of, two_devices, until

MIB = 1 << 20


@pytest.fixture
def devices(tmp_path: Path, registry_server: RegistryServer) -> Iterator[Devices]:
    with two_devices(tmp_path, registry_server, audit_path=tmp_path / "audit.log") as two:
        yield two


class Exporter:
    """The collector of the exporter, without its process."""

    def __init__(self, devices: Devices, **options: float) -> None:
        self.run_dir = devices.directory / "run"
        self.cache_dir = devices.directory / "cache"
        self.collected = Collected(self.run_dir, deadline_s=options.pop("deadline_s", 10.0))
        self.collector = ObdlabCollector(self.collected, self.cache_dir, **options)

    def scrape(self) -> Samples:
        return samples_of(self.collector.collect())

    def health(self) -> dict[str, object]:
        return health_of(self.run_dir, self.cache_dir, self.collected.look())


def no_fetch_under_way(samples: Samples) -> bool:
    """Whether what has been downloaded has also been counted by the cache."""
    fetches = of(samples, "obdlab_fetches_total")
    return fetches > 0 and fetches == of(samples, "obdlab_download_seconds_count")


@pytest.mark.kernel
@pytest.mark.registry
def test_numbers_of_two_devices_and_after_their_end(devices: Devices) -> None:
    exporter = Exporter(devices)
    assert of(exporter.scrape(), "obdlab_devices", state="alive") == 0
    local, remote = devices.attach("local"), devices.attach("remote")
    before = exporter.scrape()
    for device in (local, remote):
        for offset in range(0, 8 * MIB, MIB):
            devices.read(device, offset, 64 * KIB)
    content = devices.read(local, MIB, 64 * KIB)
    assert content == devices.read(remote, MIB, 64 * KIB)
    until(lambda: no_fetch_under_way(exporter.scrape()))  # ahead of the reads
    now = exporter.scrape()
    for name in ("local", "remote"):
        assert of(now, "obdlab_device_up", device=name) == 1
        read = of(now, "obdlab_device_read_bytes_total", device=name)
        assert read - of(before, "obdlab_device_read_bytes_total", device=name) == 9 * 64 * KIB
        reads = of(now, "obdlab_device_reads_total", device=name)
        assert of(now, "obdlab_device_read_seconds_count", device=name) == reads
        assert of(now, "obdlab_device_read_seconds_bucket", device=name, le="+Inf") == reads
        assert of(now, "obdlab_device_read_seconds_sum", device=name) > 0
    assert of(now, "obdlab_device_fetched_bytes_total", device="local", cause="demand") == 0
    fetched = sum(
        of(now, "obdlab_device_fetched_bytes_total", device="remote", cause=cause) for cause in counterfiles.CAUSES
    )
    assert fetched == of(now, "obdlab_device_download_bytes_total", device="remote") > 0
    ranges = of(now, "obdlab_device_registry_requests_total", device="remote", status="206")
    assert ranges == of(now, "obdlab_device_fetches_total", device="remote")
    assert ranges == of(now, "obdlab_device_download_seconds_count", device="remote")
    misses = of(now, "obdlab_device_cache_misses_total", device="remote")
    hits = of(now, "obdlab_device_cache_hits_total", device="remote")
    assert misses == of(now, "obdlab_device_miss_seconds_count", device="remote") > 0
    assert of(now, "obdlab_device_cache_hit_ratio", device="remote") == hits / (hits + misses)
    assert of(now, "obdlab_cache_used_bytes") >= fetched
    node = os.uname().nodename
    assert of(now, "OverlayBD_Alive", node=node) == 1
    assert of(now, "OverlayBD_Count", node=node, type="download") == fetched
    assert of(now, "OverlayBD_Count", node=node, type="pread") == of(now, "obdlab_read_bytes_total")
    assert exporter.health()["ok"] is True

    # Gone, and the totals stay; one that is new begins at 0 and adds to them.
    devices.service.detach("local")
    devices.service.detach("remote")
    after = exporter.scrape()
    assert not any(labels and dict(labels).get("device") for _, labels in after)
    for name in ("obdlab_reads_total", "obdlab_read_bytes_total", "obdlab_download_bytes_total"):
        assert of(after, name) == of(now, name)
    assert samples_of(Exporter(devices).collector.collect()).keys() == after.keys(), "another exporter knows them too"
    devices.read(devices.attach("local"), 0, 64 * KIB)
    again = Exporter(devices).scrape()
    assert of(again, "obdlab_read_bytes_total") >= of(after, "obdlab_read_bytes_total") + 64 * KIB

    # What was fetched is in the audit log: each download with its place.
    lines = (devices.directory / "audit.log").read_text().splitlines()
    pattern = re.compile(r"\|remote\|\[action=download\]\[pathname=(.*?)\].*\[size=(\d+)\]")
    downloads = [match for line in lines if (match := pattern.search(line))]
    assert sum(int(match[2]) for match in downloads) == fetched
    assert all("/v2/exporter/image/blobs/sha256:" in match[1] for match in downloads)


@pytest.mark.kernel
@pytest.mark.registry
def test_what_a_killed_server_has_counted_stays(devices: Devices) -> None:
    exporter = Exporter(devices)
    local = devices.attach("local")
    devices.read(local, 0, 256 * KIB)
    before = exporter.scrape()
    os.kill(local.pid, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{local.pid}"))
    total = of(exporter.scrape(), "obdlab_read_bytes_total")
    assert total >= of(before, "obdlab_read_bytes_total") >= 256 * KIB
    assert of(Exporter(devices).scrape(), "obdlab_read_bytes_total") >= total, "known to others, too"


@pytest.mark.kernel
@pytest.mark.registry
def test_a_hung_server_holds_nothing_up(devices: Devices) -> None:
    exporter = Exporter(devices, deadline_s=3.0, hung_after_s=2.0)
    local, remote = devices.attach("local"), devices.attach("remote")
    until(lambda: of(exporter.scrape(), "obdlab_devices", state="alive") == 2)
    os.kill(remote.pid, signal.SIGSTOP)
    try:
        reader = threading.Thread(target=devices.read, args=(local, 0, 64 * KIB))
        reader.start()
        reader.join()
        now = exporter.scrape()
        assert of(now, "obdlab_device_up", device="remote") == 0
        assert of(now, "obdlab_devices", state="hung") == 1
        assert of(now, "obdlab_device_read_bytes_total", device="local") >= 64 * KIB
        assert of(now, "obdlab_device_reads_total", device="remote") >= 0, "what it had counted is still there"
        health = exporter.health()
        assert health["ok"] is False
        assert health["devices"] == {"ok": False, "alive": 1, "hung": 1, "not_alive": ["remote"]}
    finally:
        os.kill(remote.pid, signal.SIGCONT)
    until(lambda: of(exporter.scrape(), "obdlab_device_up", device="remote") == 1)


@pytest.mark.kernel
@pytest.mark.registry
def test_reads_that_hang_are_seen(devices: Devices, registry_server: RegistryServer) -> None:
    exporter = Exporter(devices, hung_after_s=0.5)
    remote = devices.attach("remote")
    os.kill(registry_server.pid, signal.SIGSTOP)
    try:
        reader = threading.Thread(target=devices.read, args=(remote, 0, 8 * MIB))
        reader.start()
        until(lambda: of(exporter.scrape(), "obdlab_device_hung_io", device="remote") >= 1)
        assert of(exporter.scrape(), "obdlab_hung_io") >= 1
        assert of(exporter.scrape(), "obdlab_device_longest_wait_seconds", device="remote") > 0.5
    finally:
        os.kill(registry_server.pid, signal.SIGCONT)
    reader.join(120)
    until(lambda: of(exporter.scrape(), "obdlab_hung_io") == 0)


@pytest.mark.parametrize("how", ["text", "json"])
def test_that_it_is_ready_is_logged(tmp_path: Path, how: str) -> None:
    log = tmp_path / "log"
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "obdlab", "serve", "exporter", "--listen", "127.0.0.1:0", *places]
    command += ["--log-file", str(log), "--log-format", how, "--log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = process.stdout.readline().strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert ready.startswith("obdlab exporter: ready on http://127.0.0.1:")
    (line,) = log.read_text().splitlines()
    assert json.loads(line)["message"] == ready if how == "json" else line.endswith(f": {ready}")


def test_it_does_not_start_without_its_parent(tmp_path: Path) -> None:
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "obdlab", "serve", "exporter", "--listen", "127.0.0.1:0", *places]
    done = subprocess.run(
        [*command, "--end-with-parent", str(os.getppid())],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.kernel
@pytest.mark.registry
def test_the_command(devices: Devices) -> None:
    devices.attach("local")
    places = ["--run-dir", str(devices.directory / "run"), "--cache-dir", str(devices.directory / "cache")]
    command = [sys.executable, "-m", "obdlab", "serve", "exporter", "--listen", "127.0.0.1:0", *places]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        url = ready.split()[-1]
        try:
            text = urllib.request.urlopen(url, timeout=60).read().decode()
            assert of(parsed(text), "obdlab_device_up", device="local") == 1
            base = url.removesuffix("/metrics")
            with urllib.request.urlopen(f"{base}/healthz", timeout=60) as response:
                assert json.load(response)["devices"] == {"ok": True, "alive": 1}
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{base}/other", timeout=60)
            taken = subprocess.run(
                [*command[:6], url.split("/")[2], *places], capture_output=True, text=True, timeout=60, check=False
            )
            assert taken.returncode == 1
            assert "cannot listen on 127.0.0.1" in taken.stderr
            assert "Address already in use" in taken.stderr
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_damaged_tally_begins_anew(tmp_path: Path) -> None:
    wrong = '{"version": 1, "ended": [], "gone": {"a": 1}, "devices": {}}'
    for text in ('{"version": 1', "[]", '{"version": 9}', wrong):
        (tmp_path / counterfiles.TALLY_NAME).write_text(text)
        with counterfiles.changing(tmp_path) as kept:
            assert (kept.ended, kept.gone, kept.devices) == ([], {}, {})
            assert kept.add("redis", "1:1", {"reads": {"": 3}})
            assert not kept.add("redis", "1:1", {"reads": {"": 3}})
    with counterfiles.changing(tmp_path) as kept:
        assert kept.devices == {"redis": {"reads": {"": 3}}}
        kept.forget_devices(set())
    with counterfiles.changing(tmp_path) as kept:
        assert (kept.gone, kept.devices) == ({"reads": {"": 3}}, {})


def test_servers_that_end_at_once_are_all_counted(tmp_path: Path) -> None:
    def leave(number: int) -> None:
        for turn in range(20):
            counterfiles.leave(tmp_path, f"device{number}", f"{number}:{turn}", {"reads": {"": 1}})

    threads = [threading.Thread(target=leave, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with counterfiles.changing(tmp_path) as kept:
        assert kept.devices == {f"device{number}": {"reads": {"": 20}} for number in range(4)}


def test_without_devices_or_directories_there_is_still_an_answer(tmp_path: Path) -> None:
    collected = Collected(tmp_path / "none")
    samples = samples_of(ObdlabCollector(collected, tmp_path / "cache").collect())
    assert of(samples, "obdlab_reads_total") == 0
    assert not (tmp_path / "none").exists()
    health = health_of(tmp_path / "none", tmp_path / "cache", collected.look())
    assert health["ok"] is True


def test_a_cache_that_others_can_change_is_not_healthy(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    collected = Collected(tmp_path / "none")
    assert health_of(tmp_path / "none", cache, collected.look())["cache"]["ok"] is True
    cache.chmod(0o777)
    health = health_of(tmp_path / "none", cache, collected.look())
    assert health["ok"] is False
    assert "can be changed by other users (got owner 0, mode 0777" in health["cache"]["error"]
