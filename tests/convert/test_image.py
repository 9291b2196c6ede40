"""Whole conversions on real devices: the mounted result, its documents, both ways of source and destination."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.compare.listing import differences, list_tree
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.formats import oci
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from tests.convert.converting import convert, lowers_of, mounted, stacks
from tests.convert.goldens import GOLDEN, golden_view, wanted_view
from tests.convert.images import whole_image
from tests.convert.layouts import Layout, directory, make_layout, member, tar_bytes
from tests.convert.oracle import stable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.server.client import DeviceService
    from tests.convert.oracle import Containerd
    from tests.registry.server import RegistryServer

pytestmark = pytest.mark.kernel


@pytest.mark.containerd
def test_every_depth_lists_as_overlayfs(
    devices: DeviceService, work_dir: Path, containerd: Containerd, tmp_path: Path
) -> None:
    layers = whole_image()
    make_layout(tmp_path / "source", layers, how=["gzip", "zstd", "plain", "gzip"])
    image = convert(str(tmp_path / "source"), f"oci:{tmp_path / 'out'}:v1", ConvertOptions(work_dir=work_dir))
    for depth, config in enumerate(stacks(lowers_of(image, tmp_path / "out"))):
        make_layout(tmp_path / f"source{depth}", layers[: depth + 1])
        wanted = containerd.listing(tmp_path / f"source{depth}", f"depth{depth}")
        with mounted(config, devices, tmp_path / f"depth{depth}") as root:
            got = list_tree(root)
        assert differences(got, wanted, ignore_at=stable(wanted)) == []
    assert len(wanted) > 60


def test_golden_tars_list_as_the_original_converted_them(
    devices: DeviceService, work_dir: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "source")
    layout.write_index([layout.add_image([(GOLDEN / f"layer{n}.tar").read_bytes() for n in (1, 2)])])
    image = convert(str(layout.root), f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=work_dir))
    for depth, config in enumerate(stacks(lowers_of(image, tmp_path / "out"))):
        wanted = wanted_view(depth + 1)
        del wanted["lost+found"]  # part of no layer; ours is removed
        with mounted(config, devices, tmp_path / f"depth{depth}") as root:
            assert golden_view(list_tree(root)) == wanted


def test_from_registry_to_registry(
    devices: DeviceService, work_dir: Path, registry_server: RegistryServer, tmp_path: Path
) -> None:
    # The same layer twice, and one without members.
    twice = [member("a", b"1" * 100_000), directory("d/"), member("d/b", b"2")]
    make_layout(tmp_path / "source", [twice, [], twice, [member("d/.wh.b")]])
    plain = f"{registry_server.host}/convert/plain:v1"
    _push_layout(tmp_path / "source", Reference.parse(plain))
    converted = f"{registry_server.host}/convert/obd:v1"
    options = ConvertOptions(layer=LayerOptions("zstd", 16384, 1 << 30), docker=True, work_dir=work_dir)
    image = convert(plain, converted, options)

    with closing(RegistryClient()) as client:
        fetched = client.get_manifest(Reference.parse(converted))
        assert fetched.digest == image.digest
        assert fetched.media_type == oci.DOCKER_MANIFEST
        manifest = oci.Manifest.parse(fetched.data)
        repository = client.repository(Reference.parse(converted))
        config_data = client.read_blob(repository, manifest.config.digest, manifest.config.size, 1 << 20)
    config = oci.Config.parse(config_data)
    assert list(config.diff_ids) == [layer.digest for layer in manifest.layers]
    assert config.document["history"][3] == {"created_by": "layer 3"}
    for layer in manifest.layers:
        assert layer.media_type == oci.DOCKER_LAYER
        assert dict(layer.annotations) == {
            oci.BLOB_DIGEST: layer.digest,
            oci.BLOB_SIZE: str(layer.size),
            oci.OVERLAYBD_VERSION: "0.1.0",
            oci.BLOB_FS_TYPE: "ext4",
        }
    lowers = tuple(LowerConfig(digest=layer.digest, size=layer.size) for layer in manifest.layers)
    with mounted(ImageConfig(repository.blobs_url, lowers), devices, tmp_path / "lazy") as root:
        assert sorted(list_tree(root)) == [".", "a", "d"]
        assert (root / "a").read_bytes() == b"1" * 100_000


def _push_layout(root: Path, reference: Reference) -> None:
    layout = ImageLayout(root)
    (entry,) = layout.select(None)
    data = layout.read_blob(entry, 1 << 20)
    manifest = oci.Manifest.parse(data)
    with closing(RegistryClient()) as client:
        repository = client.repository(reference)
        for blob in {b.digest: b for b in (manifest.config, *manifest.layers)}.values():
            client.push_blob(repository, blob.digest, blob.size, partial(layout.blob_path(blob.digest).open, "rb"))
        client.put_manifest(reference, entry.media_type, data)


@pytest.fixture(autouse=True)
def _own_time_zone() -> Iterator[None]:
    yield
    time.tzset()  # as the environment, put back by now, says


@pytest.mark.parametrize(
    "options",
    [
        ConvertOptions(),
        ConvertOptions(layer=LayerOptions("zstd", 16384, 1 << 30, "erofs"), docker=True),
        ConvertOptions(layer=LayerOptions(virtual_size=1 << 30, filesystem="erofs"), flatten=2, referrer=True),
        ConvertOptions(
            layer=LayerOptions(virtual_size=1 << 30, inode_ratio=65536), flatten=1, mount_options="noatime"
        ),
    ],
    ids=["defaults", "erofs-zstd-docker", "erofs-flat-referrer", "ext4-flat"],
)
def test_same_image_same_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: ConvertOptions) -> None:
    # In other places, at other times, in another time zone, with layers of an image converted before.
    make_layout(tmp_path / "source", whole_image(), how=["gzip", "zstd", "plain", "gzip"])
    make_layout(tmp_path / "lower", whole_image()[:1])
    documents = []
    for number, (zone, mask) in enumerate((("UTC", 0o022), ("Pacific/Auckland", 0o077))):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        work = tmp_path / f"work{number}"
        work.mkdir()
        here = replace(options, work_dir=work, database=str(tmp_path / "database") if number else "")
        before = os.umask(mask)
        try:
            if number:
                convert(str(tmp_path / "lower"), f"oci:{tmp_path / 'out1'}:lower", here)
            image = convert(str(tmp_path / "source"), f"oci:{tmp_path / f'out{number}'}", here)
        finally:
            os.umask(before)
        documents.append(image.document)
    assert documents[0] == documents[1]


@pytest.mark.parametrize("filesystem", ["ext4", "erofs"])
def test_needs_no_privileges(tmp_path: Path, filesystem: str) -> None:
    # Without a single capability even root can make no device node, give no file away and mount nothing.
    make_layout(tmp_path / "source", whole_image())
    options = ConvertOptions(layer=LayerOptions(filesystem=filesystem), work_dir=tmp_path)
    wanted = convert(str(tmp_path / "source"), f"oci:{tmp_path / 'out'}", options).digest
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"] if os.geteuid() == 0 else []
    command = [
        *powerless,
        sys.executable,
        "-m",
        "obdlab",
        "image",
        "convert",
        "-q",
        "--fs",
        filesystem,
        "--work-dir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'again'}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wanted


def test_upper_layers_hold_only_what_they_changed(devices: DeviceService, work_dir: Path, tmp_path: Path) -> None:
    big = bytes(range(256)) * 20_000
    make_layout(tmp_path / "source", [[member("big", big)], [member("small", b"x")], []])
    image = convert(str(tmp_path / "source"), f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=work_dir))
    first, second, third = (layer.built for layer in image.layers)
    assert first.data_size > len(big)
    assert second.data_size <= 64 << 10
    assert third.data_size <= 16 << 10


def test_index_gives_the_platform_asked_for(devices: DeviceService, work_dir: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "source")
    images = {
        name: layout.add_image([tar_bytes([member(name, b"x")])], architecture=name) for name in ("amd64", "arm64")
    }
    attestation = {**images["amd64"], "platform": {"os": "unknown", "architecture": "unknown"}}
    index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [attestation, *images.values()]}
    nested = layout.add_json(index, oci.OCI_INDEX)
    layout.write_index([nested], tag="example.org/name:v9")
    options = ConvertOptions(platform=oci.Platform("linux", "arm64"), work_dir=work_dir)
    image = convert(f"oci:{layout.root}:v9", f"oci:{tmp_path / 'out'}:a", options)
    with mounted(stacks(lowers_of(image, tmp_path / "out"))[-1], devices, tmp_path / "look") as root:
        assert sorted(list_tree(root)) == [".", "arm64"]
    (entry,) = ImageLayout(tmp_path / "out").select("a")
    assert entry.platform == oci.Platform("linux", "arm64")


def test_destination_layout_keeps_other_tags(devices: DeviceService, work_dir: Path, tmp_path: Path) -> None:
    make_layout(tmp_path / "one", [[member("1", b"1")]])
    make_layout(tmp_path / "two", [[member("2", b"2")]])
    options = ConvertOptions(work_dir=work_dir)
    first = convert(str(tmp_path / "one"), f"oci:{tmp_path / 'out'}:one", options)
    convert(str(tmp_path / "one"), f"oci:{tmp_path / 'out'}:two", options)
    second = convert(str(tmp_path / "two"), f"oci:{tmp_path / 'out'}:two", options)
    layout = ImageLayout(tmp_path / "out")
    assert [entry.digest for entry in layout.select("one")] == [first.digest]
    assert [entry.digest for entry in layout.select("two")] == [second.digest]
