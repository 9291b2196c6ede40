"""The root directory: modes of its files, and its lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from obdlab.snapshotter.layout import Layout
from obdlab.snapshotter.store import Kind


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_only_the_owner_reads_the_root_and_its_lock(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "root")
    try:
        assert [mode(path) for path in (layout.root, layout.root / "lock", layout.snapshots)] == [0o700, 0o600, 0o700]
    finally:
        layout.close()


def test_containers_may_pass_through_block_and_not_list_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "root")
    try:
        directory = layout.new_directory(Kind.ACTIVE, None)
        block = layout.add_block(directory)
        assert [mode(directory / name) for name in ("fs", "work")] == [0o755, 0o711]
        assert [mode(path) for path in (block, block / "mountpoint")] == [0o711, 0o711]
    finally:
        layout.close()


_CLOSES = """
import os, sys
from pathlib import Path
from obdlab.snapshotter.layout import Layout

os.close(0)  # the lock's descriptor becomes 0
for _ in range(2):
    layout = Layout(Path(sys.argv[1]))
    assert os.path.samefile("/proc/self/fd/0", layout.root / "lock")
    layout.close()
    layout.close()
"""


def test_a_root_is_unlocked_in_a_process_without_standard_input(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CLOSES, str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
