"""Hash trees added to images in a registry, and made by conversions: the same layers, and readers find the trees."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.endpoints.registryimages import RegistryDestination
from obdlab.convert.image import ConvertedImage, ConvertOptions, convert_image
from obdlab.convert.layer import LayerOptions
from obdlab.convert.publish.addtrees import add_trees
from obdlab.convert.publish.hot_and_traces import add_hot_layer, attach_trace
from obdlab.convert.publish.ordered import order_layers
from obdlab.convert.storedtrees import HASH_TREE_ARTIFACT, tree_files
from obdlab.errors import FormatError, SourceError
from obdlab.formats import oci
from obdlab.formats.hashtree import Shape, TreeReference
from obdlab.image.from_manifest import fetch_config
from obdlab.image.open import open_image
from obdlab.observe.counters import counted
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from tests.convert.layouts import make_layout, member
from tests.convert.publish.test_hot_and_traces import push_image
from tests.image.trees import tree_of
from tests.layers.golden import sha256_of
from tests.registry.server import RegistryServer
from tests.traces.test_hotlayer import EXT4, EXT4_SHA256, READS, trace_of

pytestmark = pytest.mark.registry


@pytest.fixture
def client() -> RegistryClient:
    return RegistryClient()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", read_deadline_s=10, verify="require")


def manifest_at(client: RegistryClient, reference: Reference) -> oci.Manifest:
    return oci.Manifest.parse(client.get_manifest(reference).data)


def without_trees(manifest: oci.Manifest) -> oci.Manifest:
    layers = (
        replace(layer, annotations={key: value for key, value in layer.annotations.items() if key != oci.HASH_TREE})
        for layer in manifest.layers
    )
    return replace(manifest, layers=tuple(layers))


def read_checked(client: RegistryClient, reference: Reference, settings: Settings) -> str:
    """Return the digest of the disk, all of whose layers must be checked."""
    before = counted().get("lazy_layers", {})
    with open_image(fetch_config(client, reference, host_platform()), settings) as disk:
        found = sha256_of(disk)
    after = counted()["lazy_layers"]
    assert after["checked"] > before.get("checked", 0)
    assert after.get("unchecked", 0) == before.get("unchecked", 0)
    return found


def test_trees_for_an_image_that_is_there(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings
) -> None:
    image = push_image(registry_server, client, "trees/image")
    target = Reference.parse(f"{registry_server.host}/trees/image:protected")
    plain = manifest_at(client, image)
    done = add_trees(client, image, target)
    assert done.made == len(EXT4)
    made = manifest_at(client, target)
    assert client.get_manifest(target).digest == done.digest
    assert manifest_at(client, image) == plain, "the old manifest stays"
    # Nothing but the annotations is new.
    assert without_trees(made) == plain
    for layer, path in zip(made.layers, EXT4, strict=True):
        tree = tree_of(path.read_bytes())
        assert TreeReference.parse(layer.annotations[oci.HASH_TREE]) == tree.reference
        size = Shape(layer.size).file_size
        assert client.read_blob(client.repository(image), tree.reference.file, size, size) == tree.file
    assert read_checked(client, target, settings) == EXT4_SHA256

    # An artifact lists the files, so that the registry keeps them.
    (found,) = client.referrers(client.repository(image), done.digest, HASH_TREE_ARTIFACT)
    artifact = manifest_at(client, image.with_digest(found.digest))
    assert artifact.layers == tree_files(made)
    assert artifact.subject == oci.Descriptor(made.media_type, done.digest, len(made.to_bytes()))

    # Once more: nothing is read, nothing changes.
    assert add_trees(client, target, target) == replace(done, made=0)


def test_a_tree_that_a_copy_lacks_is_made_again(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings
) -> None:
    image = push_image(registry_server, client, "trees/original")
    add_trees(client, image, image)
    # As other tools copy: manifest, config and layers.
    copy = push_image(registry_server, client, "trees/copy")
    client.put_manifest(copy, oci.OCI_MANIFEST, manifest_at(client, image).to_bytes())
    with pytest.raises(Exception, match="cannot be checked without their hash tree"):
        read_checked(client, copy, settings)
    done = add_trees(client, copy, copy)
    assert done.made == len(EXT4)
    assert done.digest == client.get_manifest(image).digest
    assert read_checked(client, copy, settings) == EXT4_SHA256


def test_all_images_of_an_index(registry_server: RegistryServer, client: RegistryClient, settings: Settings) -> None:
    image = push_image(registry_server, client, "trees/index")
    manifest = client.get_manifest(image)
    other = replace(manifest_at(client, image), annotations={"another": "image"}).to_bytes()
    entries = []
    for number, data in enumerate((manifest.data, other)):
        client.put_manifest(image.with_digest(oci.digest_of(data)), oci.OCI_MANIFEST, data)
        platform = replace(host_platform(), variant=f"v{number}")
        entries.append(oci.Descriptor(oci.OCI_MANIFEST, oci.digest_of(data), len(data), platform=platform))
    index = oci.Index(manifests=tuple(entries), annotations={"note": "kept"})
    client.put_manifest(image, oci.OCI_INDEX, index.to_bytes())
    done = add_trees(client, image, image)
    assert done.made == len(EXT4)  # the images share them
    new = oci.Index.parse(client.get_manifest(image).data)
    assert oci.digest_of(new.to_bytes()) == done.digest
    assert new.annotations == index.annotations
    assert [entry.platform for entry in new.manifests] == [entry.platform for entry in entries]
    assert read_checked(client, image, settings) == EXT4_SHA256


def test_traces_of_the_image_stay(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings
) -> None:
    image = push_image(registry_server, client, "trees/traced")
    attach_trace(client, image, trace_of(EXT4, READS), replace(settings, verify="available"), platform=None)
    before = fetch_config(client, image, host_platform(), traces=True).trace
    assert before.digest
    add_trees(client, image, image)
    assert fetch_config(client, image, host_platform(), traces=True).trace == before


def test_no_trees_for_other_images(
    registry_server: RegistryServer, client: RegistryClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = push_image(registry_server, client, "trees/wrong")
    elsewhere = Reference.parse(f"{registry_server.host}/trees/elsewhere:1")
    with pytest.raises(FormatError, match=r"elsewhere.*wanted .*trees/wrong:TAG"):
        add_trees(client, image, elsewhere)
    plain = without_annotations(manifest_at(client, image))
    client.put_manifest(image, oci.OCI_MANIFEST, plain.to_bytes())
    with pytest.raises(FormatError, match="not an overlaybd image"):
        add_trees(client, image, image)
    pinned = image.with_digest(oci.digest_of(plain.to_bytes()))
    assert main(["image", "protect", str(pinned)]) == 1
    assert "name a tag for it" in capsys.readouterr().err


def without_annotations(manifest: oci.Manifest) -> oci.Manifest:
    return replace(manifest, layers=tuple(replace(layer, annotations={}) for layer in manifest.layers))


def test_the_command(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    image = push_image(registry_server, client, "trees/command")
    assert main(["image", "protect", "-q", str(image)]) == 0
    assert capsys.readouterr().out.strip() == client.get_manifest(image).digest
    assert main(["image", "inspect", str(image)]) == 0
    text = capsys.readouterr().out
    assert "integrity    hash trees: each unit of a layer is checked when it is read" in text
    assert ", hash tree" in text
    assert read_checked(client, image, settings) == EXT4_SHA256
    assert main(["image", "inspect", "--json", str(image), "--cache-dir", str(settings.cache_dir)]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["images"]
    assert facts["cached_size"] > 0, "checked units are found where they are cached"
    tree = TreeReference.parse(manifest_at(client, image).layers[0].annotations[oci.HASH_TREE])
    assert facts["layers"][0]["hash_tree"] == tree.root


def test_a_hot_layer_on_a_protected_image_has_a_tree(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings, tmp_path: Path
) -> None:
    image = push_image(registry_server, client, "trees/hot")
    add_trees(client, image, image)
    for name in (f"{registry_server.host}/trees/hot:hot", f"{registry_server.host}/trees/hot-copy:1"):
        source, target = open_source(str(image), client), open_destination(name, client)
        add_hot_layer(source, target, trace_of(EXT4, READS), settings, client=client)
        assert read_checked(client, Reference.parse(name), settings) == EXT4_SHA256
    # Readers of a layout would find no trees.
    target = open_destination(f"oci:{tmp_path}/layout:hot", client)
    add_hot_layer(open_source(str(image), client), target, trace_of(EXT4, READS), settings, client=client)
    made = open_source(f"oci:{tmp_path}/layout:hot", client).manifest(host_platform(), overlaybd=True)
    assert without_trees(made) == made


def test_ordered_layers_of_a_protected_image_have_trees_of_their_own(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings
) -> None:
    image = push_image(registry_server, client, "trees/ordered")
    add_trees(client, image, image)
    name = f"{registry_server.host}/trees/ordered:new"
    order_layers(open_source(str(image), client), open_destination(name, client), trace_of(EXT4, READS))
    assert read_checked(client, Reference.parse(name), settings) == EXT4_SHA256


# -- conversions -----------------------------------------------------------------------------------------------------


def convert(source: Path, destination: str, client: RegistryClient, options: ConvertOptions) -> ConvertedImage:
    with (
        closing(open_source(f"oci:{source}", client)) as image,
        closing(open_destination(destination, client)) as target,
    ):
        return convert_image(image, target, options=options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    values = random.Random(1)
    make_layout(tmp_path / "source", [[member(name, values.randbytes(70_000))] for name in "ab"])
    return tmp_path / "source"


def test_a_conversion_into_a_registry_makes_trees(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings, source: Path, tmp_path: Path
) -> None:
    options = ConvertOptions(
        layer=LayerOptions(virtual_size=1 << 30), database=str(tmp_path / "database"), work_dir=tmp_path
    )
    name = f"{registry_server.host}/trees/converted"
    first = convert(source, f"{name}:1", client, options)
    reference = Reference.parse(f"{name}:1")
    assert all(oci.HASH_TREE in layer.annotations for layer in first.manifest.layers)
    disk = read_checked(client, reference, settings)
    assert client.referrers(client.repository(reference), first.digest, HASH_TREE_ARTIFACT)
    # Known as a whole; then known by its layers, whose trees the database has.
    assert convert(source, f"{name}:2", client, options).digest == first.digest
    again = convert(source, f"{name}:3", client, replace(options, mount_options="noatime"))
    assert [layer.reused for layer in again.layers] == ["was there"] * 2
    # In another repository, the layers are shared, and their trees are made again.
    other = f"{registry_server.host}/trees/converted-too:1"
    assert convert(source, other, client, options).digest == first.digest
    for each in (f"{name}:3", other):
        assert read_checked(client, Reference.parse(each), settings) == disk


def test_layers_of_a_base_get_trees(
    registry_server: RegistryServer, client: RegistryClient, settings: Settings, tmp_path: Path
) -> None:
    layers = [[member(name, random.Random(name).randbytes(70_000))] for name in "abc"]
    make_layout(tmp_path / "source", layers)
    make_layout(tmp_path / "base", layers[:2])
    small = ["--database", "none", "--vsize-gib", "1", "-q"]
    source, base, converted = (f"oci:{tmp_path}/{name}" for name in ("source", "base", "converted"))
    assert main(["image", "convert", base, converted, *small]) == 0
    image = Reference.parse(f"{registry_server.host}/trees/based:1")
    assert main(["image", "convert", source, str(image), "--base", base, converted, *small]) == 0
    assert all(oci.HASH_TREE in layer.annotations for layer in manifest_at(client, image).layers)
    assert read_checked(client, image, settings)


def test_conversions_without_trees(
    registry_server: RegistryServer, client: RegistryClient, source: Path, tmp_path: Path
) -> None:
    options = ConvertOptions(layer=LayerOptions(virtual_size=1 << 30), work_dir=tmp_path)
    name = f"{registry_server.host}/trees/without"
    treeless = convert(source, f"{name}:1", client, replace(options, hash_trees=False))
    layout = convert(source, f"oci:{tmp_path}/layout:1", client, options)
    docker = convert(source, f"{name}:2", client, replace(options, docker=True))
    assert treeless.digest == layout.digest
    for made in (treeless, layout, docker):
        assert without_trees(made.manifest) == made.manifest
    # The same image gets the same trees later.
    later = add_trees(client, Reference.parse(f"{name}:1"), Reference.parse(f"{name}:1"))
    assert later.digest == convert(source, f"{name}:3", client, options).digest


def test_a_registry_that_refuses_artifacts_is_logged(
    registry_server: RegistryServer,
    client: RegistryClient,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    image = push_image(registry_server, client, "trees/refused")
    put = RegistryDestination.put_manifest

    def refuse(self: RegistryDestination, descriptor: oci.Descriptor, data: bytes, *, tagged: bool = True) -> None:
        if HASH_TREE_ARTIFACT.encode() in data:
            raise SourceError("MANIFEST_INVALID", blob=self.name)
        put(self, descriptor, data, tagged=tagged)

    monkeypatch.setattr(RegistryDestination, "put_manifest", refuse)
    with caplog.at_level(logging.WARNING):
        add_trees(client, image, image)
    assert "may lose the hash trees some day" in caplog.text
    assert read_checked(client, image, settings) == EXT4_SHA256


def test_a_registrys_garbage_collection_keeps_the_files(
    registry_server: RegistryServer, client: RegistryClient, tmp_path: Path
) -> None:
    """On a copy of its storage, as a running registry must not be collected."""
    image = push_image(registry_server, client, "trees/collected")
    add_trees(client, image, image)
    files = tree_files(manifest_at(client, image))
    shutil.copytree(registry_server.storage / "docker", tmp_path / "storage" / "docker")
    config = tmp_path / "config.yml"
    config.write_text(f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path / 'storage'}\n")
    orphan = tmp_path / "storage/docker/registry/v2/blobs/sha256/00" / ("0" * 64)
    orphan.mkdir(parents=True)
    (orphan / "data").write_bytes(b"named by nothing")
    command = ["docker-registry", "garbage-collect", str(config)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert not orphan.exists()
    for file in files:
        digest = file.digest.removeprefix("sha256:")
        assert (tmp_path / f"storage/docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data").exists()
