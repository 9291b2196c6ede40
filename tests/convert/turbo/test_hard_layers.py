"""Layers that defeat the original: each works, or is refused with the reason and the way out."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.convert.compare.listing import differences, list_volume
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.formats import oci
from obdlab.formats.gzipindex import HEADER_SIZE, IndexHeader
from tests.convert.layouts import CONFIG, MANIFEST, Layout, digest_of
from tests.convert.turbo.hard_layers import GZIP, KINDS, Hard, as_the_original_reads, content_tar, gnu_sparse, joined
from tests.convert.turbo.test_builder import listing_of
from tests.convert.turbo.test_image import stored_volume, unpacked
from tests.layers.gzip_samples import index_of

TAR = content_tar()


def image_of(root: Path, tar: bytes, stored: bytes, media_type: str) -> Layout:
    """A layout of an image of one layer."""
    layout = Layout(root)
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest_of(tar)]}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": layout.add_json(config, CONFIG),
        "layers": [layout.add_blob(stored, media_type)],
    }
    platform = {"os": "linux", "architecture": "amd64"}
    layout.write_index([layout.add_json(manifest, MANIFEST, platform=platform)])
    return layout


def convert(source: Layout, out: Path, *options: str) -> int:
    names = [str(source.root), f"oci:{out}:v1", "--work-dir", str(out.parent), "--vsize-gib", "1"]
    return main(
        ["image", "convert", "-q", "--as", "turbo-oci", "--fs", "both", "--database", "none", *names, *options]
    )


def turbo_files(out: Path, directory: Path) -> dict[str, bytes]:
    """The files in the blob of the image's only layer."""
    layout = ImageLayout(out)
    (entry,) = layout.select("v1")
    (layer,) = oci.Manifest.parse(layout.read_blob(entry, 1 << 20)).layers
    return {name: (directory / name).read_bytes() for name in unpacked(layer, layout, directory)}


def is_complete(out: Path, tars: list[bytes]) -> bool:
    with stored_volume(f"oci:{out}:v1") as volume:
        return differences(list_volume(volume), listing_of(tars)) == []


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_works_or_is_refused_with_the_way_out(
    kind: Hard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = kind.make(TAR)
    source, out = image_of(tmp_path / "source", TAR, stored, kind.media_type), tmp_path / "out"
    if kind.option:
        assert convert(source, out) == 1
        error = capsys.readouterr().err
        for wanted in (
            digest_of(stored),
            kind.reason,
            "convert the image as a whole, without --as turbo-oci",
            kind.option,
        ):
            assert wanted in error
        assert len(error.splitlines()) == 1
        assert not out.exists(), "nothing is published"
        # The way out that it names.
        assert main(["image", "convert", "-q", "--database", "none", str(source.root), f"oci:{out}:v1"]) == 0
        assert is_complete(out, [TAR])
        out = tmp_path / "allowed"
    assert convert(source, out, *filter(None, [kind.option])) == 0
    assert is_complete(out, [TAR])
    files = turbo_files(out, tmp_path / "files")
    if kind.option:
        # The original opens nothing of it: neither metadata by its name, nor an index of its version.
        assert "gzip.meta" not in files or files["gzip.meta"][8] == 2
        assert "gzip.meta" in files or not [name for name in files if name.endswith(".fs.meta")]
    else:
        assert as_the_original_reads(stored, files["gzip.meta"]) == TAR
    assert main(["image", "inspect", "--verify", f"oci:{out}:v1"]) == 0


@pytest.mark.parametrize("pack", [lzma.compress, bz2.compress, lambda tar: gzip.compress(tar)[:-9]])
def test_what_no_conversion_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pack: Callable[[bytes], bytes]
) -> None:
    stored = pack(TAR)
    source = image_of(tmp_path / "source", TAR, stored, GZIP)
    assert convert(source, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert digest_of(stored) in error
    assert "as a whole" not in error
    assert re.search("pack it again as tar.gzip .got (xz|bzip2)|gzip file ends early", error)
    assert not (tmp_path / "out").exists()


def test_what_the_original_makes_of_several_members_reads_as_zeros() -> None:
    # Else the tests above prove nothing: it indexes the first member alone, and its readers see no more.
    stored = joined(TAR)
    first = zlib.decompressobj(wbits=31)
    first.decompress(stored)
    index, content = index_of(stored[: len(stored) - len(first.unused_data)])
    header = IndexHeader.from_bytes(index, index_size=len(index))
    changed = IndexHeader(1, header.entries, len(stored), header.uncompressed_size, len(index), header.index_start)
    seen = as_the_original_reads(stored, changed.to_bytes() + index[HEADER_SIZE:])
    assert seen == content == TAR[: len(content)]
    assert len(content) < len(TAR)
    with pytest.raises(ValueError, match="refuses"):
        as_the_original_reads(stored, index_of(stored, several=True)[0])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
    ids=" ".join,
)
def test_sparse_files_of_gnu_tar(tmp_path: Path, options: list[str], compressed: bool) -> None:
    tar = gnu_sparse(tmp_path / "tree", *options)
    with tarfile.open(fileobj=io.BytesIO(tar)) as read:
        assert any(info.issparse() for info in read.getmembers())
    stored = gzip.compress(tar, mtime=0) if compressed else tar
    source = image_of(tmp_path / "source", tar, stored, GZIP if compressed else GZIP.removesuffix("+gzip"))
    assert convert(source, tmp_path / "out") == 0
    with stored_volume(f"oci:{tmp_path / 'out'}:v1") as volume:
        found = list_volume(volume)
        assert differences(found, listing_of([tar])) == []
        for name in ("holes", "empty", "usual"):
            # Not by what obdlab reads of the tar.
            assert found[name].sha256 == hashlib.sha256((tmp_path / "tree" / name).read_bytes()).hexdigest()
