"""The original's commands, installed in a directory of the test's."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.cli.main import main
from tests.cli.dropin.running import Tools
from tests.convert.conftest import registry_server
from tests.pull.conftest import containerd, containerd_host, registry

__all__ = ["containerd", "containerd_host", "registry", "registry_server"]


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Every command, in tmp_path/bin; they run in tmp_path."""
    assert main(["install-tools", str(tmp_path / "bin")]) == 0
    return Tools(tmp_path / "bin", tmp_path)
