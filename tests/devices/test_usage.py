"""Mounts in other mount namespaces."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from obdlab.devices.usage import namespaces_that_mount


@pytest.mark.kernel
def test_another_mount_namespace_is_named_by_one_of_its_processes(tmp_path: Path) -> None:
    source = f"obdlab-{tmp_path.name}"
    script = f"mount -t tmpfs {source} {tmp_path} && echo mounted && read _"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mounted\n"
        wanted = [f"in another mount namespace, that of process {process.pid} (sh)"]
        assert namespaces_that_mount(f" {source} ".encode()) == wanted
        assert namespaces_that_mount(f" {source}-other ".encode()) == []
        process.communicate(b"\n", timeout=60)
    assert namespaces_that_mount(f" {source} ".encode()) == []
