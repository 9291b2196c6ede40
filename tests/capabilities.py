"""What this machine can do, and why a test that needs more is skipped.

``OBDLAB_REQUIRE=kernel,containerd`` (set in CI) turns the skip into a failure. ``tools`` there means all programs and
Python packages that the Makefile installs.
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.vm import machine

if TYPE_CHECKING:
    from types import ModuleType

REQUIRED = frozenset(filter(None, os.environ.get("OBDLAB_REQUIRE", "").split(",")))
#: Where Debian has containerd's suite for snapshotters.
GO_SUITE = Path("/usr/share/gocode/src/github.com/containerd/containerd/snapshots/testsuite")
LONG = os.environ.get("OBDLAB_LONG") == "1"


def missing_for_kernel() -> str:
    """Why real FUSE + loop devices cannot be used here, or ''."""
    if os.geteuid() != 0:
        return "not root"
    for node in ("/dev/fuse", "/dev/loop-control"):
        if not Path(node).exists():
            return f"{node} does not exist"
    for tool in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return ""


def missing_for_containerd() -> str:
    """Why a real containerd cannot be run here, or ''."""
    if os.geteuid() != 0:
        return "not root"
    for tool in ("containerd", "ctr", "runc", "docker-registry"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return missing_for_kernel()


def missing_for_registry() -> str:
    """Why a real registry cannot be run here, or ''."""
    return "" if shutil.which("docker-registry") else "docker-registry is not installed"


def missing_for_qemu() -> str:
    """Why qcow2 images cannot be made and read here, or ''."""
    return "" if shutil.which("qemu-img") else "qemu-img is not installed"


def missing_for_prometheus() -> str:
    """Why a real Prometheus cannot be run here, or ''."""
    return "" if shutil.which("prometheus") else "prometheus is not installed"


def missing_for_docker() -> str:
    """Why a Docker Engine cannot be run here, or ''."""
    for tool in ("dockerd", "docker"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return missing_for_containerd()


def missing_for_vm() -> str:
    """Why the virtual machine cannot be run here, or '' (also inside of it)."""
    return "" if machine.in_guest() else machine.missing()


def missing_for_browser() -> str:
    """Why a real browser cannot be run here, or ''."""
    for tool in ("chromium", "chromedriver"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return ""


def missing_for_block_tools() -> str:
    """Why the tools that tell of block events cannot be run here, or ''."""
    for tool in ("blktrace", "blkparse", "trace-cmd", "perf"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return ""


def missing_for_shells() -> str:
    """Why completion cannot be tried in every shell here, or ''."""
    for tool in ("bash", "zsh", "fish"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return ""


def missing_for_go() -> str:
    """Why containerd's own suite for snapshotters cannot be compiled here, or ''."""
    if shutil.which("go") is None:
        return "go is not installed (Debian package golang-go)"
    if not GO_SUITE.is_dir():
        return f"{GO_SUITE} does not exist (Debian package golang-github-containerd-containerd-dev)"
    return ""


def missing_for_root() -> str:
    """Why files cannot be given to other users here, or ''."""
    return "" if os.geteuid() == 0 else "not root"


_PROBES = {
    "root": missing_for_root,
    "kernel": missing_for_kernel,
    "containerd": missing_for_containerd,
    "registry": missing_for_registry,
    "qemu": missing_for_qemu,
    "docker": missing_for_docker,
    "vm": missing_for_vm,
    "prometheus": missing_for_prometheus,
    "browser": missing_for_browser,
    "blocktools": missing_for_block_tools,
    "go": missing_for_go,
    "shells": missing_for_shells,
}


def require(capability: str) -> None:
    """Skip the running test, or fail it where ``OBDLAB_REQUIRE`` names the capability, unless it is there."""
    reason = _PROBES[capability]()
    if reason:
        missing(capability, reason)


def require_tools(*names: str) -> None:
    """Skip the running test, or fail it where ``OBDLAB_REQUIRE`` has ``tools``, unless all are installed."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    absent = [name for name in names if shutil.which(name, path=path) is None]
    if absent:
        missing("tools", f"not installed: {', '.join(absent)}")


def require_package(name: str) -> ModuleType:
    """Return a Python package; without it skip the running test, or fail it as :func:`require_tools` does."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing("tools", f"the Python package {name}: {error}")


def missing(capability: str, reason: str) -> NoReturn:
    """Skip the running test, or fail it where ``OBDLAB_REQUIRE`` names the capability."""
    if capability in REQUIRED:
        pytest.fail(f"{capability} is required here but missing: {reason}")
    pytest.skip(f"{capability}: {reason}", allow_module_level=True)
