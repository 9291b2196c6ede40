"""The systemd units, under a systemd that does to them all it would do anywhere."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import obdlab
from tests.capabilities import require, require_tools
from tests.server import underinit
from tests.server.killing import until
from tests.server.test_live import new_config
from tests.server.underinit import UNITS, Init

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
LAYERS = [str(GOLDEN / "layer1.obd"), str(GOLDEN / "layer2.obd")]
MIB = 1 << 20
HOST = "obdlab-device-host.service"
#: What ``systemd-analyze security`` may find at most, from 0 (locked in) to 10.
EXPOSED = {
    HOST: 4.6,
    "obdlab-tcmu.service": 4.0,
    "obdlab-exporter.service": 2.0,
    "obdlab-peer.service": 2.2,
    "obdlab-nbd@.service": 1.5,
    "obdlab-snapshotter.service": 7.0,  # a mount namespace of its own is out of the question
}
#: What they may do (linux/capability.h), by number.
CAPABILITIES = {HOST: {21, 24, 2}, "obdlab-exporter.service": set()}


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Init]:
    require("root")
    require_tools(str(underinit.SYSTEMD), "systemctl")
    with Init(tmp_path_factory.mktemp("init")) as running:
        yield running


def capabilities(init: Init, unit: str) -> set[int]:
    status = init.run("cat", f"/proc/{init.show(unit, 'MainPID')}/status")
    (found,) = re.findall(r"^CapPrm:\s+([0-9a-f]+)$", status, re.MULTILINE)
    return {number for number in range(64) if int(found, 16) >> number & 1}


@pytest.mark.kernel
def test_devices_live_on_while_their_host_is_restarted(init: Init, tmp_path: Path) -> None:
    # The kernel knows devices by run directory and id, and somebody may have some of the real one's.
    first, second = f"units-{os.getpid()}", f"units-rw-{os.getpid()}"
    init.obdlab("device", "attach", LAYERS[0], "--id", first)  # a host is started on demand, and then replaced
    init.ctl("start", HOST)
    assert capabilities(init, HOST) <= CAPABILITIES[HOST]
    config = new_config(tmp_path, "append", size=64 * MIB)
    (node,) = init.obdlab("device", "attach", str(config), "--id", second).split()
    init.run("mkfs.ext4", "-q", node)
    init.run("sh", "-ec", f"mkdir /run/m; mount {node} /run/m; head -c 1000000 /dev/urandom > /run/m/file; sync")
    wanted = init.run("sha256sum", "/run/m/file")
    before = init.show(HOST, "MainPID")
    init.ctl("restart", HOST)
    assert init.show(HOST, "MainPID") != before
    init.run("pkill", "-9", "^obdlab:units-rw")  # in a process namespace of our own
    init.run("sh", "-ec", f"umount /run/m; mount {node} /run/m")
    assert init.run("sha256sum", "/run/m/file") == wanted
    data, index = str(tmp_path / "next.data"), str(tmp_path / "next.index")
    init.obdlab("device", "snapshot", second, "--data", data, "--index", index)
    init.obdlab("device", "upgrade", "--force", second)
    init.run("umount", "/run/m")
    init.obdlab("device", "mount", *LAYERS, "/mnt")
    assert "big" in init.run("ls", "/mnt").split()
    init.obdlab("device", "umount", "/mnt")
    assert init.obdlab("device", "list").count("pid ") == 2
    init.obdlab("device", "detach", second)
    init.obdlab("device", "detach", first)
    assert init.show(HOST, "ActiveState") == "active"
    init.ctl("stop", HOST)


@pytest.mark.kernel
@pytest.mark.slow
def test_a_host_that_hangs_is_replaced_by_the_watchdog(init: Init) -> None:
    init.override(HOST, "[Service]\nWatchdogSec=2\n")
    init.ctl("start", HOST)
    first = init.show(HOST, "MainPID")
    init.run("sleep", "5")  # it is fed
    assert init.show(HOST, "MainPID") == first
    init.run("kill", "-STOP", first)
    until(lambda: init.show(HOST, "MainPID") not in (first, "0"), timeout_s=120)
    until(lambda: init.show(HOST, "ActiveState") == "active", timeout_s=120)
    assert init.show(HOST, "NRestarts") == "1"
    init.ctl("stop", HOST)


@pytest.mark.kernel
def test_an_image_for_virtual_machines(init: Init, tmp_path: Path) -> None:
    require("qemu")
    init.run("sh", "-ec", 'mkdir -p /run/layers; cp "$0" "$1" /run/layers', *LAYERS)
    init.override("obdlab-nbd@.service", "[Service]\nEnvironmentFile=\nEnvironmentFile=/run/layers/env\n")
    init.run("sh", "-ec", "echo SOURCE=/run/layers/layer1.obd,/run/layers/layer2.obd > /run/layers/env")
    init.ctl("start", "obdlab-nbd@one")
    assert capabilities(init, "obdlab-nbd@one") == set()
    status = init.run("cat", f"/proc/{init.show('obdlab-nbd@one', 'MainPID')}/status")
    assert "\nUid:\t0\t" not in status
    assert "\nSeccomp:\t2\n" in status
    uri = "nbd+unix:///?socket=/run/obdlab-nbd-one/image.sock"
    init.run("qemu-img", "dd", "-f", "raw", "-O", "raw", "bs=1M", "count=4", f"if={uri}", "of=/run/layers/copy")
    with obdlab.open_stack(LAYERS) as stack:
        wanted = hashlib.sha256(stack.read_at(0, 4 * MIB)).hexdigest()
    assert init.run("sha256sum", "/run/layers/copy").split()[0] == wanted
    init.ctl("stop", "obdlab-nbd@one")
    assert init.show("obdlab-nbd@one", "Result") == "success"


@pytest.mark.kernel
@pytest.mark.slow
def test_metrics_and_snapshotter(init: Init) -> None:
    for name in ("obdlab-exporter", "obdlab-snapshotter"):
        init.ctl("start", name)
        assert init.show(name, "ActiveState") == "active"
    assert capabilities(init, "obdlab-exporter") == set()
    with urllib.request.urlopen("http://127.0.0.1:9863/metrics", timeout=60) as answer:
        assert b"obdlab_" in answer.read()
    init.ctl("stop", "obdlab-exporter", "obdlab-snapshotter")
    for name in ("obdlab-exporter", "obdlab-snapshotter"):
        assert init.show(name, "Result") == "success"


def test_all_units_are_looked_at() -> None:
    assert {path.name for path in UNITS.glob("*.service")} == set(EXPOSED)


@pytest.mark.tools("systemd-analyze")
@pytest.mark.parametrize("name", EXPOSED)
def test_exposure(name: str, tmp_path: Path) -> None:
    unit = tmp_path / name.replace("@", "@one")
    unit.write_text((UNITS / name).read_text())
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= EXPOSED[name]
