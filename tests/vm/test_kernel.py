"""The kernel's package is found by name when it is needed: an archive that has moved on does not matter."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import capabilities
from tests.vm.kernel import PACKAGE, VmError, cached_kernel, get_kernel

_TOOLS = ("apt-get", "apt-cache", "dpkg-deb", "depmod")


class Archive:
    """An apt archive in a directory, and an apt that knows no other."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._pool = directory / "archive"
        self._pool.mkdir()
        self._scratch = directory / "scratch"
        for name in ("lists/partial", "cache/archives/partial"):
            (directory / "apt" / name).mkdir(parents=True)
        (directory / "apt/sources.list").write_text(f"deb [trusted=yes] copy:{self._pool} ./\n")
        (directory / "apt/status").touch()
        (directory / "apt/apt.conf").write_text(
            f'Dir::State::lists "{directory}/apt/lists"; Dir::Cache "{directory}/apt/cache";\n'
            f'Dir::State::status "{directory}/apt/status"; Dir::Etc::sourcelist "{directory}/apt/sources.list";\n'
            'Dir::Etc::sourceparts "-"; APT::Sandbox::User "root";\n'
        )
        monkeypatch.setenv("APT_CONFIG", str(directory / "apt/apt.conf"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "home"))

    def release(self, release: str) -> None:
        """Replace all packages by those of a kernel release, as a point release does."""
        shutil.rmtree(self._pool)
        self._pool.mkdir()
        image = f"linux-image-{release}"
        self._package(
            image, "", {f"boot/vmlinuz-{release}": "kernel", f"usr/lib/modules/{release}/modules.order": ""}
        )
        self._package(PACKAGE, f"Depends: {image}\n", {})
        entries = []
        for path in sorted(self._pool.glob("*.deb")):
            control = subprocess.check_output(["dpkg-deb", "-f", str(path)], text=True).strip()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entries.append(f"{control}\nFilename: ./{path.name}\nSize: {path.stat().st_size}\nSHA256: {digest}\n")
        (self._pool / "Packages").write_text("\n".join(entries))

    def take_away(self) -> None:
        """Leave nothing to be reached."""
        shutil.rmtree(self._pool)

    def _package(self, name: str, depends: str, files: dict[str, str]) -> None:
        tree = self._scratch / name
        (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: a test\n{depends}Description: a test's\n"
        )
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(content)
        build = ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(self._pool / f"{name}_1_amd64.deb")]
        subprocess.run(build, check=True, capture_output=True)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    capabilities.require("root")
    capabilities.require_tools(*_TOOLS)
    return Archive(tmp_path, monkeypatch)


def test_the_lists_may_be_missing_or_older_than_the_archive(archive: Archive) -> None:
    archive.release("6.12.1+test")
    assert get_kernel().release == "6.12.1+test"  # the lists had never been fetched
    archive.release("6.12.9+test")
    assert get_kernel().release == "6.12.1+test"  # what is in the cache does
    # The lists name a package that the archive has no more: nor has it anything of that name.
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]))
    assert get_kernel().release == "6.12.9+test"


def test_a_kernel_in_the_cache_needs_no_archive(archive: Archive) -> None:
    archive.release("6.12.1+test")
    kernel = get_kernel()
    archive.take_away()
    assert get_kernel() == kernel == cached_kernel()
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]))
    with pytest.raises(VmError, match="apt-get"):
        get_kernel()
