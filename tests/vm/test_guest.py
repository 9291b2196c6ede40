"""Inside the machine: its kernel has what the host's need not have, and what it does to files stays there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.mark.vm
def test_the_machines_kernel_has_tcmu_and_ublk() -> None:
    assert Path("/sys/kernel/config/target/core").is_dir()
    assert Path("/dev/ublk-control").exists()
    assert os.uname().nodename == "vm"
