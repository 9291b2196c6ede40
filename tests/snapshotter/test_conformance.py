"""containerd's own suite for snapshotters, against ours and against containerd's overlayfs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import capabilities
from tests.containerd_host import SnapshotterProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

# Compiling takes a minute of processor time, and more when others want the processors.
pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.timeout(1200)]

SOURCE = Path(__file__).parent / "conformance"
_COMPILE_S, _RUN_S = 900, 240
_RESULT = re.compile(r"--- (PASS|FAIL|SKIP): \w+/(\w+)")
#: As many as the suite of containerd 1.7 has.
TESTS = 21


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite as a program."""
    capabilities.require("go")
    binary = tmp_path_factory.mktemp("conformance") / "suite"
    # Debian's packages are a GOPATH; nothing is fetched.
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": "", "GOPROXY": "off"}
    environment.setdefault("HOME", str(binary.parent))
    command = ["go", "test", "-c", "-o", str(binary), "."]
    done = subprocess.run(
        command, cwd=SOURCE, env=environment, capture_output=True, text=True, timeout=_COMPILE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return binary


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    snapshotter = SnapshotterProcess(tmp_path_factory.mktemp("snapshotter"))
    snapshotter.start()
    try:
        yield snapshotter.address
    finally:
        snapshotter.take_down()


def results(suite: Path, test: str, directory: Path, socket: Path) -> tuple[dict[str, str], str]:
    """Run one of the program's tests; return how each test of the suite ended, and all that was printed."""
    done = subprocess.run(
        [str(suite), "-test.v", "-test.run", f"^{test}$"],
        cwd=SOURCE,
        env={**os.environ, "TMPDIR": str(directory), "CONFORMANCE_SOCKET": str(socket)},
        capture_output=True,
        text=True,
        timeout=_RUN_S,
        check=False,
    )
    text = done.stdout + done.stderr
    return {name: how for how, name in _RESULT.findall(text)}, text


def test_ours_passes_whatever_containerds_overlayfs_passes(suite: Path, socket: Path, tmp_path: Path) -> None:
    theirs, said = results(suite, "TestOverlayfs", tmp_path, socket)
    assert len(theirs) == TESTS, said
    # Renaming a directory of a lower layer needs redirect_dir, which a kernel may have off.
    assert {name for name, how in theirs.items() if how != "PASS"} <= {"Rename"}, said
    ours, said = results(suite, "TestSocket", tmp_path, socket)
    assert len(ours) == TESTS, said
    failed = {name for name, how in ours.items() if how != "PASS"}
    assert failed <= {name for name, how in theirs.items() if how != "PASS"}, said
