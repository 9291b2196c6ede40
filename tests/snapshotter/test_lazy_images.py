"""Overlaybd images under a real containerd: lazily pulled, run, and alive whatever happens to the snapshotter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import capabilities
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.registry.server import RegistryServer, registry_server
from tests.snapshotter import imagefiles

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["registry_server"]

pytestmark = pytest.mark.containerd

EXPECTED = Path(__file__).parents[1] / "golden" / "ext4" / "expected.m2.json"


@pytest.fixture(scope="module")
def image(registry_server: RegistryServer) -> str:
    layers, annotations = imagefiles.golden_layers()
    return imagefiles.push(
        registry_server.host, "snapshotter/golden", *imagefiles.image_documents(layers, annotations, compress=False)
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    if imagefiles.busybox() is None:
        pytest.skip("busybox (busybox-static) is not installed")
    with containerd_with_obdlab(tmp_path_factory.mktemp("host")) as running:
        yield running


def arguments(image: str, name: str, command: str, *options: str) -> tuple[str, ...]:
    # The golden image holds odd files and no programs.
    shell = f"type=bind,src={imagefiles.busybox()},dst=/busybox,options=rbind:ro"
    return ("run", "--snapshotter", NAME, "--mount", shell, *options, image, name, "/busybox", "sh", "-c", command)


def run(host: ObdlabHost, image: str, name: str, command: str) -> str:
    return host.ctr(*arguments(image, name, command, "--rm"))


def test_a_pulled_image_runs_lazily(host: ObdlabHost, image: str) -> None:
    result = host.rpull(image)
    assert result.layer_bytes == 0
    output = run(
        host,
        image,
        "lazy",
        "/busybox find / -xdev -type f | /busybox wc -l; echo new > /written; /busybox cat /written",
    )
    assert output.split()[1] == "new"
