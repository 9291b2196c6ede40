"""The virtual machine's kernel: Debian's package, unpacked into a cache directory, never installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "linux-image-amd64"
_DOWNLOAD_TIMEOUT_S = 300.0


class VmError(Exception):
    """The virtual machine cannot be built or run; says why."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: ``image`` boots, ``modules`` is its /usr/lib/modules/<release> with modules.dep."""

    release: str
    image: Path
    modules: Path


def cache_directory() -> Path:
    """Return where kernels are kept: ``$XDG_CACHE_HOME/obdlab-vm``, 120 MB each."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "obdlab-vm"


def cached_kernel() -> Kernel | None:
    """Return the newest kernel that is unpacked already, or None."""
    found = [_kernel_in(directory) for directory in cache_directory().glob("linux-image-*")]
    return max((kernel for kernel in found if kernel), key=lambda kernel: _by_version(kernel.release), default=None)


def get_kernel(*, newest: bool = False) -> Kernel:
    """Return a kernel, fetched with apt-get unless one is in the cache; ``newest``: unless the archive's newest is.

    Raises VmError.
    """
    kernel = cached_kernel()
    if kernel is not None and not newest:
        return kernel
    try:
        return _newest_kernel()
    except VmError:
        if os.geteuid() != 0:
            raise
    # The lists are missing, or older than the archive: then it has neither the package that they name nor that name.
    _run(["apt-get", "update", "-qq"])
    return _newest_kernel()


def _newest_kernel() -> Kernel:
    name = _package_name()
    return _kernel_in(cache_directory() / name) or _fetch(name)


def _kernel_in(directory: Path) -> Kernel | None:
    release = directory.name.removeprefix("linux-image-")
    kernel = Kernel(release, directory / "boot" / f"vmlinuz-{release}", directory / "usr/lib/modules" / release)
    return kernel if kernel.image.is_file() and (kernel.modules / "modules.dep").is_file() else None


def _by_version(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]


# linux-image-amd64 is empty and depends on the package of the current release.
def _package_name() -> str:
    text = _run(["apt-cache", "depends", "--important", PACKAGE])
    found = re.findall(r"Depends: (linux-image-\S+)", text)
    if not found:
        raise VmError(f"apt-cache knows no {PACKAGE}: run apt-get update (only Debian and its kin are supported)")
    return str(found[0])


# Unpacked beside its place and then renamed, so that one half done is never taken for a kernel.
def _fetch(name: str) -> Kernel:
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=cache) as temporary:
        _download(name, Path(temporary))
        (package,) = Path(temporary).glob("*.deb")
        tree = Path(temporary) / name
        _run(["dpkg", "-x", str(package), str(tree)])
        release = name.removeprefix("linux-image-")
        (tree / "lib").symlink_to("usr/lib")  # depmod looks there
        _run(["depmod", "-b", str(tree), release])
        try:
            tree.rename(cache / name)
        except OSError:  # another process was faster
            shutil.rmtree(tree)
    kernel = _kernel_in(cache / name)
    if kernel is None:
        raise VmError(f"{name}: the package holds no kernel with modules where they are expected")
    return kernel


def _download(name: str, directory: Path) -> None:
    _run(["apt-get", "download", "-o", "APT::Sandbox::User=root", name], directory)


def _run(command: list[str], directory: Path | None = None) -> str:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    tool = shutil.which(command[0], path=path)
    if tool is None:
        raise VmError(f"{command[0]}: not installed")
    try:
        done = subprocess.run(
            [tool, *command[1:]],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise VmError(f"{' '.join(command)}: not done after {_DOWNLOAD_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise VmError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
