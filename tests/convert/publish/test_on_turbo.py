"""Traces and hot layers published for turboOCI images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.convert.compare.listing import differences, list_volume
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.convert.publish.hot_and_traces import add_acceleration_layer, add_hot_layer, attach_trace
from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.formats.trace import Trace
from obdlab.image.from_manifest import fetch_config
from obdlab.image.open import Image, open_image
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from obdlab.traces.hotlayer import is_hot
from obdlab.volumes.detect import open_volume
from tests.convert.converting import convert
from tests.convert.layouts import make_layout, member, tar_bytes
from tests.convert.turbo.test_builder import listing_of
from tests.convert.turbo.test_image import push
from tests.registry.server import RegistryServer

pytestmark = pytest.mark.registry

FILES = {name: (name * 20_000).encode() for name in ("a", "b")}


@pytest.fixture
def client() -> Iterator[RegistryClient]:
    with closing(RegistryClient()) as client:
        yield client


def image_of(server: RegistryServer, directory: Path, name: str, *filesystems: str) -> str:
    make_layout(directory / "source", [[member(name, data)] for name, data in FILES.items()])
    source, _ = push(server, directory / "source", f"publish/{name}")
    destination = source.replace(":v1", ":turbo")
    options = ConvertOptions(layer=LayerOptions(virtual_size=1 << 30), turbo=filesystems, work_dir=directory)
    convert(source, destination, options)
    return destination


def opened(client: RegistryClient, name: str, directory: Path, *, traces: bool = False) -> Image:
    config = fetch_config(client, Reference.parse(name), host_platform(), place=directory / "blobs", traces=traces)
    image = open_image(config, Settings(cache_dir=directory / "cache", verify="require"), traces=False)
    assert isinstance(image, Image)
    return image


def trace_of(client: RegistryClient, name: str, directory: Path) -> bytes:
    """Reads of each layer's metadata and of its target."""
    with opened(client, name, directory) as image:
        reads = []
        for number, layer in enumerate(image.layers):
            _, length, place, zeroed, _ = next(row for row in layer.index.segments().rows() if not row[3])
            reads.append((number, place * 512, min(length * 512, 4096)))
            assert not zeroed
            reads.append((number, layer.data.size - 8192, 4096))  # type: ignore[attr-defined]
        return Trace.from_reads(reads).to_bytes()


@pytest.mark.parametrize("filesystem", ["ext4", "erofs"])
@pytest.mark.parametrize("where", ["beside", "layout"])
def test_a_hot_layer_on_top(
    registry_server: RegistryServer, client: RegistryClient, tmp_path: Path, filesystem: str, where: str
) -> None:
    name = image_of(registry_server, tmp_path, f"hot-{where}-{filesystem}", filesystem)
    trace = trace_of(client, name, tmp_path)
    new = name.replace(":turbo", ":hot") if where == "beside" else f"oci:{tmp_path / 'out'}:hot"
    with closing(open_source(name, client)) as source, closing(open_destination(new, client)) as target:
        _, size = add_hot_layer(source, target, trace, Settings(cache_dir=tmp_path / "cache"), client=client)
        assert size
    with closing(open_source(new, client)) as made:
        manifest = made.manifest(host_platform(), overlaybd=True)
        assert [layer.turbo_target is None for layer in manifest.layers] == [False, False, True]
        assert all(made.beside(layer.turbo_target) for layer in manifest.layers if layer.turbo_target)
        # Settings that require checked layers take the new one, too.
        assert (oci.HASH_TREE in manifest.layers[-1].annotations) is (where == "beside")
    if where == "beside":
        with opened(client, new, tmp_path) as image:
            assert is_hot(image.layers[-1])
            tars = [tar_bytes([member(path, data)]) for path, data in FILES.items()]
            assert differences(list_volume(open_volume(image)), listing_of(tars)) == []
    with (
        pytest.raises(FormatError, match="must stay in the repository"),
        closing(open_source(name, client)) as source,
        closing(open_destination(f"{registry_server.host}/publish/elsewhere:1", client)) as target,
    ):
        add_hot_layer(source, target, trace, Settings(cache_dir=tmp_path / "cache"), client=client)


def test_traces_of_an_image(registry_server: RegistryServer, client: RegistryClient, tmp_path: Path) -> None:
    name = image_of(registry_server, tmp_path, "traced", "ext4")
    trace, settings = trace_of(client, name, tmp_path), Settings(cache_dir=tmp_path / "cache")
    attach_trace(client, Reference.parse(name), trace, settings, platform=None)
    config = fetch_config(client, Reference.parse(name), host_platform(), place=tmp_path / "blobs", traces=True)
    assert config.trace.size == len(trace)
    new = name.replace(":turbo", ":accelerated")
    with closing(open_source(name, client)) as source, closing(open_destination(new, client)) as target:
        add_acceleration_layer(source, target, trace, settings, client=client)
    assert fetch_config(client, Reference.parse(new), host_platform(), place=tmp_path / "blobs").acceleration_layer


def test_two_file_systems_are_refused(
    registry_server: RegistryServer, client: RegistryClient, tmp_path: Path
) -> None:
    name = image_of(registry_server, tmp_path, "both", "ext4", "erofs")
    trace = trace_of(client, name, tmp_path)
    with pytest.raises(
        FormatError, match=r"two file systems.*got ext4 and erofs, wanted an image converted with one"
    ):
        attach_trace(client, Reference.parse(name), trace, Settings(cache_dir=tmp_path / "cache"), platform=None)
