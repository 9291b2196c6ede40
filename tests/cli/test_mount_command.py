"""``obdlab device mount``, ``umount``, ``attach``, ``detach``, ``list``, ``cleanup``: real images, real registry."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from obdlab.cache.space import disk_usage
from obdlab.devices.fuse_loop import devices_of
from obdlab.formats import oci
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.system import mount
from tests.registry.server import RegistryServer

pytestmark = pytest.mark.kernel

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
LAYERS = [str(GOLDEN / "layer1.obd"), str(GOLDEN / "layer2.obd")]


@dataclass
class Bed:
    run_dir: Path
    cache_dir: Path
    target: Path
    #: Ids of all devices there were.
    seen: set[str] = field(default_factory=set)

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run the command; return what it printed, errors included."""
        command, *rest = arguments
        places = ["--run-dir", str(self.run_dir), "--cache-dir", str(self.cache_dir)]
        done = subprocess.run(
            [sys.executable, "-m", "obdlab", *command.split(), *places, *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout
        if (self.run_dir / "devices").exists():
            self.seen |= set(os.listdir(self.run_dir / "devices"))
        return done.stdout

    def leftovers(self) -> list[str]:
        """Devices that are not listed any more, or not yet, but still there."""
        return [str(path) for name in ("mine", *self.seen) for path in devices_of(self.run_dir / "devices" / name)]

    def until_nothing_is_left(self) -> None:
        """Others on this machine may hold a device for a while, by a mount namespace of theirs."""
        deadline = time.monotonic() + 60
        while self.leftovers():
            assert time.monotonic() < deadline, self.leftovers()
            time.sleep(0.05)


@pytest.fixture
def obdlab(tmp_path: Path) -> Iterator[Bed]:
    root = tmp_path.resolve()
    bed = Bed(root / "run", root / "cache", root / "mnt")
    yield bed
    bed("cleanup", "--force", "--cache")
    bed.until_nothing_is_left()
    assert not mount.is_mounted(bed.target)


def listing(root: Path) -> list[dict[str, Any]]:
    """List a tree the way the golden listings do."""
    found: dict[str, os.stat_result] = {"/": os.lstat(root)}
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(directory) / name
            found[str(path.relative_to(root))] = os.lstat(path)
    return [_entry(root / path.lstrip("/"), path, found[path], found) for path in sorted(found)]


def _entry(full: Path, path: str, status: os.stat_result, all_: dict[str, os.stat_result]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "path": path,
        "mode": oct(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime": int(status.st_mtime),
        "nlink": status.st_nlink,
    }
    if stat.S_ISREG(status.st_mode):
        entry |= {"size": status.st_size, "sha256": hashlib.sha256(full.read_bytes()).hexdigest()}
        if status.st_nlink > 1:
            entry["hardlink_group"] = min(name for name, other in all_.items() if other.st_ino == status.st_ino)
    if stat.S_ISLNK(status.st_mode):
        entry["target"] = os.readlink(full)
    if stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
        entry["rdev"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
    names = os.listxattr(full, follow_symlinks=False)
    if names:
        entry["xattrs_hex"] = {name: os.getxattr(full, name, follow_symlinks=False).hex() for name in sorted(names)}
    return entry


def expected(depth: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((GOLDEN / f"expected.m{depth}.json").read_text())
    return sorted(entries, key=lambda entry: str(entry["path"]))


@pytest.mark.parametrize("depth", [1, 2])
def test_golden_image_lists_as_the_original_showed_it(obdlab: Bed, depth: int) -> None:
    obdlab("device mount", *LAYERS[:depth], str(obdlab.target))
    found = {entry["path"]: entry for entry in listing(obdlab.target)}
    wanted = {entry["path"]: entry for entry in expected(depth)}
    assert found.keys() == wanted.keys()
    for path, entry in wanted.items():
        assert found[path] == entry, path
    obdlab("device umount", str(obdlab.target))
    obdlab.until_nothing_is_left()


def test_mount_and_umount_twice(obdlab: Bed) -> None:
    said = obdlab("device mount", ",".join(LAYERS), str(obdlab.target))
    assert "read-only" in said
    assert "mounted there already" in obdlab("device mount", *LAYERS, str(obdlab.target), code=1)
    second = obdlab.target.parent / "second"
    obdlab("device mount", *LAYERS, str(second))
    assert len(obdlab("device list").splitlines()) == 1
    with pytest.raises(OSError):
        (second / "new").write_bytes(b"")
    assert "still in use elsewhere" in obdlab("device umount", str(obdlab.target))
    assert "detached" in obdlab("device umount", str(second))
    assert "not mounted" in obdlab("device umount", str(second), code=1)
    assert obdlab("device list") == ""
    assert list((obdlab.run_dir / "images").iterdir()) == []


def test_umount_leaves_other_mounts_alone(obdlab: Bed) -> None:
    assert "not a mount of obdlab's (got proc" in obdlab("device umount", "/proc", code=1)
    assert mount.is_mounted(Path("/proc"))


def test_umount_says_who_is_in_the_way(obdlab: Bed) -> None:
    obdlab("device mount", *LAYERS, str(obdlab.target))
    fd = os.open(obdlab.target, os.O_RDONLY)
    try:
        assert f"process {os.getpid()}" in obdlab("device umount", str(obdlab.target), code=1)
    finally:
        os.close(fd)
    obdlab("device umount", str(obdlab.target))


def test_attach_list_detach(obdlab: Bed, tmp_path: Path) -> None:
    config = tmp_path / "config.v1.json"
    ImageConfig(lowers=tuple(LowerConfig(file=path) for path in LAYERS)).save(config)
    path = obdlab("device attach", str(config), "--id", "mine").strip()
    assert obdlab("device attach", str(config), "--id", "mine").strip() == path
    assert Path(path).is_block_device()
    (known,) = map(json.loads, obdlab("device list", "--json").splitlines())
    assert (known["id"], known["path"], known["alive"], known["read_only"]) == ("mine", path, True, True)
    assert obdlab("device detach", path) == "mine: detached\n"
    assert "mine: no device of this run directory" in obdlab("device detach", "mine", code=1)
    assert "no device of this run directory" in obdlab("device detach", "/dev/nothing", code=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5000], "layer1.obd"),
        (lambda data: bytes(1 << 20), "layer1.obd"),
        (lambda data: b"", "layer1.obd"),
    ],
)
def test_a_damaged_layer_is_named_and_nothing_stays(
    obdlab: Bed, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    bad = tmp_path / "layer1.obd"
    bad.write_bytes(damage(Path(LAYERS[0]).read_bytes()))
    said = obdlab("device mount", str(bad), LAYERS[1], str(obdlab.target), code=1)
    assert message in said
    assert "Traceback" not in said
    assert not obdlab.target.exists()
    assert obdlab.leftovers() == []
    assert obdlab("device list") == ""


def test_no_such_layer_file(obdlab: Bed) -> None:
    assert "/no/such.obd: no such layer file" in obdlab("device mount", "/no/such.obd", str(obdlab.target), code=1)


def test_cleanup_takes_everything_down(obdlab: Bed) -> None:
    obdlab("device mount", *LAYERS, str(obdlab.target))
    said = obdlab("cleanup", "--cache")
    assert f"mount {obdlab.target}" in said
    assert "device host" in said
    obdlab.until_nothing_is_left()
    assert list(obdlab.run_dir.iterdir()) == []
    assert "nothing to clean up" in obdlab("cleanup")


def test_cleanup_names_what_is_in_use_and_force_takes_it(obdlab: Bed) -> None:
    obdlab("device mount", *LAYERS, str(obdlab.target))
    with (obdlab.target / "big").open("rb") as file:
        assert f"still in use: {obdlab.target}: in use by process {os.getpid()}" in obdlab("cleanup", code=1)
        assert len(file.read()) == 1200000
        assert "removed" in obdlab("cleanup", "--force")
        assert not mount.is_mounted(obdlab.target)


@pytest.fixture
def pushed(registry_server: RegistryServer) -> str:
    """The golden image in a registry; its reference."""
    reference = Reference.parse(f"{registry_server.host}/golden/ext4:2")
    client = RegistryClient()
    repository = client.repository(reference)
    layers = []
    for path in map(Path, LAYERS):
        digest = oci.digest_of(path.read_bytes())
        client.push_blob(repository, digest, path.stat().st_size, partial(path.open, "rb"))
        annotations = {oci.BLOB_DIGEST: digest, oci.BLOB_SIZE: str(path.stat().st_size)}
        layers.append(oci.Descriptor(oci.OCI_LAYER, digest, path.stat().st_size, annotations))
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]}}).encode()
    client.push_blob(repository, oci.digest_of(config), len(config), lambda: io.BytesIO(config))
    descriptor = oci.Descriptor(oci.OCI_CONFIG, oci.digest_of(config), len(config))
    manifest = oci.Manifest(descriptor, tuple(layers))
    client.put_manifest(reference, manifest.media_type, manifest.to_bytes())
    plain = oci.Manifest(descriptor, tuple(oci.Descriptor(oci.OCI_LAYER, x.digest, x.size) for x in layers))
    client.put_manifest(
        Reference.parse(f"{registry_server.host}/golden/ext4:plain"), plain.media_type, plain.to_bytes()
    )
    client.close()
    return str(reference)


@pytest.mark.registry
def test_an_image_of_a_registry_is_read_lazily(obdlab: Bed, pushed: str) -> None:
    obdlab("device mount", pushed, str(obdlab.target))
    assert (obdlab.target / "abs").read_bytes()
    fetched = sum(path.stat().st_blocks * 512 for path in obdlab.cache_dir.rglob("data"))
    assert 0 < fetched < sum(Path(path).stat().st_size for path in LAYERS) * 3 // 4
    assert {entry["path"]: entry for entry in listing(obdlab.target)} == {e["path"]: e for e in expected(2)}
    obdlab("device umount", str(obdlab.target))


def forget_files(root: Path) -> None:
    """Drop the files below from the page cache."""
    for directory, _, names in os.walk(root):
        for path in (Path(directory, name) for name in names):
            if stat.S_ISREG(path.lstat().st_mode):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.registry
def test_read_from_a_cache_that_is_too_small_and_cleared_meanwhile(obdlab: Bed, pushed: str) -> None:
    quota = 200 << 10
    obdlab("device mount", pushed, str(obdlab.target), "--cache-quota", "200K")
    wanted = {entry["path"]: entry for entry in expected(2)}
    for _ in range(3):
        obdlab("cache clear")
        deadline = time.monotonic() + 60
        # A server that finds its files busy does not cache for two seconds, and files come and go while their sizes
        # are added up.
        while True:
            forget_files(obdlab.target)
            assert {entry["path"]: entry for entry in listing(obdlab.target)} == wanted
            fetched_again = any(path.stat().st_blocks for path in obdlab.cache_dir.rglob("data"))
            held = disk_usage(obdlab.cache_dir)
            if fetched_again and held <= quota:
                break
            assert time.monotonic() < deadline, (fetched_again, held)
    obdlab("device umount", str(obdlab.target))


@pytest.mark.registry
def test_an_ordinary_image_is_refused(obdlab: Bed, pushed: str) -> None:
    plain = pushed.removesuffix(":2") + ":plain"
    said = obdlab("device mount", plain, str(obdlab.target), code=1)
    assert "not an overlaybd image" in said
    assert f"obdlab image convert {plain}" in said
    assert not obdlab.target.exists()


@pytest.mark.registry
def test_a_missing_image_is_named(obdlab: Bed, pushed: str) -> None:
    missing = pushed.removesuffix(":2") + ":none"
    said = obdlab("device mount", missing, str(obdlab.target), code=1)
    assert "404" in said
    assert "golden/ext4" in said
