"""``obdlab image inspect`` and ``pull-blob`` of images, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from obdlab.cli.main import main
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.formats import oci
from tests.e2e.images import file_layer, push_converted
from tests.registry.server import RegistryServer, registry_server

__all__ = ["registry_server"]

pytestmark = pytest.mark.registry


@pytest.fixture(scope="module")
def image(registry_server: RegistryServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A converted image of two layers, from the original beside it (``-plain``)."""
    layers = [file_layer({"a": bytes(range(256)) * 200}), file_layer({"b": b"top\n"})]
    work_dir = tmp_path_factory.mktemp("convert")
    # Without hash trees, so that the manifest is the one in the layout.
    return push_converted(registry_server.host, "images/two", layers, work_dir, hash_trees=False)


@pytest.fixture
def layout(image: str, tmp_path: Path) -> Path:
    """The same image in an OCI layout."""
    plain = image.replace("/two:obd", "/two-plain:latest")
    assert main(["image", "convert", "-q", "--database", "none", plain, f"oci:{tmp_path / 'layout'}:obd"]) == 0
    return tmp_path / "layout"


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["image", "inspect", "--json", *map(str, arguments)]) == 0
    (found,) = json.loads(capsys.readouterr().out)["images"]
    return dict(found)


def test_an_image_in_a_registry(image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    found = inspected(capsys, image, *cache)
    assert (found["kind"], found["filesystem"], found["hot_layer"], found["trace"]) == (
        "overlaybd",
        "ext4",
        False,
        "",
    )
    assert found["verified"].startswith("not verified: ")
    assert found["cached_size"] == 0
    first, second = found["layers"]
    assert (first["compression"], first["block_size"]) == ("zstd", 16384)
    assert first["annotations"][oci.BLOB_DIGEST] == first["digest"] != second["digest"]
    assert found["size"] == first["size"] + second["size"]
    # What is read of it is cached, and told of.
    assert main(["image", "cat", f"{image}:/b", *map(str, cache)]) == 0
    assert capsys.readouterr().out == "top\n"
    again = inspected(capsys, image, *cache)
    assert again["cached_size"] == sum(layer["cached_size"] for layer in again["layers"]) > 0
    assert inspected(capsys, image, *cache, "--verify")["verified"] == (
        "verified: every layer was read whole and matches its digest"
    )
    assert main(["image", "inspect", image, *map(str, cache)]) == 0
    text = capsys.readouterr().out
    for wanted in (
        f"{image}: overlaybd image for linux/",
        f"manifest     {found['digest']} ({oci.OCI_MANIFEST})",
        "file system  ext4",
        "hot layer    no",
        "integrity    not verified: ",
        f"  0  {first['digest']}  ",
        "zstd, 16 KiB blocks",
        f"{oci.BLOB_SIZE}={second['size']}",
        "of it cached",
    ):
        assert wanted in text


def test_images_in_layouts_and_archives_and_plain_ones(
    image: str, layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "image",
                "convert",
                "-q",
                "--database",
                "none",
                image.replace("/two:obd", "/two-plain:latest"),
                f"oci-archive:{tmp_path / 'a.tar'}:obd",
                "--algorithm",
                "lz4",
                "--block-size-kib",
                "4",
            ]
        )
        == 0
    )
    found = inspected(capsys, f"oci:{layout}")
    assert (found["kind"], found["layers"][0]["compression"], found["cached_size"]) == ("overlaybd", "zstd", None)
    assert inspected(capsys, layout)["digest"] == found["digest"] == inspected(capsys, image)["digest"]
    packed = inspected(capsys, f"oci-archive:{tmp_path / 'a.tar'}:obd", "--verify")
    assert (packed["layers"][0]["compression"], packed["layers"][0]["block_size"]) == ("lz4", 4096)
    plain = inspected(capsys, image.replace("/two:obd", "/two-plain:latest"))
    assert (plain["kind"], plain["layers"][0]["compression"], plain["filesystem"]) == ("plain", "gzip", "")


def test_verify_finds_damage(layout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = inspected(capsys, layout)["layers"][1]["digest"]
    blob = layout / "blobs" / "sha256" / digest.removeprefix("sha256:")
    content = bytearray(blob.read_bytes())
    content[2000] ^= 1
    blob.write_bytes(content)
    assert main(["image", "inspect", str(layout)]) == 0
    assert main(["image", "inspect", "--verify", str(layout)]) == 1
    assert "wrong content" in capsys.readouterr().err


def test_a_hot_layer_is_told(layout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ImageLayout(layout).open_blob(ImageLayout(layout).select(None)[0]) as file:
        document = json.loads(file.read())
    document["layers"][1]["annotations"][oci.HOT_LAYER] = "yes"
    data = json.dumps(document).encode()
    ImageLayout(layout).add_bytes(oci.digest_of(data), data)
    ImageLayout(layout).set_tag("hot", oci.Descriptor(oci.OCI_MANIFEST, oci.digest_of(data), len(data)))
    found = inspected(capsys, f"oci:{layout}:hot")
    assert (found["hot_layer"], [layer["hot"] for layer in found["layers"]]) == (True, [False, True])
    assert main(["image", "inspect", f"oci:{layout}:hot"]) == 0
    assert "hot layer    yes, the top layer" in capsys.readouterr().out


def test_turbo_oci_images_are_named_and_refused(layout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ImageLayout(layout).open_blob(ImageLayout(layout).select(None)[0]) as file:
        document = json.loads(file.read())
    target = "sha256:" + "ab" * 32
    document["layers"][1]["annotations"][oci.TURBO_TARGET_DIGEST] = target
    data = json.dumps(document).encode()
    ImageLayout(layout).add_bytes(oci.digest_of(data), data)
    ImageLayout(layout).set_tag("turbo", oci.Descriptor(oci.OCI_MANIFEST, oci.digest_of(data), len(data)))
    assert main(["image", "inspect", "--json", f"oci:{layout}:turbo"]) == 1  # there is no target
    answer = json.loads(capsys.readouterr().out)
    (found,) = answer["images"]
    assert (found["kind"], [layer["kind"] for layer in found["layers"]]) == ("mixed", ["overlaybd", "turboOCI"])
    assert target in answer["errors"][0]
    for command in (["image", "verify", f"oci:{layout}:obd"], ["image", "compare", f"oci:{layout}:obd"]):
        assert main([*command, f"oci:{layout}:turbo"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "damaged gzip data" in line


def pulled(path: Path, *arguments: str) -> bytes:
    assert main(["image", "pull-blob", "-q", "--force", "-o", str(path), *arguments]) == 0
    return path.read_bytes()


def test_every_piece_of_an_image(
    image: str, layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    found = inspected(capsys, image)
    repository = image.rpartition(":")[0]
    for name in (image, f"docker://{image}", f"oci:{layout}:obd"):
        document = pulled(out, name)
        assert oci.digest_of(document) == found["digest"]
        assert json.loads(document)["config"]["digest"] == found["config"]
        assert oci.digest_of(pulled(out, name, "config")) == found["config"]
        assert pulled(out, name, "index") == document
        for number, layer in enumerate(found["layers"]):
            content = pulled(out, name, str(number))
            assert oci.digest_of(content) == layer["digest"]
            assert pulled(out, name, layer["digest"]) == content
            assert pulled(out, name, layer["digest"], "--range", "10-30") == content[10:30]
            assert pulled(out, name, layer["digest"], "--range", "1000-") == content[1000:]
    layer = found["layers"][0]["digest"]
    assert oci.digest_of(pulled(out, f"{repository}@{layer}")) == layer
    assert oci.digest_of(pulled(out, f"{repository}@{found['digest']}")) == found["digest"]
    assert oci.digest_of(pulled(out, f"{repository}@{found['config']}")) == found["config"]
    assert main(["image", "pull-blob", image]) == 0
    assert oci.digest_of(capsys.readouterr().out.encode()) == found["digest"]


def test_a_blob_that_cannot_be_had_leaves_no_file(
    image: str, layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    found = inspected(capsys, layout)
    blob = layout / "blobs" / "sha256" / found["layers"][0]["digest"].removeprefix("sha256:")
    blob.write_bytes(bytes(len(blob.read_bytes())))
    absent = "sha256:" + hashlib.sha256(b"absent").hexdigest()
    for arguments, text in (
        ([f"oci:{layout}", "0"], "wrong content"),
        ([f"oci:{layout}", absent], "nothing here has this digest"),
        ([f"oci:{layout}", "7"], "wanted index, manifest, config, a digest, or a layer's number from 0 to 1"),
        ([image, absent], absent),
        ([f"{image.rpartition(':')[0]}@{absent}"], "404"),
        ([image, "0", "--range", "5-999999999"], "no such range"),
    ):
        assert main(["image", "pull-blob", "-o", str(out), *arguments]) == 1
        error = capsys.readouterr().err
        assert text in error
        assert len(error.splitlines()) == 1
        assert not out.exists()
    out.write_bytes(b"mine")
    assert main(["image", "pull-blob", "-o", str(out), image]) == 1
    assert out.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {"layout", "out"}
