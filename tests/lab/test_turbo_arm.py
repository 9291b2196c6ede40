"""The arm with turboOCI images: what it publishes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from obdlab.formats import oci
from obdlab.lab.baselines import ADAPTERS
from obdlab.lab.baselines.adapter import Source, is_published
from obdlab.lab.images.builder import BuiltImage
from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.images.recipe import Probe, Recipe
from obdlab.lab.testbed.containerd import OwnContainerd
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from tests.convert.layouts import make_layout, member
from tests.registry.server import RegistryServer

pytestmark = pytest.mark.registry


def test_a_turbo_image_lies_beside_the_image_as_it_was_built(registry_server: RegistryServer, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "source", [[member("a", b"a" * 100_000)], [member("b", b"b")]])
    image = BuiltImage(Recipe("small", "", Probe("ready", 1.0)), layout.root, OciLayout(layout.root).digest, ())
    source = Source(image, "lz4", 4096, 128)
    adapter = ADAPTERS["obdlab-turbo"]
    name = f"{registry_server.host}/arms/small"
    reference = f"{name}:{adapter.tag(source)}"
    with closing(RegistryClient()) as client:
        adapter.publish(cast("OwnContainerd", None), source, client, reference)
        assert is_published(client, f"{name}:{source.identity}")
        manifest = oci.Manifest.parse(client.get_manifest(Reference.parse(reference)).data)
        built = OciLayout(layout.root).manifest
        assert [layer.turbo_target for layer in manifest.layers] == [layer.digest for layer in built.layers]
        assert client.get_manifest(Reference.parse(f"{name}:{source.identity}")).digest == image.digest
        adapter.publish(cast("OwnContainerd", None), source, client, reference)
    others = {other.tag(source) for each, other in ADAPTERS.items() if each != "obdlab-turbo"}
    assert adapter.tag(source) not in others
