"""The targets of stored turboOCI images: each wrong one is named, with what, where, got and wanted."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obdlab.cli.main import main
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.formats import oci
from tests.convert.converting import convert
from tests.convert.layouts import compress, digest_of, directory, make_layout, member, tar_bytes

LAYERS = [
    [directory("d"), member("d/a", b"".join(b"line %d\n" % number for number in range(50_000)))],
    [member("b", b"top\n" * 400)],
]
STORED = compress(tar_bytes(LAYERS[0]), "gzip")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A turboOCI image of two layers, v1."""
    make_layout(tmp_path / "source", LAYERS)
    options = ConvertOptions(layer=LayerOptions(virtual_size=1 << 30), turbo=("ext4", "erofs"), work_dir=tmp_path)
    convert(f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}:v1", options)
    return tmp_path / "out"


def inspected(capsys: pytest.CaptureFixture[str], layout: Path, *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["image", "inspect", "--json", f"oci:{layout}:v1", *options])
    return status, json.loads(capsys.readouterr().out)


def test_sound_targets(layout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = inspected(capsys, layout)
    (image,) = answer["images"]
    first = image["layers"][0]
    assert status == 0
    assert (first["target"], first["target_size"], first["target_fault"]) == (digest_of(STORED), len(STORED), "")
    assert first["compression"] == "gzip"
    status, answer = inspected(capsys, layout, "--verify")
    assert status == 0
    assert answer["images"][0]["verified"] == (
        "verified: every layer and target was read whole and matches its digest"
    )
    assert main(["image", "inspect", f"oci:{layout}:v1"]) == 0
    assert f"files in {digest_of(STORED)}  " in capsys.readouterr().out


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


# What becomes of the first layer's target (None: it goes), whether it shows without --verify, and what is said.
WRONG: dict[str, tuple[Callable[[bytes], bytes | None], bool, str]] = {
    "missing": (lambda _: None, True, r"target of a turboOCI layer is not there"),
    "cut": (
        lambda data: data[:-50],
        False,
        rf"another size than its blob says \(got {len(STORED) - 50}, wanted {len(STORED)}\)",
    ),
    "longer": (lambda data: data + b"x", False, rf"another size than its blob says \(got {len(STORED) + 1}, wanted"),
    "a byte changed": (flipped, False, rf"wrong content \(got sha256:[0-9a-f]{{64}}, wanted {digest_of(STORED)}\)"),
    "empty": (lambda _: b"", False, r"another size than its blob says \(got 0, wanted"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_targets(layout: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    harm, shows, text = WRONG[name]
    path = layout / "blobs" / "sha256" / digest_of(STORED)[7:]
    data = harm(STORED)
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    status, answer = inspected(capsys, layout)
    assert (status == 1) is shows
    assert answer["images"][0]["verified"].startswith("not sound" if shows else "sums: ")
    status, answer = inspected(capsys, layout, "--verify")
    (error,) = answer["errors"]
    assert status == 1
    assert re.match(
        rf"oci:{layout}:v1: the files of layer 0 cannot be read: .*{digest_of(STORED)[7:]}.*{text}", error
    )
    (image,) = answer["images"]
    assert [bool(layer["target_fault"]) for layer in image["layers"]] == [True, False]
    assert image["verified"] == "not sound: the files of a layer cannot be read"
    assert "verified" not in answer
    # Commands that read the image say the same in one line.
    assert main(["image", "cat", f"oci:{layout}:v1:/d/a"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "target" in line or digest_of(STORED)[7:] in line


def test_a_blob_that_fits_another_target(layout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Name, size and digest agree, so that only reading by the index and the sums tells.
    from obdlab.convert.endpoints.layout import ImageLayout
    from obdlab.convert.turbo.archive import write_turbo_blob
    from tests.convert.turbo.test_image import unpacked

    stored = ImageLayout(layout)
    (entry,) = stored.select("v1")
    document = json.loads(stored.read_blob(entry, 1 << 20))
    layer = oci.Manifest.parse(json.dumps(document).encode()).layers[0]
    names = unpacked(layer, stored, layout.parent / "files")
    other = gzip.compress(tar_bytes([LAYERS[0][0], member("d/a", bytes(600_000))]), 9, mtime=0)
    stored.add_bytes(digest_of(other), other)
    (layout.parent / "files" / ".turbo.target").write_text(f"{digest_of(other)},{len(other)}\n")
    blob = write_turbo_blob(layout.parent / "blob", {name: layout.parent / "files" / name for name in names})
    stored.add_bytes(blob.digest, (layout.parent / "blob").read_bytes())
    document["layers"][0] |= {"digest": blob.digest, "size": blob.size}
    document["layers"][0]["annotations"] |= {
        oci.BLOB_DIGEST: blob.digest,
        oci.BLOB_SIZE: str(blob.size),
        oci.TURBO_TARGET_DIGEST: digest_of(other),
    }
    data = json.dumps(document).encode()
    stored.add_bytes(oci.digest_of(data), data)
    stored.set_tag("v1", oci.Descriptor(oci.OCI_MANIFEST, oci.digest_of(data), len(data)))
    status, answer = inspected(capsys, layout, "--verify")
    assert status == 1
    assert "is the index of another gzip file" in answer["errors"][0]
