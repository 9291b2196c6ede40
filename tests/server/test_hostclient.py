"""Clients of a device host that the system does not let them start."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from obdlab.errors import DeviceError
from obdlab.server.hostclient import HostClient
from obdlab.server.rundir import RunDir
from obdlab.settings.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path


def test_no_process_left_for_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "run", refuse)
    run = RunDir(tmp_path / "run")
    run.create()
    with pytest.raises(DeviceError, match="cannot be started: Resource temporarily unavailable"):
        HostClient(run, Settings()).start()
