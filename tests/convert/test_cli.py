from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import obdlab
from obdlab.cli.image.convertoptions import add_conversion_options, platforms_at_once
from obdlab.cli.imageoptions import add_image_options, image_client
from obdlab.cli.main import main
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.endpoints.names import check_apart
from obdlab.formats import oci
from obdlab.layerfiles.description import describe
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import Repository
from obdlab.volumes.ext4.volume import Volume
from tests.convert.layouts import make_layout, member
from tests.registry.https import Authority, tls_registry

if TYPE_CHECKING:
    from pathlib import Path

    from tests.registry.faulty import FaultyRegistry


def test_prints_table_and_digest(work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = make_layout(tmp_path / "source", [[member("a", b"1" * 100_000)], [member("b", b"2")]])
    options = ["--algorithm", "zstd", "--block-size-kib", "16", "--vsize-gib", "1", "--work-dir", str(work_dir)]
    assert main(["image", "convert", str(layout.root), f"oci:{tmp_path / 'out'}:v1", *options]) == 0
    printed = capsys.readouterr()
    (entry,) = ImageLayout(tmp_path / "out").select("v1")
    assert printed.out == f"{entry.digest}\n"
    table = printed.err.splitlines()
    assert table[-5].split()[:2] == ["layer", "source"]
    assert table[-1] == f"stored as oci:{tmp_path / 'out'}:v1"


def test_layers_that_do_not_fit_into_64_kib_blocks_get_smaller_ones(work_dir: Path, tmp_path: Path) -> None:
    noise = [os.urandom(300_000), os.urandom(6 << 20)]  # the second is compressed in another process
    layers = [[member("text", b"1" * 100_000)], *([member(f"{len(each)}", each)] for each in noise)]
    source = f"oci:{make_layout(tmp_path / 'source', layers).root}"
    command = [
        sys.executable,
        "-m",
        "obdlab",
        "image",
        "convert",
        "--block-size-kib",
        "64",
        "--work-dir",
        str(work_dir),
    ]
    command += ["--database", "none", source, f"oci:{tmp_path / 'out'}:v1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"(layer \d+): content does not compress in blocks of 64 KiB", done.stderr)
    assert sorted(said) == ["layer 001", "layer 002"]
    layout = ImageLayout(tmp_path / "out")
    (entry,) = layout.select("v1")
    manifest = oci.Manifest.parse(layout.read_blob(entry, 1 << 20))
    paths = [layout.blob_path(layer.digest) for layer in manifest.layers]
    sizes = [facts.block_size for path in paths if (facts := describe(path).zfile) is not None]
    assert [size >> 10 for size in sizes] == [64, 32, 32]
    with obdlab.open_stack(paths) as disk:
        volume = Volume(disk)
        for content in noise:
            found = volume.inode(volume.lookup(b"%d" % len(content)) or 0)
            assert b"".join(volume.content(found)) == content


def test_json(work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = make_layout(tmp_path / "source", [[member("a", b"1" * 100_000)], [member("b", b"2")]])
    out = f"oci:{tmp_path / 'out'}:v1"
    options = ["--json", "--vsize-gib", "1", "--work-dir", str(work_dir), "--database", "none"]
    assert main(["image", "convert", str(layout.root), out, *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    document = json.loads(printed.out)
    (entry,) = ImageLayout(tmp_path / "out").select("v1")
    assert (document["name"], document["digest"]) == (out, entry.digest)
    (image,) = document["images"]
    assert (image["digest"], image["platform"]["os"]) == (entry.digest, "linux")
    for layer in image["layers"]:
        path = ImageLayout(tmp_path / "out").blob_path(layer["digest"])
        assert path.stat().st_size == layer["size"]
        assert (layer["stored"], layer["reused"], layer["source_layers"]) == (True, "", 1)
    assert image["size"] == sum(layer["size"] for layer in image["layers"])


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_layout(tmp_path / "source", [[member("a")]])
    assert main(["image", "convert", f"oci:{tmp_path / 'source'}:other", f"oci:{tmp_path / 'out'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("obdlab image convert: ")
    assert line.endswith("OCI layout has no such tag (got latest, wanted other)")


def failure(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["image", "convert", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_source_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = make_layout(tmp_path / "layout", [[member("a")]])
    before = (layout.root / "index.json").read_bytes()
    digest = "sha256:" + 64 * "0"
    for source, destination in (
        (str(layout.root), str(layout.root)),
        (f"oci:{layout.root}", f"oci:{layout.root}:latest"),
        (f"oci:{layout.root}:latest", f"oci:{layout.root}/../layout"),
        ("127.0.0.1:1/a", "127.0.0.1:1/a:latest"),
        (f"127.0.0.1:1/a:1@{digest}", "127.0.0.1:1/a:1"),
        (f"127.0.0.1:1/a@{digest}", f"127.0.0.1:1/a@{digest}"),
        ("redis", "docker.io/library/redis"),
    ):
        line = failure(tmp_path, capsys, source, destination)
        assert line.startswith(f"obdlab image convert: {destination}: the converted image would replace its source")
    assert (layout.root / "index.json").read_bytes() == before
    for source, destination in (("a.example/b:1", "a.example/b:2"), (f"oci:{layout.root}", f"oci:{layout.root}:obd")):
        check_apart(source, destination)


def test_an_image_for_another_platform_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = make_layout(tmp_path / "layout", [[member("a")]])
    arguments = ("--platform", "linux/s390x", f"oci:{layout.root}", f"oci:{tmp_path / 'out'}")
    line = failure(tmp_path, capsys, *arguments)
    assert "image is not for this platform (got linux/amd64, wanted linux/s390x)" in line


@pytest.mark.parametrize(
    "wrong",
    [
        ["--vsize-gib", "0"],
        ["--vsize-gib", "x"],
        ["--platform", "linux"],
        ["--block-size-kib", "5"],
        ["--algorithm", "gz"],
    ],
)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["image", "convert", "a", "b", *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def reads_under_tls(registry: FaultyRegistry, *options: str) -> bytes:
    # References to this machine mean plain HTTP: so the client that the options make is asked itself.
    parser = argparse.ArgumentParser()
    add_image_options(parser)
    with image_client(parser.parse_args(list(options))) as client:
        repository = Repository(f"127.0.0.1:{registry.port}", "some/image")
        return client.read_range(repository, registry.add_blob(b"under TLS"), 0, 9)


def test_registry_under_tls(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ours")
    certificate, key = authority.sign("server")
    with tls_registry(certificate, key) as registry:
        host = f"127.0.0.1:{registry.port}"
        with pytest.raises(RegistryError, match="certificate refused"):
            reads_under_tls(registry)
        assert reads_under_tls(registry, "--tls-ca", str(authority.certificate)) == b"under TLS"
        assert reads_under_tls(registry, "--insecure", host) == b"under TLS"
        (tmp_path / "certs" / host).mkdir(parents=True)
        shutil.copy(authority.certificate, tmp_path / "certs" / host / "ca.crt")
        assert reads_under_tls(registry, "--certs-dir", str(tmp_path / "certs")) == b"under TLS"
    ours, our_key = authority.sign("client")
    trust = ("--tls-ca", str(authority.certificate))
    with tls_registry(certificate, key, clients=authority.certificate) as registry:
        with pytest.raises(RegistryError):
            reads_under_tls(registry, *trust)
        assert reads_under_tls(registry, *trust, "--tls-client", f"{ours}:{our_key}") == b"under TLS"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], 2),
        (["--platforms-at-once", "5"], 5),
        (["--memory", "1G"], 6),
        (["--memory", "1"], 1),
        (["--memory", "1T"], 16),
        (["--memory", "500M", "--platforms-at-once", "8"], 3),
        (["--memory", "500M", "--platforms-at-once", "2"], 2),
    ],
)
def test_platforms_within_a_memory_bound(options: list[str], wanted: int) -> None:
    parser = argparse.ArgumentParser()
    add_conversion_options(parser)
    assert platforms_at_once(parser.parse_args(options)) == wanted
