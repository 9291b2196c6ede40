"""Whole turboOCI images: their documents, their blobs, and opening them by an image configuration."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.convert.compare.listing import differences, list_volume
from obdlab.convert.endpoints.disks import stored_disk
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.convert.platforms import convert_platforms
from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.formats.tarsums import SumsHeader
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import open_image
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from obdlab.volumes.erofs.volume import Volume as ErofsVolume
from obdlab.volumes.ext4.volume import Volume as Ext4Volume
from tests.convert.converting import convert
from tests.convert.images import whole_image
from tests.convert.layouts import Layout, compress, digest_of, make_layout, member, tar_bytes
from tests.convert.turbo.test_builder import listing_of
from tests.registry.server import RegistryServer

TARS = [tar_bytes(members) for members in whole_image()]
OPTIONS = LayerOptions(virtual_size=1 << 30)


def turbo(work_dir: Path, *filesystems: str, **more: object) -> ConvertOptions:
    return ConvertOptions(layer=OPTIONS, turbo=filesystems or ("ext4",), work_dir=work_dir, **more)  # type: ignore[arg-type]


def unpacked(layer: oci.Descriptor, layout: ImageLayout, directory: Path) -> list[str]:
    directory.mkdir()
    with tarfile.open(layout.blob_path(layer.digest), "r:gz") as tar:
        tar.extractall(directory, filter="data")
        return tar.getnames()


@pytest.mark.parametrize("how", ["plain", "gzip"])
@pytest.mark.parametrize("filesystems", [("ext4",), ("erofs",), ("ext4", "erofs")])
def test_an_image_opens_from_its_blobs(tmp_path: Path, filesystems: tuple[str, ...], how: str) -> None:
    make_layout(tmp_path / "source", whole_image(), how=how)
    image = convert(f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}:v1", turbo(tmp_path, *filesystems))
    layout = ImageLayout(tmp_path / "out")
    assert image.is_turbo
    config = oci.Config.parse(layout.read_blob(image.manifest.config, 1 << 20))
    lowers: dict[str, list[LowerConfig]] = {name: [] for name in filesystems}
    for number, (layer, tar) in enumerate(zip(image.manifest.layers, TARS, strict=True)):
        directory = tmp_path / f"{number}"
        names = unpacked(layer, layout, directory)
        index = ["gzip.meta"] if how == "gzip" else []
        assert names == [
            *(f"{name}.fs.meta" for name in filesystems),
            ".turbo.ociv1",
            *index,
            "tar.sums",
            ".turbo.target",
        ]
        sums = (directory / "tar.sums").read_bytes()
        assert SumsHeader.from_bytes(sums, file_size=len(sums)).tar_size == len(tar)
        stored = compress(tar, how)
        assert (directory / ".turbo.target").read_text() == f"{digest_of(stored)},{len(stored)}\n"
        assert layer.media_type == oci.OCI_LAYER_GZIP
        assert layer.annotations == {
            oci.OVERLAYBD_VERSION: "0.1.0-turbo.ociv1",
            oci.BLOB_DIGEST: layer.digest,
            oci.BLOB_SIZE: str(layer.size),
            oci.TURBO_TARGET_DIGEST: digest_of(compress(tar, how)),
            oci.TURBO_TARGET_MEDIA_TYPE: oci.OCI_LAYER_GZIP if index else oci.OCI_LAYER,
            oci.TAR_SUMS: digest_of(sums),
        }
        blob = layout.blob_path(layer.digest).read_bytes()
        assert config.diff_ids[number] == digest_of(gzip.decompress(blob))
        target = str(layout.blob_path(digest_of(compress(tar, how))))
        for name in filesystems:
            lower = LowerConfig(file=str(directory / f"{name}.fs.meta"), target_file=target)
            lowers[name].append(replace(lower, gzip_index=str(directory / "gzip.meta") if index else ""))
    volumes = {"ext4": Ext4Volume, "erofs": ErofsVolume}
    for name in filesystems:
        with open_image(ImageConfig(lowers=tuple(lowers[name])), Settings()) as disk:
            assert differences(list_volume(volumes[name](disk)), listing_of(TARS)) == []


@pytest.mark.parametrize("how", ["zstd", "zstd frames"])
def test_zstd_layers_are_for_obdlab_alone(tmp_path: Path, how: str) -> None:
    make_layout(tmp_path / "source", whole_image(), how=how)
    source = f"oci:{tmp_path / 'source'}"
    with pytest.raises(FormatError, match=r"without --as turbo-oci, or with --zstd-layers .*got zstd"):
        convert(source, f"oci:{tmp_path / 'out'}:v1", turbo(tmp_path))
    image = convert(source, f"oci:{tmp_path / 'out'}:v1", turbo(tmp_path, "ext4", "erofs", zstd_layers=True))
    stored = ImageLayout(tmp_path / "out")
    for number, layer in enumerate(image.manifest.layers):
        names = unpacked(layer, stored, tmp_path / f"{number}")
        # By the original's names there is nothing that it could read wrongly.
        assert names == [
            *("ext4.zstd.meta", "erofs.zstd.meta", ".turbo.ociv1", "zstd.meta", "tar.sums", ".turbo.target")
        ]
        assert layer.annotations[oci.TURBO_TARGET_MEDIA_TYPE] == oci.OCI_LAYER_ZSTD
    with stored_volume(f"oci:{tmp_path / 'out'}:v1") as volume:
        assert differences(list_volume(volume), listing_of(TARS)) == []


def test_archives_are_sources_and_destinations(tmp_path: Path) -> None:
    make_layout(tmp_path / "source", whole_image(), how="gzip")
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        tar.add(tmp_path / "source", ".")
    archive = f"oci-archive:{tmp_path / 'out.tar'}:v1"
    made = convert(f"oci-archive:{tmp_path / 'source.tar'}", archive, turbo(tmp_path))
    again = convert(f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}:v1", turbo(tmp_path))
    assert made.digest == again.digest
    with stored_volume(archive) as volume:
        assert differences(list_volume(volume), listing_of(TARS)) == []


@contextmanager
def stored_volume(name: str) -> Iterator[Ext4Volume]:
    with (
        closing(RegistryClient()) as client,
        closing(open_source(name, client)) as source,
        stored_disk(source, host_platform()) as disk,
    ):
        yield Ext4Volume(disk)


def test_every_platform_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "source")
    tars = {name: tar_bytes([member(name, name.encode() * 1000)]) for name in ("amd64", "arm64")}
    layout.write_index([layout.add_image([tar], how="plain", architecture=name) for name, tar in tars.items()])
    digests = set()
    for out in ("one", "two"):
        with closing(RegistryClient()) as client:
            source = open_source(f"oci:{tmp_path / 'source'}", client)
            destination = open_destination(f"oci:{tmp_path / out}:v1", client)
            made = convert_platforms(source, destination, options=turbo(tmp_path, "ext4", "erofs"))
        assert [image.is_turbo for image in made.images] == [True, True]
        digests.add(made.digest)
        stored = ImageLayout(tmp_path / out)
        assert all(stored.blob_path(digest_of(tar)).is_file() for tar in tars.values())
    assert len(digests) == 1


def push(
    server: RegistryServer, layout: Path, name: str, opened: RegistryClient | None = None
) -> tuple[str, oci.Descriptor]:
    # Returns the name of a plain image in the registry, and the descriptor of its manifest.
    reference = f"{server.host}/{name}:v1"
    with closing(opened or RegistryClient()) as client:
        repository = client.repository(Reference.parse(reference))
        source = ImageLayout(layout)
        (entry,) = source.select("latest")
        data = source.read_blob(entry, 1 << 20)
        manifest = oci.Manifest.parse(data)
        for blob in (manifest.config, *manifest.layers):
            path = source.blob_path(blob.digest)
            client.push_blob(repository, blob.digest, blob.size, lambda path=path: path.open("rb"))
        client.put_manifest(Reference.parse(reference), entry.media_type, data)
    return reference, oci.Descriptor(entry.media_type, entry.digest, entry.size)


@pytest.mark.registry
def test_in_a_registry_the_source_is_referred_to(
    registry_server: RegistryServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_layout(tmp_path / "source", [[member("a", b"a" * 9000)]], how="plain")
    source, subject = push(registry_server, tmp_path / "source", "turbo/image")
    destination = source.replace(":v1", ":v1-turbo")
    image = convert(source, destination, turbo(tmp_path, referrer=True))
    assert image.manifest.subject == subject
    assert image.manifest.artifact_type == "application/vnd.containerd.overlaybd.turbo.v1+json"
    with closing(RegistryClient()) as client:
        reference = Reference.parse(destination)
        fetched = client.get_manifest(reference)
        assert oci.digest_of(fetched.data) == image.digest
        assert client.has_blob(client.repository(reference), image.manifest.layers[0].turbo_target or "")
    for options in (["-q"], ["--json"]):
        assert (
            main(["image", "convert", source, destination, *options, "--as", "turbo-oci", "--database", "none"]) == 0
        )
        printed = capsys.readouterr()
        assert printed.err == (
            f"its files stay in the layers of {source}: keep that image, with its tag, or the registry's garbage "
            "collection may delete them\n"
        )
        assert printed.out.startswith("sha256:" if options == ["-q"] else "{")
    elsewhere = f"{registry_server.host}/turbo/other:v1"
    with pytest.raises(FormatError, match=r"must be in the repository .*wanted a source in the same"):
        convert(source, elsewhere, turbo(tmp_path))
    with pytest.raises(FormatError, match="must be in the repository"):
        convert(f"oci:{tmp_path / 'source'}", elsewhere, turbo(tmp_path))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = make_layout(tmp_path / "source", [[member("a", b"1" * 100_000)]], how="plain")
    command = ["image", "convert", str(layout.root), f"oci:{tmp_path / 'out'}:v1", "--work-dir", str(tmp_path)]
    common = ["--vsize-gib", "1", "--database", "none", "--as", "turbo-oci", "--fs", "both"]
    assert main([*command, *common]) == 0
    printed = capsys.readouterr()
    (entry,) = ImageLayout(tmp_path / "out").select("v1")
    assert printed.out == f"{entry.digest}\n"
    assert "its files are in the source's layers, which are beside it now, but in no manifest" in printed.err
    assert main([*command, *common, "--json"]) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert image["digest"] == entry.digest
    assert image["layers"][0]["data_size"] < 500_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fs", "both"], "--fs both needs --as turbo-oci"),
        (["--as", "turbo-oci", "--flatten", "1"], "--flatten is not possible"),
        (["--as", "turbo-oci", "--mount-options", "noatime"], "--mount-options are not possible"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["image", "convert", f"oci:{tmp_path}", f"oci:{tmp_path / 'out'}:v1", *options]) == 2
    assert message in capsys.readouterr().err


def test_compressed_layers_name_the_way_out(tmp_path: Path) -> None:
    make_layout(tmp_path / "source", [[member("a", b"a")]], how="zstd")
    with pytest.raises(FormatError, match=r"convert the image as a whole.*got zstd"):
        convert(f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}:v1", turbo(tmp_path))
    assert not (tmp_path / "out" / "index.json").exists() or not ImageLayout(tmp_path / "out").select("v1")
