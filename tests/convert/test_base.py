"""obdlab image convert --base: on layers that the original converted, or that were converted before."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import obdlab
from obdlab.cli.main import main
from obdlab.convert.compare.listing import list_volume
from obdlab.convert.endpoints.layout import digest_of_file
from obdlab.formats import oci
from obdlab.layers.lsmt import open_layer
from obdlab.localfile import LocalFile
from obdlab.volumes.ext4.volume import Volume
from tests.convert.goldens import GOLDEN, golden_view, wanted_view
from tests.convert.layouts import Layout, directory, member, tar_bytes
from tests.snapshotter.imagefiles import golden_layers

TARS = [(GOLDEN / f"layer{number}.tar").read_bytes() for number in (1, 2)]
MORE = tar_bytes([member("many/added", b"1" * 100_000), directory("new/"), member("etc/.wh..wh..opq")])


def image(root: Path, tars: list[bytes]) -> str:
    layout = Layout(root)
    layout.write_index([layout.add_image(tars)])
    return f"oci:{root}"


def originals(root: Path, *, fs_type: str = "", trace: bool = False, extra: bool = False) -> str:
    """The layers that the original converted, as an image of them."""
    layers, notes = golden_layers()
    layout = Layout(root)
    made = list(zip(layers, notes, strict=True))
    if extra:  # as if mkfs had a layer of its own: one more layer than the image had
        made.append(made[1])
    described = []
    for number, (layer, note) in enumerate(made):
        more = {oci.BLOB_FS_TYPE: fs_type} if fs_type else {}
        more |= {oci.ACCELERATION_LAYER: "yes"} if trace and number == len(made) - 1 else {}
        described.append(layout.add_blob(layer, oci.OCI_LAYER, annotations=note | more))
    diff_ids = [layer["digest"] for layer in described]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": layout.add_json(config, oci.OCI_CONFIG),
        "layers": described,
    }
    platform = {"os": "linux", "architecture": "amd64"}
    layout.write_index([layout.add_json(manifest, oci.OCI_MANIFEST, platform=platform)])
    return f"oci:{root}"


def convert(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["image", "convert", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def documents(layout: str) -> tuple[dict[str, Any], dict[str, Any]]:
    root = Path(layout.removeprefix("oci:"))
    (entry,) = json.loads((root / "index.json").read_text())["manifests"]

    def blob(digest: str) -> dict[str, Any]:
        return json.loads((root / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_text())

    manifest = blob(entry["digest"])
    return manifest, blob(manifest["config"]["digest"])


def files(layout: str) -> list[str]:
    digests = [layer["digest"] for layer in documents(layout)[0]["layers"]]
    return [f"{layout.removeprefix('oci:')}/blobs/sha256/{digest.removeprefix('sha256:')}" for digest in digests]


def same(capsys: pytest.CaptureFixture[str], source: str, converted: str) -> bool:
    main(["image", "verify", source, converted, "--json"])
    (tree,) = json.loads(capsys.readouterr().out)["trees"]
    # The original shortens the target of a link, and keeps an attribute that containerd leaves out.
    return tree["paths"] > 0 and {line.partition(":")[0] for line in tree["differences"]} <= {"usr/odd1", "xa"}


@pytest.fixture(autouse=True)
def _no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBDLAB_CONVERT_DATABASE", "none")


@pytest.mark.parametrize("destination", ["oci:{}/new", "oci-archive:{}/new.tar"])
def test_layers_go_on_a_base_of_the_originals(
    destination: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image(tmp_path / "source", [*TARS, MORE])
    base, converted = image(tmp_path / "base", TARS), originals(tmp_path / "converted")
    new = destination.format(tmp_path)
    facts = convert(capsys, source, new, "--base", base, converted)
    assert same(capsys, source, new)
    (made,) = facts["images"]
    assert [layer["reused"] for layer in made["layers"]] == ["base", "base", ""]
    assert [layer["digest"] for layer in made["layers"][:2]] == [oci.digest_of(layer) for layer in golden_layers()[0]]
    if new.startswith("oci:"):
        manifest, config = documents(new)
        assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
        assert [step["created_by"] for step in config["history"]] == ["layer 0", "layer 1", "layer 2"]
        with obdlab.open_stack(files(new)[:2]) as disk:
            assert golden_view(list_volume(Volume(disk))) == wanted_view(2)
        with open_layer(LocalFile(files(new)[1])) as below, open_layer(LocalFile(files(new)[2])) as above:
            assert above.parent_uuid == below.uuid


@pytest.mark.parametrize("packed", [False, True])
def test_a_base_in_an_archive_gives_its_layers_alone(
    packed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, base = image(tmp_path / "source", [*TARS, MORE]), image(tmp_path / "base", TARS)
    originals(tmp_path / "converted")
    archive, new = tmp_path / "converted.tar", f"oci:{tmp_path}/new"
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "converted", ".")
    if packed:
        archive.write_bytes(gzip.compress(archive.read_bytes(), 1))
    convert(capsys, source, new, "--base", base, f"oci-archive:{archive}")
    assert [digest_of_file(Path(path)) for path in files(new)] == [f"sha256:{Path(path).name}" for path in files(new)]
    assert same(capsys, source, new)


def test_a_base_of_fewer_or_more_layers_than_its_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, base = image(tmp_path / "source", [*TARS, MORE]), image(tmp_path / "base", TARS)
    one = f"oci:{tmp_path}/one"
    convert(capsys, base, one, "--flatten", "1")
    convert(capsys, source, f"oci:{tmp_path}/fewer", "--base", base, one)
    assert same(capsys, source, f"oci:{tmp_path}/fewer")
    _, config = documents(f"oci:{tmp_path}/fewer")
    assert [bool(step.get("empty_layer")) for step in config["history"]] == [True, False, False]
    more = originals(tmp_path / "converted", extra=True)
    convert(capsys, source, f"oci:{tmp_path}/more", "--base", base, more)
    _, config = documents(f"oci:{tmp_path}/more")
    assert len(config["rootfs"]["diff_ids"]) == 4
    assert [step["created_by"] for step in config["history"]] == ["base", "layer 0", "layer 1", "layer 2"]


def test_an_image_that_is_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, converted = image(tmp_path / "source", TARS), originals(tmp_path / "converted")
    convert(capsys, source, f"oci:{tmp_path}/new", "--base", source, converted)
    assert same(capsys, source, f"oci:{tmp_path}/new")
    assert len(files(f"oci:{tmp_path}/new")) == 2


def test_known_images_are_known_by_their_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBDLAB_CONVERT_DATABASE", str(tmp_path / "database"))
    source, base = image(tmp_path / "source", [*TARS, MORE]), image(tmp_path / "base", TARS)
    converted, new = originals(tmp_path / "converted"), f"oci:{tmp_path}/new"
    plain = convert(capsys, source, new)
    first = convert(capsys, source, new, "--base", base, converted)
    again = convert(capsys, source, new, "--base", base, converted)
    assert plain["digest"] != first["digest"] == again["digest"]
    assert len(again["images"][0]["layers"]) == 3
    assert not any(layer["stored"] for layer in again["images"][0]["layers"])
    assert same(capsys, source, new)


@pytest.mark.parametrize(
    ("options", "flags", "printed"),
    [
        ([], {"other": True}, "image is not built on {base} (got 1 layers in common, wanted its 2 layers"),
        ([], {"fs_type": "xfs"}, "no layers can be added to the base (got xfs, wanted ext4)"),
        ([], {"trace": True}, "base has a trace on top"),
        (["--fs", "erofs"], {}, "layers on a base are overlaybd's, of ext4 (got erofs)"),
        (["--flatten", "2"], {}, "too few layers to flatten to (got 2, wanted more than the base's 2)"),
    ],
)
def test_bases_that_are_refused(
    options: list[str], flags: dict[str, Any], printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {name: value for name, value in flags.items() if name != "other"}
    source = image(tmp_path / "source", [TARS[0], MORE] if "other" in flags else [*TARS, MORE])
    base, converted = image(tmp_path / "base", TARS), originals(tmp_path / "converted", **made)
    words = ["image", "convert", source, f"oci:{tmp_path}/new", "--base", base, converted, *options]
    assert main(words) == 1
    assert printed.format(base=base) in capsys.readouterr().err.replace(f"{tmp_path}/base", base).replace(
        "oci:oci:", "oci:"
    )


def test_a_base_that_is_not_converted_or_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, base = image(tmp_path / "source", [*TARS, MORE]), image(tmp_path / "base", TARS)
    words = ["image", "convert", source, f"oci:{tmp_path}/new", "--base", base]
    assert main([*words, base]) == 1
    assert "base is not an overlaybd image" in capsys.readouterr().err
    large = f"oci:{tmp_path}/large"
    convert(capsys, base, large, "--vsize-gib", "3")
    assert main([*words, large, "--vsize-gib", "2"]) == 1
    assert "disk of the base is too large (got 3221225472, wanted at most 2147483648 (--vsize-gib))" in (
        capsys.readouterr().err
    )
