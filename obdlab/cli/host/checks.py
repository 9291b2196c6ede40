"""Checks of this host: its abilities, the missing ones per command, and their fixes.

Every check tries the thing itself where that is harmless (opening a device node, making a namespace), and looks at no
version number.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from obdlab.cli.common import settings_from
from obdlab.command import command, install_command
from obdlab.devices import kinds
from obdlab.errors import DeviceError, ObdlabError
from obdlab.layers import native
from obdlab.registry.p2p import parse_address
from obdlab.settings.settings import VERIFY_AVAILABLE, VERIFY_OFF, VERIFY_REQUIRE
from obdlab.system import programs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Purposes of checks, in the order of the printed groups.
PURPOSES = ("devices", "device kinds", "containers", "conversion", "experiments")
_AS_ROOT = "run as root (sudo)"
_COMMAND_S = 10.0
_CONNECT_S = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: ``ok`` with the facts in ``detail``, or not ok with a ``fix``."""

    purpose: str
    name: str
    ok: bool
    detail: str
    fix: str = ""
    optional: bool = False


def run_checks() -> list[Check]:
    """Return every check's finding, grouped by purpose in the order of PURPOSES."""
    found = [*_device_checks(), *_container_checks(), *_conversion_checks(), *_experiment_checks(), *_kinds()]
    return sorted(found, key=lambda check: PURPOSES.index(check.purpose))


def _device_checks() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("devices", "Python", sys.version_info >= (3, 11), version, "install Python 3.11 or later")
    yield Check("devices", "root", os.geteuid() == 0, f"uid {os.geteuid()}", _AS_ROOT)
    yield _node("devices", "/dev/fuse", "modprobe fuse, or a kernel with CONFIG_FUSE_FS")
    yield _node("devices", "/dev/loop-control", "modprobe loop, or a kernel with CONFIG_BLK_DEV_LOOP")
    yield _filesystem("devices", "ext4", "modprobe ext4, or a kernel with CONFIG_EXT4_FS")
    yield _survival()
    yield _compiled()
    yield _verification()
    yield from _peers()
    erofs = "modprobe erofs, or a kernel with CONFIG_EROFS_FS (only for EROFS images)"
    yield _filesystem("devices", "erofs", erofs, optional=True)


# Optional: the same bytes either way.
def _compiled() -> Check:
    state = native.state()
    fix = "install gcc and python3-dev, then install obdlab again"
    return Check("devices", "compiled decoding", state.startswith("compiled"), state, fix, optional=True)


# Optional: without it a device ends with its server, and the device's users see I/O errors.
def _survival() -> Check:
    name, fix = "devices outlive their servers", "Linux 6.9 or later (FUSE_NOTIFY_RESEND), or the kind ublk or tcmu"
    try:
        ok = kinds.best().can_change_servers()
    except DeviceError as error:
        return Check("devices", name, ok=False, detail=str(error), fix=_AS_ROOT, optional=True)
    detail = "requests are handed out again" if ok else "a device ends with its server"
    return Check("devices", name, ok, detail, fix, optional=True)


def _verification() -> Check:
    name, fix = "verified reads", f'"verify": "{VERIFY_REQUIRE}" in the settings refuses layers without a hash tree'
    try:
        verify = settings_from(argparse.Namespace()).verify
    except ObdlabError as error:
        return Check(
            "devices", name, ok=False, detail=str(error), fix=command("config", "check", "FILE"), optional=True
        )
    detail = {
        VERIFY_OFF: "off: units of lazily read layers are not checked",
        VERIFY_AVAILABLE: "layers with a hash tree are checked, others are not",
        VERIFY_REQUIRE: "all are checked, and layers without a hash tree are refused",
    }[verify]
    return Check("devices", name, verify != VERIFY_OFF, detail, fix, optional=True)


# Optional: without the proxy devices read from the registry itself.
def _peers() -> Iterator[Check]:
    try:
        address = settings_from(argparse.Namespace()).p2p_address
        if not address:
            return
        endpoint = parse_address(address)[2]
    except ObdlabError:  # the check of verified reads reports it
        return
    fix = "start it (obdlab serve peer, or another P2P proxy), or leave p2p_address out of the settings"
    try:
        socket.create_connection(endpoint, timeout=_CONNECT_S).close()
    except OSError as error:
        yield Check("devices", "P2P proxy", ok=False, detail=f"{address}: {error}", fix=fix, optional=True)
    else:
        yield Check("devices", "P2P proxy", ok=True, detail=f"{address} answers", fix=fix, optional=True)


def _container_checks() -> Iterator[Check]:
    yield _filesystem("containers", "overlay", "modprobe overlay, or a kernel with CONFIG_OVERLAY_FS")
    for tool, package in (("containerd", "containerd"), ("ctr", "containerd"), ("runc", "runc")):
        yield _tool("containers", tool, package)


def _conversion_checks() -> Iterator[Check]:
    yield _tool("conversion", "mkfs.ext4", "e2fsprogs")


def _experiment_checks() -> Iterator[Check]:
    for tool, package in (
        ("docker-registry", "docker-registry"),
        ("mmdebstrap", "mmdebstrap"),
        ("ip", "iproute2"),
        ("tc", "iproute2"),
        ("ethtool", "ethtool"),
        ("nsenter", "util-linux"),
        ("unshare", "util-linux"),
    ):
        yield _tool("experiments", tool, package)
    unshare = {"unshare": "util-linux"}
    yield _command(
        "experiments", "network namespaces", ["unshare", "--net", "true"], "a kernel with CONFIG_NET_NS", unshare
    )
    yield _command(
        "experiments",
        "rate shaping (TBF)",
        ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "1gbit", "burst", "64k",
         "latency", "50ms"],
        "modprobe sch_tbf", unshare | {"tc": "iproute2"},
    )  # fmt: skip
    for package in ("papermill", "matplotlib", "pandas", "nbconvert"):
        missing = find_spec(package) is None
        detail = "not installed" if missing else "installed"
        fix = f"{install_command('lab')} (only for notebooks and reports)"
        yield Check("experiments", f"Python package {package}", not missing, detail, fix, optional=True)


def _kinds() -> Iterator[Check]:
    for kind in kinds.every():
        trouble = kind.missing()
        yield Check("device kinds", kind.name, not trouble, trouble or "available", kind.fix, optional=True)
    best = kinds.best()
    trouble = best.missing()
    detail = f"none of them ({trouble})" if trouble else f"{best.name} (attach --device forces another)"
    yield Check("device kinds", "chosen by itself", not trouble, detail, best.fix)


def _node(purpose: str, path: str, fix: str) -> Check:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return Check(purpose, path, ok=False, detail="permission denied", fix=_AS_ROOT)
    except OSError as error:
        return Check(purpose, path, ok=False, detail=os.strerror(error.errno or 0), fix=fix)
    return Check(purpose, path, ok=True, detail="opens", fix=fix)


def _filesystem(purpose: str, name: str, fix: str, *, optional: bool = False) -> Check:
    known = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    # A module that is not loaded yet is not listed; mount(2) loads it.
    module = any(Path(f"/lib/modules/{os.uname().release}").glob(f"kernel/fs/{name}*/*.ko*"))
    ok = name in known or module
    detail = "in the kernel" if name in known else "a module, loaded when needed" if module else "not in this kernel"
    return Check(purpose, f"{name} file system", ok, detail, fix, optional)


def _tool(purpose: str, tool: str, package: str) -> Check:
    path = shutil.which(tool)
    return Check(purpose, tool, path is not None, path or "not found", f"apt-get install {package}")


# `packages` are those of the tools that the command runs: a missing tool says nothing about the kernel.
def _command(
    purpose: str, name: str, command: list[str], fix: str, packages: Mapping[str, str] = MappingProxyType({})
) -> Check:
    for tool, package in packages.items():
        if shutil.which(tool) is None:
            return Check(purpose, name, ok=False, detail=f"{tool} not found", fix=f"apt-get install {package}")
    try:
        programs.run(command, _COMMAND_S)
    except programs.ProgramError as error:
        return Check(purpose, name, ok=False, detail=error.last_line, fix=fix if os.geteuid() == 0 else _AS_ROOT)
    return Check(purpose, name, ok=True, detail="works", fix=fix)
