"""Base file systems of images: a small Debian, or a static busybox."""

from __future__ import annotations

import os
import re
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.lab.images.chroot import ISOLATED
from obdlab.lab.testbed.process import LabError, run

if TYPE_CHECKING:
    from collections.abc import Iterable

# Package scripts must not start services in an image ("invoke-rc.d", Debian policy 9.3.3.2: 101 means forbidden).
_POLICY = "#!/bin/sh\nexit 101\n"
_LOGS = ("var/log/apt", "var/log/dpkg.log", "var/log/alternatives.log", "var/log/bootstrap.log")
# Paths that the "slim" Debian images leave out too; dpkg.cfg.d in the image excludes them from later layers as well.
_SLIM = tuple(
    f"--dpkgopt=path-{rule}"
    for rule in (
        *("exclude=/usr/share/doc/*", "include=/usr/share/doc/*/copyright", "exclude=/usr/share/man/*"),
        *("exclude=/usr/share/info/*", "exclude=/usr/share/locale/*", "include=/usr/share/locale/locale.alias"),
        *("exclude=/usr/share/lintian/*", "exclude=/usr/share/groff/*"),
    )
)


def make_debian(target: Path, suite: str, timeout_s: float = 900.0) -> None:
    """Fill ``target`` with a minimal Debian by mmdebstrap, from the archive that this host's apt uses.

    mmdebstrap's default archive serves if the host has no source of that suite. Raises LabError.
    """
    if shutil.which("mmdebstrap") is None:
        raise LabError("mmdebstrap is not installed (wanted to build a Debian base: apt-get install mmdebstrap)")
    options = ("--variant=minbase", "--format=directory", *_SLIM)
    run(
        [*ISOLATED, "--mount-proc", "--", "mmdebstrap", *options, suite, target, *host_sources(suite)],
        timeout_s=timeout_s,
        environment={"LC_ALL": "C.UTF-8"},
    )
    (target / "usr/sbin/policy-rc.d").write_text(_POLICY)
    (target / "usr/sbin/policy-rc.d").chmod(0o755)
    (target / "etc/resolv.conf").write_text("")
    for name in _LOGS:
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    aux_cache = target / "var/cache/ldconfig/aux-cache"
    aux_cache.unlink(missing_ok=True)
    for node in (target / "dev").iterdir():  # the runtime makes its own nodes
        shutil.rmtree(node) if node.is_dir() and not node.is_symlink() else node.unlink()


def host_sources(suite: str) -> list[str]:
    """Return the host's ``deb`` lines for the suite and its updates; [] if the host has no such source."""
    if shutil.which("apt-get") is None:
        return []
    output = run(["apt-get", "indextargets", "--format", "$(CREATED_BY)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"])
    return _deb_lines(output.splitlines(), suite)


def _deb_lines(targets: Iterable[str], suite: str) -> list[str]:
    wanted = {suite, f"{suite}-updates", f"{suite}-security"}
    lines = []
    for target in targets:
        kind, _, rest = target.partition("|")
        fields = rest.split("|")
        if kind != "Packages" or len(fields) != 3:
            continue
        uri, release, component = fields
        # A "file:" archive of the host is not visible from inside the image.
        if release in wanted and re.match("https?://", uri) and component:
            lines.append(f"deb {uri} {release} {component}")
    has_suite = any(line.split()[2] == suite for line in lines)
    return list(dict.fromkeys(lines)) if has_suite else []


def make_busybox(target: Path, scratch: Path) -> None:
    """Fill ``target`` with a static busybox (this host's, or from package busybox-static) and its applet links."""
    for name in ("bin", "etc", "dev", "proc", "sys", "tmp", "root", "srv"):
        (target / name).mkdir(parents=True)
    (target / "tmp").chmod(0o1777)
    binary = target / "bin/busybox"
    shutil.copy(_static_busybox(scratch), binary)
    binary.chmod(0o755)
    for applet in run([binary, "--list"]).split():
        if applet != "busybox":
            (target / "bin" / applet).symlink_to("busybox")


def _static_busybox(scratch: Path) -> Path:
    found = shutil.which("busybox")
    if found is not None and is_static_elf(Path(found)):
        return Path(found)
    scratch.mkdir(parents=True, exist_ok=True)
    run(["apt-get", "download", "busybox-static"], directory=scratch, timeout_s=120)
    package = next(scratch.glob("busybox-static_*.deb"))
    run(["dpkg-deb", "-x", package, scratch / "unpacked"])
    for path in ("usr/bin/busybox", "bin/busybox"):
        if (scratch / "unpacked" / path).is_file():
            return scratch / "unpacked" / path
    raise LabError(f"{package.name}: holds no busybox binary")


def is_static_elf(path: Path) -> bool:
    """Return True if a 64-bit ELF file needs no dynamic linker (no PT_INTERP among its program headers)."""
    with path.open("rb") as stream:
        header = stream.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return False
        (table_offset,) = struct.unpack_from("<Q", header, 32)
        entry_size, count = struct.unpack_from("<HH", header, 54)
        table = os.pread(stream.fileno(), entry_size * count, table_offset)
    types = [struct.unpack_from("<I", table, n * entry_size)[0] for n in range(len(table) // max(entry_size, 4))]
    return 3 not in types
