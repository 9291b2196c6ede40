"""Sources and destinations: what names mean, and what is refused."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.convert.endpoints.forms import names_image, split_namespace, split_transport
from obdlab.convert.endpoints.layout import ImageLayout, split_tag
from obdlab.convert.endpoints.layoutimages import LayoutDestination, LayoutSource
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.endpoints.registryimages import RegistryDestination, RegistrySource
from obdlab.convert.layer import layer_uuid
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from tests.convert.layouts import CONFIG, LAYER, MANIFEST, Layout, make_layout, member, tar_bytes

AMD64 = oci.Platform("linux", "amd64")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("some/dir", (Path("some/dir"), None)),
        ("/abs/dir:v1.2", (Path("/abs/dir"), "v1.2")),
        ("/a:b/dir", (Path("/a:b/dir"), None)),
    ],
)
def test_names_of_layouts(text: str, wanted: tuple[Path, str | None]) -> None:
    assert split_tag(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("docker://redis", True),
        ("redis:7", True),
        ("localhost/x", True),
        ("registry.example/x/y", True),
        ("containerd:default:x", True),
        ("oci:dir", True),
        ("layer.obd", False),
        ("a/b/layer.obd", False),
        ("./a:b/layer.obd", False),
        ("../x.obd", False),
        ("/abs/layer.obd", False),
    ],
)
def test_what_can_only_be_an_image(text: str, *, wanted: bool) -> None:
    assert names_image(text) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("containerd:k8s.io:docker.io/library/redis:7", ("k8s.io", "docker.io/library/redis:7")),
        ("containerd:docker.io/library/redis:7", ("default", "docker.io/library/redis:7")),
        ("containerd:localhost:5000/redis:7", ("default", "localhost:5000/redis:7")),
        ("containerd:moby:localhost:5000/redis:7", ("moby", "localhost:5000/redis:7")),
        ("containerd:default:redis", ("default", "redis")),
    ],
)
def test_names_in_containerd(text: str, wanted: tuple[str, str]) -> None:
    assert split_namespace(text, split_transport(text)[1]) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("containerd:redis", "containerd:\\[NAMESPACE:\\]NAME"),
        ("containerd:default:", "containerd:\\[NAMESPACE:\\]NAME"),
        ("docker-daemon:x", "transport is not known here"),
        ("oci:", "ends after its transport"),
        ("docker://UPPER", "malformed image reference"),
    ],
)
def test_malformed_names(text: str, message: str) -> None:
    with closing(RegistryClient()) as client, pytest.raises(FormatError, match=message):
        open_source(text, client)


def test_a_directory_that_is_a_layout_needs_no_prefix(tmp_path: Path) -> None:
    make_layout(tmp_path / "x", [[member("a")]])
    with closing(RegistryClient()) as client:
        assert isinstance(open_source(str(tmp_path / "x"), client), LayoutSource)
        assert isinstance(open_destination(str(tmp_path / "x"), client), LayoutDestination)
        assert isinstance(open_source("127.0.0.1:5000/x", client), RegistrySource)
        assert isinstance(open_destination("127.0.0.1:5000/x", client), RegistryDestination)
        with pytest.raises(FormatError, match="no such directory"):
            open_source("/no/such/directory", client)


def image(tmp_path: Path, **changes: object) -> LayoutSource:
    """An image whose manifest was changed."""
    layout = Layout(tmp_path / "x")
    descriptor = layout.add_image([tar_bytes([member("a")])])
    manifest = json.loads(layout.blob_path(str(descriptor["digest"])).read_bytes())
    layout.write_index([layout.add_json({**manifest, **changes}, MANIFEST)])
    return LayoutSource(ImageLayout(layout.root), None)


def layer(media_type: str = LAYER, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": "sha256:" + "0" * 64, "size": 1, **more}


def test_image_as_it_is(tmp_path: Path) -> None:
    source = image(tmp_path)
    manifest = source.manifest(AMD64)
    assert len(source.config(manifest).diff_ids) == len(manifest.layers) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [layer(annotations={oci.BLOB_DIGEST: "x"})]}, "already"),
        ({"layers": [layer("application/vnd.cncf.helm.chart")]}, "layer sha256:0* is of no known type"),
        ({"layers": [layer(LAYER + "+encrypted")]}, "of no known type"),
        ({"config": layer("application/vnd.cncf.helm.config")}, "not a container image"),
    ],
)
def test_images_that_cannot_be_converted(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        image(tmp_path, **changes).manifest(AMD64)


def test_config_with_another_number_of_layers(tmp_path: Path) -> None:
    source = image(tmp_path, layers=[layer(), layer()])
    with pytest.raises(FormatError, match="disagree about the number of layers"):
        source.config(source.manifest(AMD64))


def test_platforms(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "x")
    entries = [layout.add_image([tar_bytes([member(a)])], architecture=a) for a in ("arm64", "amd64")]
    layout.write_index(entries)
    source = LayoutSource(ImageLayout(layout.root), "latest")
    assert source.config(source.manifest(AMD64)).platform == AMD64
    with pytest.raises(FormatError, match=r"linux/amd64.*wanted linux/s390x"):
        source.manifest(oci.Platform("linux", "s390x"))


def test_indexes_without_end(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "x")
    entry = layout.add_image([tar_bytes([member("a")])])
    for _ in range(8):
        entry = layout.add_json(
            {"schemaVersion": 2, "manifests": [entry]},
            oci.OCI_INDEX,
            platform={"os": "linux", "architecture": "amd64"},
        )
    layout.write_index([entry])
    with pytest.raises(FormatError, match="nested too deep"):
        LayoutSource(ImageLayout(layout.root), None).manifest(AMD64)


def test_tags(tmp_path: Path) -> None:
    layout = ImageLayout.create(tmp_path / "x")
    first, second = (oci.Descriptor(MANIFEST, "sha256:" + digit * 64, 5) for digit in "12")
    layout.set_tag("a", first)
    assert [entry.digest for entry in layout.select(None)] == [first.digest]
    layout.set_tag("b", second)
    layout.set_tag("a", second)
    assert [entry.digest for entry in layout.select("a")] == [second.digest]
    with pytest.raises(FormatError, match=r"no single image without a tag.*got a, b"):
        layout.select(None)
    with pytest.raises(FormatError, match=r"no such tag.*got a, b, wanted c"):
        layout.select("c")


def test_a_layout_is_not_made_over_other_files(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(SourceError, match="neither empty nor an OCI layout"):
        ImageLayout.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_blobs_are_verified(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "x")
    descriptor = oci.Descriptor.from_json(layout.add_blob(b"content of it", CONFIG))
    path = layout.blob_path(descriptor.digest)
    opened = ImageLayout(layout.root)
    assert opened.read_blob(descriptor, 100) == b"content of it"
    with pytest.raises(FormatError, match="too large"):
        opened.read_blob(descriptor, 12)
    path.write_bytes(b"content of If")
    with opened.open_blob(descriptor) as file:
        assert file.read(12) == b"content of I"
        with pytest.raises(CorruptBlobError, match="wrong content"):
            file.read(1)
    path.write_bytes(b"content")
    with pytest.raises(CorruptBlobError, match="wrong size"):
        opened.open_blob(descriptor)
    path.unlink()
    with pytest.raises(SourceError, match="No such file"):
        opened.open_blob(descriptor)


def test_adding_a_blob_twice(tmp_path: Path) -> None:
    layout = ImageLayout.create(tmp_path / "x")
    (tmp_path / "blob").write_bytes(b"1")
    digest = oci.digest_of(b"1")
    assert layout.add_file(digest, tmp_path / "blob")
    assert not layout.add_file(digest, tmp_path / "blob")
    assert [path.name for path in (tmp_path / "x" / "blobs" / "sha256").iterdir()] == [digest.removeprefix("sha256:")]


def test_layer_uuids_are_the_originals() -> None:
    assert layer_uuid("sha256:" + "0123456789abcdef" * 4) == "01234567-89AB-CDEF-0123-456789ABCDEF"
