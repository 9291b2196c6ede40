"""Stock containerd and ctr on top of the snapshotter, compared with the built-in overlayfs snapshotter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import capabilities
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.snapshotter import imagefiles

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.containerd

IMAGE = "example.test/busybox:latest"
LISTING = (
    "stat -c '%n %f %u %g' /; "
    "find / -mindepth 1 -xdev \\( -path /proc -o -path /sys -o -path /dev -o -path /run \\) -prune -o -print | "
    "sort | xargs stat -c '%n %f %u %g %s %Y %N' 2>&1; "
    "find /data /bin /etc /replaced -type f | sort | xargs sha256sum"
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    directory = tmp_path_factory.mktemp("host")
    archive = directory / "busybox.tar"
    imagefiles.write_oci_archive(archive, IMAGE, imagefiles.busybox_layers())
    with containerd_with_obdlab(directory) as running:
        for snapshotter in (NAME, "overlayfs"):
            running.ctr("images", "import", "--snapshotter", snapshotter, str(archive))
        yield running


def run(host: ObdlabHost, name: str, command: str, *, snapshotter: str = NAME, check: bool = True) -> str:
    arguments = ("run", "--rm", "--snapshotter", snapshotter, IMAGE, name, "/bin/sh", "-c", command)
    return host.ctr(*arguments, check=check)


def test_a_container_runs_and_lists_as_on_overlayfs(host: ObdlabHost) -> None:
    ours = run(host, "ours", LISTING)
    theirs = run(host, "theirs", LISTING, snapshotter="overlayfs")
    assert "/data/old/visible" in ours
    assert "/data/deleted" not in ours
    assert ours == theirs
