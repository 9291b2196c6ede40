"""Images in archives and in containerd, and what converting them makes: the same as from a layout."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.containerd.client import Containerd
from obdlab.convert.endpoints import archive as archive_module
from obdlab.convert.endpoints.archive import Archive, ArchivedLayout, DockerArchiveSource
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.endpoints.names import check_apart, open_destination, open_source
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from tests.convert.converting import convert
from tests.convert.layouts import Layout, compress, digest_of, make_layout, member, tar_bytes
from tests.convert.torture import END, gnu_long, pax_header, pax_record, pax_sparse, raw_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.convert.oracle import Containerd as OwnContainerd

LAYERS = [[member("a", b"1" * 50_000), member("b", b"2")], [member(".wh.b"), member("c", b"3")]]
AMD64 = oci.Platform("linux", "amd64")


def small(work_dir: Path) -> ConvertOptions:
    """A small disk has less to be written."""
    return ConvertOptions(layer=LayerOptions(virtual_size=1 << 30), work_dir=work_dir)


def archive(path: Path, files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def docker_archive(path: Path, *, how: str = "plain", tags: tuple[str, ...] = ("app:1",)) -> Path:
    """What docker save writes, with one link in place of a layer, as it had them for layers that were there twice."""
    tars = [tar_bytes(members) for members in LAYERS]
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [*map(digest_of, tars), digest_of(tars[0])]},
        }
    ).encode()
    name = f"{digest_of(config).removeprefix('sha256:')}.json"
    layers = [f"{number}/layer.tar" for number in range(3)]
    manifest = [{"Config": name, "RepoTags": list(tags), "Layers": layers}]
    files = {f"{number}/layer.tar": compress(tar, how) for number, tar in enumerate(tars)}
    files |= {name: config, "manifest.json": json.dumps(manifest).encode()}
    return archive(path, files, {"2/layer.tar": "../0/layer.tar"})


def layout_of_the_same(root: Path) -> Path:
    return make_layout(root, [*LAYERS, LAYERS[0]], how="plain").root


@pytest.mark.parametrize("how", ["plain", "gzip"])
def test_docker_archives(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = docker_archive(tmp_path / "saved.tar", how=how)
    if how == "gzip":  # as docker save | gzip makes it
        path.write_bytes(gzip.compress(path.read_bytes()))
    wanted = f"oci:{layout_of_the_same(tmp_path / 'layout')}"
    for name in (
        f"docker-archive:{path}",
        f"docker-archive:{path}:app:1",
        f"docker-archive:{path}:docker.io/library/app:1",
    ):
        image = convert(name, f"oci:{tmp_path / 'out'}", small(tmp_path))
        assert len(image.layers) == 3
    assert main(["image", "verify", wanted, f"docker-archive:{path}"]) == 0
    assert main(["image", "verify", f"docker-archive:{path}", f"oci:{tmp_path / 'out'}"]) == 0
    capsys.readouterr()


def test_an_archive_converts_to_what_its_layout_does(tmp_path: Path) -> None:
    root = layout_of_the_same(tmp_path / "layout")
    packed = tmp_path / "layout.tar"
    with tarfile.open(packed, "w") as tar:
        tar.add(root, ".")
    options = small(tmp_path)
    wanted = convert(f"oci:{root}", f"oci:{tmp_path / 'out'}", options).digest
    for number, name in enumerate((f"oci-archive:{packed}", f"oci-archive:{packed}:latest")):
        target = tmp_path / f"out{number}.tar"
        assert convert(name, f"oci-archive:{target}:v1", options).digest == wanted
        layout = ArchivedLayout(target)
        (entry,) = layout.select("v1")
        assert entry.digest == wanted
        layout.close()
    # The same bytes whoever packs it when.
    assert (tmp_path / "out0.tar").read_bytes() == (tmp_path / "out1.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layout", "layout.tar", "out", "out0.tar", "out1.tar"]
    assert main(["image", "verify", "-q", f"oci-archive:{packed}", f"oci-archive:{target}"]) == 0


def test_an_archive_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "source", LAYERS)
    (tmp_path / "out.tar").write_bytes(b"before")
    for blob in (layout.root / "blobs" / "sha256").iterdir():
        content = blob.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            blob.write_bytes(content[:-1] + b"?")
    with pytest.raises((CorruptBlobError, FormatError)):
        convert(f"oci:{layout.root}", f"oci-archive:{tmp_path / 'out.tar'}", small(tmp_path))
    assert (tmp_path / "out.tar").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tar", "source"]


@pytest.mark.parametrize(
    ("files", "links", "message"),
    [
        ({}, {}, "no such file.*manifest.json"),
        ({"manifest.json": b"{"}, {}, "not JSON"),
        ({"manifest.json": b"{}"}, {}, "wrong JSON type.*an array"),
        ({"manifest.json": b"[" * 100_000}, {}, "not JSON"),
        ({"manifest.json": b"[]"}, {}, "names no single image"),
        ({"manifest.json": b'[{"Config": "c", "RepoTags": [["a"]]}]'}, {}, "wrong JSON type.*a name"),
        ({"manifest.json": b'[{"Config": "c", "RepoTags": {"a": 1}}]'}, {}, "wrong JSON type.*an array"),
        ({"manifest.json": b'[{"Config": 7}]'}, {}, "wrong JSON type.*a name"),
        ({"manifest.json": b'[{"Config": "c", "Layers": []}]'}, {"c": "/etc/passwd"}, "no such file.*etc/passwd"),
        ({"manifest.json": b'[{"Config": "c", "Layers": []}]'}, {"c": "c"}, "no plain file"),
        ({"manifest.json": b'[{"Config": "../../c", "Layers": []}]', "c": b"{}"}, {}, "rootfs"),
    ],
)
def test_archives_that_make_no_sense(
    tmp_path: Path, files: dict[str, bytes], links: dict[str, str], message: str
) -> None:
    path = archive(tmp_path / "x.tar", files, links)
    with pytest.raises(FormatError, match=message):
        DockerArchiveSource(path, None)


@pytest.mark.parametrize("prefix", ["oci:", "oci-archive:"])
def test_a_source_that_cannot_be_read_leaves_nothing_at_the_destination(prefix: str, tmp_path: Path) -> None:
    broken = ImageLayout.create(tmp_path / "broken")
    missing = {"mediaType": oci.OCI_MANIFEST, "digest": f"sha256:{'0' * 64}", "size": 2}
    (broken.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [missing]}))
    out = tmp_path / "a" / "out"
    if prefix == "oci-archive:":
        out.parent.mkdir()
    for source in (f"oci:{broken.root}", f"oci:{tmp_path / 'none'}", "127.0.0.1:1/none:x"):
        assert main(["image", "convert", "--plain-http", "127.0.0.1:1", source, f"{prefix}{out}"]) == 1
        assert not out.exists()
        assert list(tmp_path.glob("a/*")) == []


def test_a_place_where_no_layout_can_be_made_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with closing(RegistryClient()) as client:
        for place, message in (
            ("full", "directory is neither empty nor an OCI layout"),
            ("file", "cannot make an OCI layout: Not a directory"),
            ("file/out", "cannot make an OCI layout: Not a directory"),
        ):
            with pytest.raises(SourceError, match=message):
                open_destination(f"oci:{tmp_path / place}", client)


def test_archives_that_are_damaged(tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "saved.tar")
    content = bytearray(path.read_bytes())
    at = content.find(b"1" * 1000)
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptBlobError, match="wrong content"):
        convert(f"docker-archive:{path}", f"oci:{tmp_path / 'out'}", small(tmp_path))
    path.write_bytes(content[:700])
    with pytest.raises((FormatError, CorruptBlobError, SourceError)):
        convert(f"docker-archive:{path}", f"oci:{tmp_path / 'out'}", small(tmp_path))
    path.write_bytes(b"no tar" * 1000)
    with pytest.raises(FormatError, match="not a tar archive"):
        DockerArchiveSource(path, None)


def test_archives_whose_headers_have_no_end(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for content in (
        b"".join(gnu_long(b"L", b"name") for _ in range(5000)),
        raw_header(b"header", 1 << 30, b"x"),
        raw_header(b"header", 1 << 30, b"L"),
    ):
        with path.open("wb") as file:
            file.write(content)
            file.truncate((1 << 31) + len(content))
        tracemalloc.start()
        with pytest.raises(FormatError, match="not a tar archive"):
            DockerArchiveSource(path, None)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        tracemalloc.stop()


def test_members_of_one_name_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_MAX_MEMBERS", 10)
    path = tmp_path / "x.tar"
    path.write_bytes(raw_header(b"again", 0) * 10 + END)
    with closing(Archive(path)) as read:
        assert read.read("again", 1) == b""
    path.write_bytes(raw_header(b"again", 0) * 11 + END)
    with pytest.raises(FormatError, match="too many members"):
        Archive(path)


def test_headers_of_all_members_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_MAX_HEADERS", 1 << 20)
    path = tmp_path / "x.tar"
    header = pax_header(pax_record("comment", "c" * 5000)) + raw_header(b"again", 0)
    path.write_bytes(header * 100 + END)
    with closing(Archive(path)) as read:
        assert "again" in read
    path.write_bytes(header * 200 + END)
    with pytest.raises(FormatError, match="headers are longer than 1048576 bytes"):
        Archive(path)
    # A map that is stored as content counts as a header, too.
    path.write_bytes(pax_sparse("1.0", "s", [(10**59, b"")] * 150_000, 1 << 20) + END)
    monkeypatch.setattr(archive_module, "_MAX_HEADERS", 256 << 20)
    with pytest.raises(FormatError, match="headers of one member are longer"):
        Archive(path)


def test_headers_of_members_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    records = b"".join(pax_record(f"comment.{number}", "c") for number in range(1000))
    members = b"".join(pax_header(records) + raw_header(b"%d" % number, 0) for number in range(40))
    path.write_bytes(pax_header(records, b"g") + members + raw_header(b"last", 0) + END)
    tracemalloc.start()
    try:
        with closing(Archive(path)) as read:
            assert "last" in read
            assert tracemalloc.get_traced_memory()[1] < 600 << 10
    finally:
        tracemalloc.stop()


def test_an_empty_extended_header_says_nothing(tmp_path: Path) -> None:
    packed = tmp_path / "x.tar"
    with tarfile.open(packed, "w") as tar:
        empty = tarfile.TarInfo("PaxHeader")
        empty.type = tarfile.XHDTYPE
        tar.addfile(empty)
        content = tarfile.TarInfo("oci-layout")
        content.size = 4
        tar.addfile(content, io.BytesIO(b"here"))
    with closing(Archive(packed)) as read:
        assert read.read("oci-layout", 10) == b"here"


@pytest.mark.parametrize("place", ["index.json", "blob", "archive"])
def test_a_pipe_instead_of_a_file_is_not_waited_for(tmp_path: Path, place: str) -> None:
    layout = make_layout(tmp_path / "source", LAYERS)
    source = f"oci:{layout.root}"
    if place == "archive":
        path = tmp_path / "x.tar"
        source = f"docker-archive:{path}"
    else:
        blobs = sorted((layout.root / "blobs" / "sha256").iterdir())
        path = layout.root / place if place != "blob" else next(p for p in blobs if p.read_bytes()[:2] == b"\x1f\x8b")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    command = [sys.executable, "-m", "obdlab", "image", "convert", source, f"oci:{tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "not a regular file" in done.stderr


def test_images_of_an_archive_by_name(tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "a:b.tar", tags=("one:1", "registry.example/two:2"))
    with closing(RegistryClient()) as client:
        for name in ("one:1", "registry.example/two:2"):
            with closing(open_source(f"docker-archive:{path}:{name}", client)) as source:
                assert len(source.manifest(AMD64).layers) == 3
        with pytest.raises(FormatError, match=r"no such image.*got one:1, registry.example/two:2, wanted two:2"):
            open_source(f"docker-archive:{path}:two:2", client)
        with pytest.raises(FormatError, match="cannot hold"):
            open_destination("docker-archive:x.tar", client)
        with pytest.raises(SourceError, match="No such file"):
            open_source("oci-archive:/no/such/file", client)


def test_an_archive_is_not_its_own_source(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="would replace its source"):
        check_apart(
            f"docker-archive:{docker_archive(tmp_path / 'x.tar')}:app:1", f"oci-archive:{tmp_path / 'x.tar'}:y"
        )


@pytest.mark.containerd
def test_from_containerd_to_containerd(containerd: OwnContainerd, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "layout", LAYERS)
    with tarfile.open(tmp_path / "layout.tar", "w") as tar:
        tar.add(layout.root, ".")
    plain, converted = "test.invalid/convert:plain", "test.invalid/convert:obd"
    containerd.ctr("images", "import", "--index-name", plain, "--local", "--no-unpack", str(tmp_path / "layout.tar"))
    address = str(containerd.socket)
    with closing(Containerd(address)) as client:  # those of other tests, which share it
        before = set(client.leases.list())
    arguments = ["--containerd", address, "--database", str(tmp_path / "db"), "--vsize-gib", "1"]
    arguments += ["--work-dir", str(tmp_path)]
    names = [f"containerd:default:{plain}", f"containerd:default:{converted}"]
    assert main(["image", "convert", "-q", *arguments, *names]) == 0
    assert main(["image", "verify", "-q", "--containerd", address, *names]) == 0
    digest = convert(f"oci:{layout.root}", f"oci:{tmp_path / 'out'}", small(tmp_path)).digest
    with closing(Containerd(address)) as client:
        assert client.images.get(converted).digest == digest
        assert set(client.leases.list()) <= before
        # All that the image names is labelled, so that the collector keeps it.
        labels = client.content.info(digest).labels
        assert sorted(labels) == [f"containerd.io/gc.ref.content.{part}" for part in ("config", "l.0", "l.1")]
    # Again: there already.
    assert main(["image", "convert", "-q", *arguments, *names]) == 0
    # A layer of it is the base of another image.
    more = make_layout(tmp_path / "more", [*LAYERS, [member("d", b"4")]])
    assert (
        main(["image", "convert", "-q", *arguments, f"oci:{more.root}", f"containerd:default:{converted}-more"]) == 0
    )
    assert (
        main(
            [
                "image",
                "verify",
                "-q",
                "--containerd",
                address,
                f"oci:{more.root}",
                f"containerd:default:{converted}-more",
            ]
        )
        == 0
    )
    containerd.ctr("images", "rm", plain, converted, f"{converted}-more")


@pytest.mark.containerd
def test_errors_of_containerd(containerd: OwnContainerd, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "image",
        "convert",
        "--containerd",
        str(containerd.socket),
        "containerd:default:none",
        f"oci:{tmp_path / 'out'}",
    ]
    assert main(arguments) == 1
    assert "containerd has no such image" in capsys.readouterr().err
    assert (
        main(
            [
                "image",
                "convert",
                "--containerd",
                str(tmp_path / "none"),
                "containerd:default:x",
                f"oci:{tmp_path / 'out'}",
            ]
        )
        == 1
    )
    assert str(tmp_path / "none") in capsys.readouterr().err


# Options


def test_flatten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = [[member(f"l{n}", b"%d" % n * 9000), member("big", bytes([n]) * 300_000)] for n in range(5)]
    layers[3].append(member(".wh.l1"))
    make_layout(tmp_path / "source", layers)
    source = f"oci:{tmp_path / 'source'}"
    whole = convert(source, f"oci:{tmp_path / 'out'}:whole", small(tmp_path))
    for filesystem in ("ext4", "erofs"):
        for most in (1, 3) if filesystem == "ext4" else (2,):
            out = f"oci:{tmp_path / 'out'}:{filesystem}{most}"
            options = ["--fs", filesystem, "--flatten", str(most), "--vsize-gib", "1", "--work-dir", str(tmp_path)]
            assert main(["image", "convert", "-q", *options, source, out]) == 0
            assert main(["image", "verify", "-q", "--work-dir", str(tmp_path), source, out]) == 0
            layout = ImageLayout(tmp_path / "out")
            (entry,) = layout.select(f"{filesystem}{most}")
            manifest = oci.Manifest.parse(layout.read_blob(entry, 1 << 20))
            config = oci.Config.parse(layout.read_blob(manifest.config, 1 << 20))
            assert len(manifest.layers) == len(config.diff_ids) == min(most, 5)
            history = config.document["history"]
            assert [step["created_by"] for step in history] == [f"layer {n}" for n in range(5)]
            assert sum(not step.get("empty_layer") for step in history) == min(most, 5)
            if filesystem == "ext4" and most >= 3:  # the lowest are those of the image that was not flattened
                assert manifest.layers[:2] == whole.manifest.layers[:2]
    capsys.readouterr()


def test_what_a_flattened_layer_no_longer_shows_is_not_in_it(tmp_path: Path) -> None:
    layers = [[member("big", bytes([n + 1]) * 3_000_000)] for n in range(4)]
    make_layout(tmp_path / "source", layers)
    image = convert(f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}", replace(small(tmp_path), flatten=1))
    (layer,) = image.layers
    assert layer.merged == 4
    make_layout(tmp_path / "last", layers[-1:])
    alone = convert(f"oci:{tmp_path / 'last'}", f"oci:{tmp_path / 'out'}:last", small(tmp_path))
    assert layer.built.data_size < alone.layers[0].built.data_size + (64 << 10)


def test_options_of_the_file_system(tmp_path: Path) -> None:
    make_layout(tmp_path / "source", LAYERS)
    out = tmp_path / "out"
    options = ["--mount-options", "noatime,nodiratime", "--bytes-per-inode", "65536", "--vsize-gib", "1"]
    places = [f"oci:{tmp_path / 'source'}", f"oci:{out}"]
    assert main(["image", "convert", "-q", *options, "--work-dir", str(tmp_path), *places]) == 0
    layout = ImageLayout(out)
    (entry,) = layout.select(None)
    manifest = oci.Manifest.parse(layout.read_blob(entry, 1 << 20))
    assert {layer.annotations[oci.BLOB_FS_TYPE] for layer in manifest.layers} == {"ext4;noatime,nodiratime"}
    from obdlab.image.open import open_stack
    from obdlab.volumes.ext4.volume import Volume

    with open_stack([layout.blob_path(layer.digest) for layer in manifest.layers]) as disk:
        assert disk.size == 1 << 30
        assert Volume(disk).superblock.inodes == (1 << 30) // 65536


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flatten", "0"], "wanted a number of layers from 1 to 255"),
        (["--bytes-per-inode", "12"], "wanted a number of bytes from"),
        (["--mount-options", "a;b"], "separated by commas"),
        (["--docker", "--referrer"], "--referrer needs"),
    ],
)
def test_options_that_make_no_sense(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["image", "convert", *options, "x:1", f"oci:{tmp_path / 'out'}"])
    except SystemExit as end:
        status = int(str(end.code))
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_attestations_and_docker_types_from_an_index_in_an_archive(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    image = layout.add_image([tar_bytes(LAYERS[0])])
    attestation = {**image, "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}
    index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [image, attestation]}
    layout.write_index([layout.add_json(index, oci.OCI_INDEX)])
    with tarfile.open(tmp_path / "layout.tar", "w") as tar:
        tar.add(layout.root, ".")
    places = [f"oci-archive:{tmp_path / 'layout.tar'}", f"oci-archive:{tmp_path / 'out.tar'}"]
    options = ["--platform", "all", "--docker", "--work-dir", str(tmp_path)]
    assert main(["image", "convert", "-q", *options, *places]) == 0
    out = ArchivedLayout(tmp_path / "out.tar")
    (entry,) = out.select("latest")
    assert entry.media_type == oci.DOCKER_INDEX
    assert len(oci.Index.parse(out.read_blob(entry, 1 << 20)).manifests) == 1
    out.close()
    assert main(["image", "verify", "-q", "--platform", "all", *places]) == 0
