"""``obdlab image ls``, ``cat`` and ``cp``: files of images that nobody mounts."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.cli.main import main
from obdlab.convert.compare.listing import differences, list_tree
from obdlab.errors import FormatError
from obdlab.volumes.detect import FileTree, NoSuchFileError
from obdlab.volumes.extract import Extractor
from tests.registry.server import RegistryServer, registry_server
from tests.snapshotter import imagefiles

__all__ = ["registry_server"]

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
IMAGE = f"{GOLDEN}/layer1.obd,{GOLDEN}/layer2.obd"
EXPECTED = {entry["path"]: entry for entry in json.loads((GOLDEN / "expected.m2.json").read_text())}


def printed(capsysbinary: pytest.CaptureFixture[bytes], *argv: str) -> bytes:
    assert main(argv) == 0
    return capsysbinary.readouterr().out


def test_names_are_listed(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    got = printed(capsysbinary, "ls", "-R", "--json", f"{IMAGE}:/")
    found = {entry["name"]: entry for entry in map(json.loads, got.splitlines())}
    wanted = {path.lstrip("/"): entry for path, entry in EXPECTED.items() if path not in ("", "/", ".")}
    assert found.keys() == wanted.keys()
    for name, entry in found.items():
        assert (entry["mode"], entry["uid"], entry["gid"]) == tuple(
            wanted[name][key] for key in ("mode", "uid", "gid")
        )
    top = printed(capsysbinary, "ls", IMAGE).decode().splitlines()
    assert top == sorted(top)
    assert "big" in top
    line = printed(capsysbinary, "ls", "-l", f"{IMAGE}:/big").decode()
    assert line.startswith("-r")
    assert line.endswith(" big\n")


def test_files_are_printed(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    data = printed(capsysbinary, "cat", f"{IMAGE}:/./../big")
    assert hashlib.sha256(data).hexdigest() == EXPECTED["big"]["sha256"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["cat", f"{IMAGE}:/nope"], "/nope: No such file or directory (in the image)"),
        (["cat", f"{IMAGE}:/big/more"], "Not a directory"),
        (["cat", f"{IMAGE}:/"], "not a regular file"),
        (["ls", f"{GOLDEN}/missing.obd:/"], "missing.obd"),
        (["ls", f"{GOLDEN}/../lsmt/none:/"], "no such layer file"),
    ],
)
def test_what_is_not_there_is_told(capsys: pytest.CaptureFixture[str], argv: list[str], text: str) -> None:
    assert main(argv) == 1
    assert text in capsys.readouterr().err


def test_trees_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = ["-a"] if os.geteuid() == 0 else []
    target = tmp_path / "copy"
    assert main(["image", "cp", *archive, f"{IMAGE}:/", str(target)]) == 0
    for path, entry in EXPECTED.items():
        copied = target / path.lstrip("/")
        status = copied.lstat()
        if archive:
            assert (oct(status.st_mode), status.st_uid, status.st_gid) == (entry["mode"], entry["uid"], entry["gid"])
        if "sha256" in entry:
            assert hashlib.sha256(copied.read_bytes()).hexdigest() == entry["sha256"]
    # A file into a directory; nothing is replaced.
    assert main(["image", "cp", f"{IMAGE}:/big", str(tmp_path)]) == 0
    assert (tmp_path / "big").stat().st_mtime_ns == (target / "big").stat().st_mtime_ns
    assert main(["image", "cp", f"{IMAGE}:/big", str(tmp_path)]) == 1
    assert "File exists" in capsys.readouterr().err


def test_an_image_in_a_registry_needs_no_root(registry_server: RegistryServer, tmp_path: Path) -> None:
    layers, annotations = imagefiles.golden_layers()
    documents = imagefiles.image_documents(layers, annotations, compress=False)
    image = imagefiles.push(registry_server.host, "view/golden", *documents)
    command = [sys.executable, "-m", "obdlab.cli.main", "image", "cat", f"{image}:/big"]
    environment = {**os.environ, "HOME": "/nonexistent", "OBDLAB_CACHE_DIR": str(tmp_path / "cache")}
    if os.geteuid() == 0:  # the interpreter may lie where only root looks, so root without its powers it is
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert hashlib.sha256(done.stdout).hexdigest() == EXPECTED["big"]["sha256"]


@pytest.mark.parametrize("command", ["ls", "cat", "cp"])
def test_without_rights_to_the_cache_one_line_says_so(
    command: str, registry_server: RegistryServer, tmp_path: Path
) -> None:
    layers, annotations = imagefiles.golden_layers()
    image = imagefiles.push(
        registry_server.host, "view/many", *imagefiles.image_documents(layers, annotations, compress=False)
    )
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    words = [
        sys.executable,
        "-m",
        "obdlab.cli.main",
        "image",
        command,
        "--cache-dir",
        str(closed / "cache"),
        f"{image}:/one",
    ]
    words += [str(tmp_path / "copy")] if command == "cp" else []
    if os.geteuid() == 0:
        os.chown(closed, 65534, 65534)
        words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"{closed / 'cache'}: not cached for now: " in line


def made_tree(top: Path) -> FileTree:
    image = top.with_name("image")
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(top), str(image), "16M"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return FileTree(MemoryBlob(image.read_bytes()))


@pytest.fixture
def linked(tmp_path: Path) -> FileTree:
    """A file system with links of every kind, as mke2fs makes it of a directory."""
    top = tmp_path / "top"
    (top / "a/b").mkdir(parents=True)
    (top / "a/b/file").write_text("found")
    for link, target in {
        "absolute": "/a/b/file",
        "relative": "a/../a/b/./file",
        "a/b/up": "../../../../../a/b",
        "directory": "a/b",
        "loop": "loop2",
        "loop2": "/loop",
        "dangling": "nowhere",
        "through": "a/b/file/more",
    }.items():
        (top / link).symlink_to(target)
    image = tmp_path / "image"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", top, image, "8M"], check=True, capture_output=True, timeout=60
    )
    return FileTree(MemoryBlob(image.read_bytes()))


@pytest.mark.parametrize(
    "path", ["absolute", "relative", "directory/file", "a/b/up/file", "../../a//b/./file", "a/b/up/up/file"]
)
def test_links_stay_inside(linked: FileTree, path: str) -> None:
    assert b"".join(linked.content(linked.find(path.encode()))) == b"found"
    assert linked.real_path(path.encode()) == b"/a/b/file"


@pytest.mark.parametrize(
    ("path", "text"), [("loop", "Too many levels"), ("dangling", "No such file"), ("through", "Not a directory")]
)
def test_links_that_lead_nowhere(linked: FileTree, path: str, text: str) -> None:
    with pytest.raises(NoSuchFileError, match=text):
        linked.find(path.encode())
    assert linked.readlink(linked.find(path.encode(), follow=False))


def test_what_holds_no_file_system_is_refused() -> None:
    for size in (0, 100, 1 << 16):
        with pytest.raises(FormatError, match="no file system"):
            FileTree(MemoryBlob(bytes(size)))


def test_holes_and_hard_links_stay(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    with (top / "sparse").open("wb") as file:
        file.seek(4 << 20)
        file.write(b"end")
    os.utime(top / "sparse", (1_600_000_000, 1_600_000_000))  # mke2fs knows no less than seconds
    os.link(top / "sparse", top / "twice")
    image = tmp_path / "image"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", top, image, "16M"], check=True, capture_output=True, timeout=60
    )
    tree = FileTree(MemoryBlob(image.read_bytes()))
    Extractor(tree).copy(tree.root, os.fsencode(tmp_path / "copy"))
    copied, twice = (tmp_path / "copy" / name for name in ("sparse", "twice"))
    assert copied.stat().st_ino == twice.stat().st_ino
    assert copied.stat().st_blocks * 512 < 1 << 20
    ignore = ["uid", "gid", "xattrs"]
    got, wanted = list_tree(tmp_path / "copy"), list_tree(top)
    del got["lost+found"]
    assert differences(got, wanted, ignore=ignore, ignore_at={".": ["mtime_ns"]}) == []
