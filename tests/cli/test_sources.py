"""One way to name an image: every command that reads images takes every form of name, and reads the same."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.convert.endpoints.forms import FORMS
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.formats import oci
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig, LowerConfig
from tests.convert.conftest import containerd
from tests.convert.layouts import make_layout, member

if TYPE_CHECKING:
    from tests.convert.oracle import Containerd
    from tests.registry.server import RegistryServer

__all__ = ["containerd"]

LAYERS = [[member("a", b"text of a"), member("b", b"1" * 5000)], [member("c", b"text of c")]]
FORM_NAMES = ("oci", "tagged", "directory", "archive", "config", "files")


class Place:
    """An image in every form, below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = f"oci:{make_layout(root / 'source', LAYERS).root}"
        options = ["-q", "--database", "none", "--work-dir", str(root), "--vsize-gib", "1"]
        for target in (f"oci:{root / 'image'}:v1", f"oci-archive:{root / 'image.tar'}"):
            assert main(["image", "convert", *options, self.source, target]) == 0
        layout = ImageLayout(root / "image")
        (entry,) = layout.select("v1")
        manifest = oci.Manifest.parse(layout.read_blob(entry, 1 << 20))
        self.layers = [str(layout.blob_path(layer.digest)) for layer in manifest.layers]
        ImageConfig(lowers=tuple(LowerConfig(file=path) for path in self.layers)).save(root / "config.v1.json")
        self.names = {
            "oci": f"oci:{root / 'image'}",
            "tagged": f"oci:{root / 'image'}:v1",
            "directory": str(root / "image"),
            "archive": f"oci-archive:{root / 'image.tar'}",
            "config": str(root / "config.v1.json"),
            "files": ",".join(self.layers),
        }
        self.trace = root / "trace"
        self.trace.write_bytes(Trace.from_reads([(0, 4096, 4096), (1, 4096, 4096)]).to_bytes())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("sources"))


def output(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    status = main(words)
    printed = capfd.readouterr()
    assert status == 0, printed.err
    return printed.out


# Each with {} for the image. Layers are named by their paths, and verify prints those.
COMMANDS = (
    "image ls -l -R {}:/",
    "image ls --json {}:/",
    "image cat {}:/c",
    "trace files {trace} {}",
    "trace files --reads {trace} {}",
    "layer diff --old {} --new {files}",
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", FORM_NAMES)
def test_every_form_reads_the_same(
    form: str, command: str, place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache-dir", str(tmp_path / "cache")]
    found = []
    for name in (place.names["files"], place.names[form]):
        words = []
        for word in command.split():
            filled = word.format(name, trace=place.trace, files=place.names["files"])
            words += filled.split(",") if form == "files" and command.startswith("layer") else [filled]
        found.append(output(capfd, *words, *cache) if "diff" not in command else diff(capfd, words, cache))
    assert found[0] == found[1]
    assert found[0]


def diff(capfd: pytest.CaptureFixture[str], words: list[str], cache: list[str]) -> str:
    split = [part for word in words for part in (word.split(",") if word.startswith("/") else [word])]
    return output(capfd, *split, *cache)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_every_form_is_verified_compared_copied_and_merged(
    form: str, place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = place.names[form]
    verified = json.loads(output(capfd, "image", "verify", "--json", *name.split(",")))
    assert len(verified["layers"]) == 2
    assert all(layer["checksums"] and layer["names_parent"] for layer in verified["layers"])
    assert output(capfd, "image", "compare", "--work-dir", str(tmp_path), place.source, name) == ""
    output(capfd, "image", "cp", f"{name}:/", str(tmp_path / "copy"))
    assert {path.name for path in (tmp_path / "copy").iterdir()} >= {"a", "b", "c"}
    assert (tmp_path / "copy" / "a").read_bytes() == b"text of a"
    output(capfd, "layer", "merge", *name.split(","), "-q", "-o", str(tmp_path / "merged"))
    output(capfd, "layer", "merge", *place.layers, "-q", "-o", str(tmp_path / "wanted"))
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "wanted").read_bytes()
    facts = json.loads(output(capfd, "image", "inspect", "--json", *name.split(",")))
    images = facts.get("images", [])
    assert len(images[0]["layers"] if images else facts["files"]) == 2


@pytest.mark.parametrize("name", ["nonsense:x/y:", "dir:x", "docker-daemon:x", "oci:", "containerd:x"])
@pytest.mark.parametrize(
    "command",
    [
        ["image", "convert", "{}", "oci:out"],
        ["image", "compare", "{}", "oci:x"],
        ["image", "inspect", "{}"],
        ["image", "pull-blob", "{}"],
        ["image", "ls", "{}:/"],
        ["image", "verify", "{}"],
        ["device", "attach", "{}"],
        ["trace", "files", "trace", "{}"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_malformed_name_is_refused_in_one_line(
    name: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "dir:x" and command[1] == "compare":  # takes directories
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace").write_bytes(Trace.from_reads([(0, 0, 4096)]).to_bytes())
    monkeypatch.setenv("OBDLAB_RUN_DIR", str(tmp_path / "run"))
    assert main([word.format(name) for word in command]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"obdlab {command[0]} {command[1]}: ")
    if name in ("dir:x", "docker-daemon:x", "oci:"):
        assert f"wanted {FORMS}" in line


def test_a_plain_image_is_refused_with_the_command_that_converts_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["image", "ls", f"{place.source}:/"], ["image", "verify", place.source]):
        assert main(words) == 1
        assert f"image convert {place.source} NEW" in capsys.readouterr().err


def test_a_damaged_layer_of_an_archive_is_found(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(place.root / "image.tar") as tar:
        big = max((each for each in tar if each.isfile()), key=lambda each: each.size)
    damaged = tmp_path / "image.tar"
    shutil.copy(place.root / "image.tar", damaged)
    with damaged.open("r+b") as file:
        file.seek(big.offset_data + 2048 + 20)  # behind the headers of tar and ZFile: in the first block
        file.write(bytes(8))
    assert main(["image", "verify", f"oci-archive:{damaged}"]) == 1
    assert "CRC of ZFile" in capfd.readouterr().err


@pytest.mark.registry
def test_a_registrys_image_reads_the_same(
    registry_server: RegistryServer, place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"{registry_server.host}/sources/image:1"
    options = ["-q", "--database", "none", "--work-dir", str(tmp_path), "--vsize-gib", "1"]
    output(capfd, "image", "convert", *options, place.source, name)
    cache = ["--cache-dir", str(tmp_path / "cache")]
    wanted = output(capfd, "image", "ls", "--json", "-R", f"{place.names['files']}:/", *cache)
    assert output(capfd, "image", "ls", "--json", "-R", f"{name}:/", *cache) == wanted
    verified = json.loads(output(capfd, "image", "verify", "--json", name, *cache))
    assert len(verified["layers"]) == 2
    output(capfd, "layer", "diff", "--old", name, "--new", *place.layers, *cache)


@pytest.mark.kernel
@pytest.mark.containerd
def test_devices_of_images_in_stores(
    containerd: Containerd, place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stored = "containerd:test.invalid/sources:1"
    address = ["--containerd", str(containerd.socket)]
    options = ["-q", "--database", "none", "--work-dir", str(tmp_path), "--vsize-gib", "1"]
    output(capfd, "image", "convert", *options, *address, place.source, stored)
    wanted = output(capfd, "image", "ls", "--json", "-R", f"{place.names['files']}:/")
    assert output(capfd, "image", "ls", "--json", "-R", f"{stored}:/", *address) == wanted
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    mounted = tmp_path / "mnt"
    copies = tmp_path / "cache-images"
    try:
        for name, copied in ((place.names["oci"], 0), (place.names["archive"], 2), (stored, 2)):
            output(capfd, "device", "mount", *places, *address, name, str(mounted))
            assert (mounted / "a").read_bytes() == b"text of a"
            assert (mounted / "c").read_bytes() == b"text of c"
            assert len([path for path in copies.rglob("*") if path.is_file()]) == copied
            output(capfd, "device", "umount", *places, str(mounted))
            assert [path for path in copies.rglob("*") if path.is_file()] == []
        output(capfd, "device", "attach", *places, place.names["archive"], "--id", "kept")
        assert len([path for path in copies.rglob("*") if path.is_file()]) == 2
    finally:
        main(["cleanup", *places])
    assert not any(path.is_file() for path in copies.rglob("*"))
    assert os.listdir(tmp_path / "run") == [] or "devices" not in os.listdir(tmp_path / "run")
