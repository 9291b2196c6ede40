from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.cli.host import checks
from obdlab.cli.main import build_parser


def test_every_finding_that_is_not_ok_has_a_fix() -> None:
    found = checks.run_checks()
    assert {check.purpose for check in found} == set(checks.PURPOSES)
    assert all(check.fix for check in found)
    root = next(check for check in found if check.name == "root")
    assert root.ok == (os.geteuid() == 0)


def test_a_missing_tool_and_a_missing_node_are_found_missing() -> None:
    assert not checks._tool("devices", "no-such-tool", "no-such-package").ok
    assert not checks._node("devices", "/dev/no-such-node", "modprobe it").ok
    broken = checks._command("devices", "false", ["sh", "-c", "echo reason >&2; exit 3"], "mend it")
    assert (broken.ok, broken.detail) == (False, "reason")


def test_a_check_that_could_not_be_made_blames_no_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {check.name: check for check in checks._experiment_checks()}
    for name in ("unshare", "network namespaces", "rate shaping (TBF)"):
        assert (found[name].ok, found[name].fix) == (False, "apt-get install util-linux"), name
    # Enough to get past the missing tools, and to fail as it does for a user.
    for tool in ("unshare", "tc"):
        (tmp_path / tool).write_text("#!/bin/sh\necho Operation not permitted >&2; exit 1\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    found = {check.name: check for check in checks._experiment_checks()}
    for name in ("network namespaces", "rate shaping (TBF)"):
        assert (found[name].detail, found[name].fix) == ("Operation not permitted", "run as root (sudo)")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = {check.name: check for check in checks._experiment_checks()}
    assert found["rate shaping (TBF)"].fix == "modprobe sch_tbf"


def test_doctor_prints_findings_and_fails_on_a_needed_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [
        checks.Check("devices", "/dev/fuse", ok=False, detail="No such file", fix="modprobe fuse"),
        checks.Check("device kinds", "ublk", ok=False, detail="absent", fix="modprobe", optional=True),
    ]
    monkeypatch.setattr(checks, "run_checks", lambda: findings)
    from obdlab.cli.host import doctor

    args = type("Args", (), {"json": False})()
    assert doctor.run(args) == 1
    assert "FAIL /dev/fuse: No such file\n         fix: modprobe fuse" in capsys.readouterr().out
    args.json = True
    assert doctor.run(args) == 1
    assert json.loads(capsys.readouterr().out)[1]["optional"] is True


# A kernel shows what it lacks by what is not in /proc/filesystems, /lib/modules and /dev.
_LACKING = """
grep -vwE "$1" /proc/filesystems > "$2/filesystems"
mount --bind "$2/filesystems" /proc/filesystems
if [ -d /lib/modules ]; then mount -t tmpfs tmpfs /lib/modules; fi
mkdir "$2/dev"
mount -t tmpfs -o dev tmpfs "$2/dev"
for node in null zero full random urandom tty fuse loop-control; do
    case "$node" in $3) ;; *) cp -a "/dev/$node" "$2/dev/$node" 2>/dev/null || true ;; esac
done
ln -s /proc/self/fd "$2/dev/fd"
mount --move "$2/dev" /dev
shift 3
exec "$@"
"""


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("filesystems", "node", "told"),
    [
        ("erofs", "-", r"-    erofs file system: not in this kernel\n +fix: .*CONFIG_EROFS_FS \(only for EROFS"),
        ("overlay", "-", r"FAIL overlay file system: not in this kernel\n +fix: .*CONFIG_OVERLAY_FS"),
        ("ext4", "-", r"FAIL ext4 file system: not in this kernel\n +fix: .*CONFIG_EXT4_FS"),
        ("-", "fuse", r"FAIL /dev/fuse: No such file or directory\n +fix: .*CONFIG_FUSE_FS"),
        ("-", "loop-control", r"FAIL /dev/loop-control: No such file or directory\n +fix: .*CONFIG_BLK_DEV_LOOP"),
    ],
)
def test_doctor_on_a_kernel_without(filesystems: str, node: str, told: str, tmp_path: Path) -> None:
    lacking = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", _LACKING, "sh", filesystems]
    doctor = [*lacking, str(tmp_path), node, sys.executable, "-m", "obdlab", "doctor"]
    done = subprocess.run(doctor, capture_output=True, text=True, timeout=120, check=False)
    assert re.search(told, done.stdout), done.stdout + done.stderr
    assert done.returncode == int("  FAIL " in done.stdout)


def test_doctor_is_a_command() -> None:
    assert build_parser().parse_args(["doctor", "--json"]).json is True


def test_the_proxy_of_the_settings_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("{}")
    monkeypatch.setenv("OBDLAB_SETTINGS", str(path))
    assert list(checks._peers()) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        path.write_text(json.dumps({"p2p_address": f"http://127.0.0.1:{server.getsockname()[1]}/peer"}))
        (found,) = checks._peers()
        assert found.ok, found
    (found,) = checks._peers()
    assert not found.ok
    assert found.optional
