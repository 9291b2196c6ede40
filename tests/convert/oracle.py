"""What containerd's overlayfs shows of an image: the reference that conversions are compared with."""

from __future__ import annotations

import subprocess
import tarfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.convert.compare.listing import TreeEntry, list_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CONFIG = """\
version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{root}/containerd.sock"
[ttrpc]
address = "{root}/containerd.sock.ttrpc"
"""


class RefusedError(Exception):
    """containerd does not unpack an image."""


class Containerd:
    """A containerd of the test's own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.socket = root / "containerd.sock"

    def ctr(self, *arguments: str) -> str:
        done = subprocess.run(
            ["ctr", "--address", str(self.socket), *arguments],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if "failed to extract layer" in done.stderr:
            raise RefusedError(done.stderr.strip())
        if done.returncode:
            raise RuntimeError(f"ctr {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    @contextmanager
    def mounted(self, layout: Path, name: str) -> Iterator[Path]:
        """Import an OCI layout, unpack it with overlayfs and mount a view of it."""
        archive = self._root / f"{name}.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(layout, ".")
        reference = f"test.invalid/{name}:latest"
        self.ctr("images", "import", "--index-name", reference, "--local", "--no-unpack", str(archive))
        target = self._root / f"{name}.mount"
        target.mkdir()
        self.ctr("images", "mount", "--snapshotter", "overlayfs", reference, str(target))
        try:
            yield target
        finally:
            # A failing test's traceback may hold files open: the mount must go all the same.
            subprocess.run(["umount", "--lazy", str(target)], check=True, timeout=60)
            self.ctr("snapshots", "--snapshotter", "overlayfs", "rm", str(target))
            self.ctr("images", "rm", reference)

    def listing(self, layout: Path, name: str) -> dict[str, TreeEntry]:
        with self.mounted(layout, name) as root:
            return list_tree(root)


@contextmanager
def running_containerd(root: Path) -> Iterator[Containerd]:
    """Run a containerd with its own root, state and socket below ``root``."""
    (root / "config.toml").write_text(_CONFIG.format(root=root))
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(["containerd", "-c", str(root / "config.toml")], stdout=log, stderr=log)
    try:
        containerd = Containerd(root)
        deadline = time.monotonic() + 60
        while True:
            try:
                containerd.ctr("version")
                break
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield containerd
    finally:
        process.terminate()
        process.wait(60)


def stable(wanted: dict[str, TreeEntry]) -> dict[str, list[str]]:
    """What not to compare (``ignore_at`` of differences): times of directories that were changed while unpacking."""
    unpacked = time.time_ns() - 3600 * 10**9
    return {path: ["mtime_ns"] for path, entry in wanted.items() if entry.mtime_ns > unpacked and not entry.sha256}
