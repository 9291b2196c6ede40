"""The environment of a measurement (host, versions, code), and the wait for a quiet host."""

from __future__ import annotations

import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.command import checkout_directory
from obdlab.lab.testbed.process import LabError, run
from obdlab.layers import native

if TYPE_CHECKING:
    from collections.abc import Callable

_PACKAGES = ("numpy", "grpcio", "zstandard", "cramjam", "crc32c", "pandas", "matplotlib", "papermill")
_QUIET_LOAD = 1.5


def capture(directory: Path = Path("/var/lib")) -> dict[str, Any]:
    """Return the environment as a flat, JSON-ready dict; unknown values are ''.

    ``directory`` is on the disk that holds the images. Sizes in bytes; loads as the kernel reports them.
    """
    commit, dirty = _git_state()
    return {
        "kernel": platform.release(),
        "os": _os_name(),
        "cpu_model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "hypervisor": "yes" if " hypervisor " in _read("/proc/cpuinfo") else "no",
        **_disk(directory),
        "congestion_control": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "python": platform.python_version(),
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "obdlab_version": _package_version("obdlab"),
        "decoding": native.state(),
        "git_commit": commit,
        "git_dirty": dirty,
        "containerd": _program_version("containerd", "--version"),
        "runc": _program_version("runc", "--version"),
        "registry": _program_version("docker-registry", "--version"),
        "load_1m": os.getloadavg()[0],
    }


def wait_for_quiet(
    limit: float = _QUIET_LOAD,
    timeout_s: float = 120.0,
    poll_s: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Wait until the load of the last minute is below ``limit``, at most ``timeout_s``; return the load and the wait.

    A busy host is no error: rows record the load. ``say`` gets one line when the wait begins.
    """
    began = time.monotonic()
    if (load := os.getloadavg()[0]) >= limit and timeout_s > 0:
        say(f"waiting for a load below {limit:g} (now {load:.1f}), at most {timeout_s:.0f} s")
    while os.getloadavg()[0] >= limit and (left_s := began + timeout_s - time.monotonic()) > 0:
        time.sleep(min(poll_s, left_s))
    load = os.getloadavg()[0]
    return {"load_1m": load, "load_limit": limit, "quiet": load < limit, "waited_s": time.monotonic() - began}


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _disk(directory: Path) -> dict[str, Any]:
    while not directory.exists():
        directory = directory.parent
    device = directory.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    whole = block if (block / "queue").is_dir() else block.parent  # a partition has no queue of its own
    return {
        "disk": whole.name if (whole / "queue").is_dir() else "",
        "disk_model": _read(whole / "device/model"),
        "disk_rotational": _read(whole / "queue/rotational"),
        "disk_file_system": _file_system(directory),
    }


def _file_system(directory: Path) -> str:
    best, kind = -1, ""
    for line in _read("/proc/self/mounts").splitlines():
        _, mountpoint, file_system, *_ = line.split(" ")
        if directory.resolve().is_relative_to(mountpoint) and len(mountpoint) >= best:
            best, kind = len(mountpoint), file_system
    return kind


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _program_version(name: str, option: str) -> str:
    if shutil.which(name) is None:
        return ""
    try:
        return run([name, option], timeout_s=10).strip().splitlines()[0]
    except (LabError, IndexError):
        return ""


def _git_state() -> tuple[str, bool | None]:
    # Only a checkout of obdlab has a commit; an installed package has its version.
    root = checkout_directory()
    if root is None or not (root / ".git").exists() or shutil.which("git") is None:
        return "", None
    git = ("git", "-c", f"safe.directory={root}", "-C", str(root))
    try:
        commit = run([*git, "rev-parse", "HEAD"], timeout_s=10).strip()
        return commit, bool(run([*git, "status", "--porcelain", "--untracked-files=no"], timeout_s=20).strip())
    except LabError:
        return "", None
