"""Images compared without mounting them: the converted with its original, and what differs is told."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.convert.compare.listing import TreeEntry, differences, without_lost_and_found
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.image import ConvertOptions
from obdlab.formats import oci
from tests.convert.converting import convert
from tests.convert.goldens import GOLDEN
from tests.convert.images import whole_image
from tests.convert.layouts import Layout, hardlink, make_layout, member, symlink

if TYPE_CHECKING:
    from pathlib import Path


def test_a_converted_image_is_its_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_layout(tmp_path / "source", whole_image(), how=["gzip", "zstd", "plain", "gzip"])
    convert(str(tmp_path / "source"), f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=tmp_path))
    arguments = ["--work-dir", str(tmp_path), f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}"]
    assert main(["image", "compare", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith(" paths, no differences\n")
    assert not list(tmp_path.glob("obdlab-*"))


def test_each_difference_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = [member("a", b"1"), member("b", b"2"), symlink("l", "x"), member("only", b"")]
    two = [member("a", b"2"), hardlink("b", "a"), symlink("l", "y"), member("ö\udcff", b"")]
    make_layout(tmp_path / "one", [one])
    make_layout(tmp_path / "two", [two])
    convert(str(tmp_path / "two"), f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=tmp_path))
    assert main(["image", "compare", "-q", f"oci:{tmp_path / 'one'}", f"oci:{tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().out == ""
    assert main(["image", "compare", f"oci:{tmp_path / 'one'}", f"oci:{tmp_path / 'out'}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["only: missing", "ö\\udcff: not wanted"]
    assert [line.split(" differs")[0] for line in lines[2:]] == [
        "a: sha256", "a: linked_to", "b: linked_to", "l: target",
    ]  # fmt: skip
    assert main(["image", "compare", "--limit", "1", f"oci:{tmp_path / 'one'}", f"oci:{tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().out == "only: missing\n... and 5 more\n"


def original_image(root: Path) -> str:
    """The image of the layers that the original converted, in a layout."""
    layout = ImageLayout.create(root)
    layers = []
    for number in (1, 2):
        data = (GOLDEN / f"layer{number}.obd").read_bytes()
        layers.append(stored(layout, oci.OCI_LAYER, data, {oci.BLOB_DIGEST: oci.digest_of(data)}))
    document = json.loads((GOLDEN.parent / "image" / "config.json").read_bytes())
    document["rootfs"]["diff_ids"] = [layer.digest for layer in layers]
    config = stored(layout, oci.OCI_CONFIG, oci.to_json(document), {})
    manifest = oci.Manifest(config=config, layers=tuple(layers), media_type=oci.OCI_MANIFEST, annotations={})
    layout.set_tag("latest", stored(layout, oci.OCI_MANIFEST, manifest.to_bytes(), {}))
    return f"oci:{root}"


def stored(layout: ImageLayout, media_type: str, data: bytes, annotations: dict[str, str]) -> oci.Descriptor:
    digest = oci.digest_of(data)
    layout.add_bytes(digest, data)
    return oci.Descriptor(media_type, digest, len(data), annotations=annotations)


def test_an_image_that_the_original_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Layout(tmp_path / "source")
    source.write_index([source.add_image([(GOLDEN / f"layer{number}.tar").read_bytes() for number in (1, 2)])])
    converted = original_image(tmp_path / "out")
    # The original sets trusted.* as well, which containerd leaves out.
    options = ["--work-dir", str(tmp_path), "--ignore", "xattrs"]
    main(["image", "verify", f"oci:{source.root}", converted, *options])
    # What remains is true: the original shortens the text of a link.
    assert capsys.readouterr().out == "usr/odd1: target differs (got '../lib/y', wanted '../lib//./y/')\n"
    # On the side that is right, lost+found counts.
    assert main(["image", "verify", converted, f"oci:{source.root}", *options]) == 1
    assert capsys.readouterr().out.splitlines()[0] == "lost+found: missing"


MADE = TreeEntry(0o40700, 0, 0, 0, 0, None, "", "", (), "")


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        ({"lost+found": replace(MADE, mode=0o40755)}, {}),
        ({"lost+found": replace(MADE, mode=0o100700)}, {}),
        ({"lost+found": replace(MADE, uid=1)}, {}),
        ({"lost+found": replace(MADE, gid=1)}, {}),
        ({"lost+found": replace(MADE, xattrs=(("user.a", b""),))}, {}),
        ({"lost+found": MADE, "lost+found/a": MADE}, {}),
        ({"lost+found": MADE}, {"lost+found": replace(MADE, mtime_ns=1)}),
        ({"a": MADE, "a/lost+found": MADE}, {"a": MADE}),
        ({}, {"lost+found": MADE}),
    ],
)
def test_another_lost_and_found_is_a_difference(got: dict[str, TreeEntry], wanted: dict[str, TreeEntry]) -> None:
    assert differences(without_lost_and_found(got, wanted), wanted) != []
    assert without_lost_and_found({"lost+found": MADE}, {}) == {}


def test_an_image_compared_with_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_layout(tmp_path / "source", [[member("a", b"1")]])
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_bytes(b"1")
    arguments = [f"oci:{tmp_path / 'source'}", f"dir:{tmp_path / 'tree'}", "--ignore", "mtime_ns"]
    owners = ["--ignore", "uid", "--ignore", "gid"]
    assert main(["image", "compare", *arguments, *owners]) == 0
    (tmp_path / "tree" / "a").write_bytes(b"2")
    assert main(["image", "compare", *arguments, *owners]) == 1
    assert main(["image", "compare", *arguments, *owners, "--no-content"]) == 0
    capsys.readouterr()
    assert main(["image", "compare", str(tmp_path / "source"), f"dir:{tmp_path / 'none'}"]) == 1
    assert "cannot list the tree" in capsys.readouterr().err
