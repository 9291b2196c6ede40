"""An image of the TCMU daemon exported over iSCSI: the kernel's target, open-iscsi on the other side."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.devices.tcmu import configfs, iscsi
from obdlab.errors import DeviceError
from obdlab.system import mount
from tests import capabilities
from tests.server.tcmu.test_daemon import Daemon, golden_config, wait_for

IQN = "iqn.2026-01.example.obdlab:image"
INITIATOR = "iqn.2026-01.example.obdlab:reader"
PORTAL = "127.0.0.1:3260"


def run(*command: object, check: bool = True) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=100)
    assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.fixture
def initiator() -> Iterator[None]:
    """open-iscsi's daemon; its files are those of the machine, where nothing stays."""
    run("modprobe", "-a", "iscsi_target_mod", "iscsi_tcp")
    Path("/etc/iscsi/initiatorname.iscsi").write_text(f"InitiatorName={INITIATOR}\n")
    Path("/run/lock/iscsi").mkdir(parents=True, exist_ok=True)
    # At its end it signals its whole process group.
    command = ["/usr/sbin/iscsid", "-f"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    yield
    process.terminate()
    process.wait(30)


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_image_is_read_over_iscsi_by_whom_it_is_for(tmp_path: Path, initiator: None) -> None:
    capabilities.require_tools("iscsiadm")
    daemon = Daemon(tmp_path)
    config = golden_config(tmp_path, result_file="result")
    attach = [
        sys.executable,
        "-m",
        "obdlab",
        "device",
        "tcmu-attach",
        "--id",
        "77",
        "--iscsi",
        IQN,
        "--portal",
        PORTAL,
        config,
    ]
    assert run(*attach, "--initiator", INITIATOR).strip() == IQN
    run("iscsiadm", "-m", "discovery", "-t", "sendtargets", "-p", PORTAL)
    before = set(os.listdir("/sys/block"))
    run("iscsiadm", "-m", "node", "-T", IQN, "-p", PORTAL, "--login")
    wait_for(lambda: set(os.listdir("/sys/block")) - before, "no disk came of the login")
    (disk,) = set(os.listdir("/sys/block")) - before
    node = Path("/dev", disk)
    wait_for(lambda: node.exists() and int(Path(f"/sys/block/{disk}/size").read_text()) > 0, "no size")
    assert Path(f"/sys/block/{disk}/ro").read_text() == "1\n"
    (tmp_path / "mnt").mkdir()
    mount.mount(node, tmp_path / "mnt", read_only=True)
    over_iscsi = {path.name: path.read_bytes() for path in (tmp_path / "mnt").iterdir() if path.is_file()}
    mount.unmount(tmp_path / "mnt")
    run("iscsiadm", "-m", "node", "-T", IQN, "-p", PORTAL, "--logout")
    run(sys.executable, "-m", "obdlab", "device", "tcmu-detach", "77")
    assert not (configfs.TARGET / "iscsi" / IQN).exists()
    assert not configfs.Target.of("77").backstore.exists()
    here = configfs.attach("78", config)
    mount.mount(here, tmp_path / "mnt", read_only=True)
    assert over_iscsi == {path.name: path.read_bytes() for path in (tmp_path / "mnt").iterdir() if path.is_file()}
    mount.unmount(tmp_path / "mnt")
    configfs.remove(configfs.Target.of("78"))
    # Somebody else is not let in.
    assert run(*attach, "--initiator", "iqn.2026-01.example.obdlab:another").strip() == IQN
    assert "failure" in run("iscsiadm", "-m", "node", "-T", IQN, "-p", PORTAL, "--login", check=False)
    run(sys.executable, "-m", "obdlab", "device", "tcmu-detach", "77")
    daemon.end()


@pytest.mark.parametrize(
    ("name", "portals", "initiators", "message"),
    [
        ("image", [PORTAL], [INITIATOR], "no iSCSI name .got 'image'"),
        ("iqn.2026-01.example:../..", [PORTAL], [INITIATOR], "no iSCSI name"),
        (IQN, ["127.0.0.1"], [INITIATOR], "no portal"),
        (IQN, [PORTAL], ["me"], "no iSCSI name .got 'me'"),
        (IQN, [PORTAL], [], "nobody could log in"),
    ],
)
def test_what_is_no_export_is_refused(name: str, portals: list[str], initiators: list[str], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        iscsi.export(configfs.Target.of("1"), name, portals, initiators)
