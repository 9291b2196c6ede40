"""Files that old code wrote: caches, databases of conversions, roots of snapshotters. All go on in use."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.cache.admin import entries
from obdlab.cache.space import CacheSpace
from obdlab.cli.main import main
from obdlab.image.config import ImageConfig
from obdlab.image.open import open_image
from obdlab.settings.settings import Settings
from obdlab.snapshotter.errors import AlreadyExistsError
from obdlab.snapshotter.store import Kind
from tests.snapshotter.test_core import open_snapshotter, pull_labels
from tests.upgrade.record import OPTIONS, PIECE, RECORDED

FACTS = json.loads((RECORDED / "facts.json").read_text())


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A directory with what the old code left behind."""
    place = tmp_path.resolve()
    with tarfile.open(RECORDED / "state.tar.xz") as archive:
        archive.extractall(place, filter="tar")
    for config in (place / "root").rglob("config.v1.json"):  # has the root's path
        config.write_text(config.read_text().replace(FACTS["place"], str(place)))
    return place


def test_a_cache_is_read_without_its_registry(state: Path) -> None:
    settings = Settings(cache_dir=state / "cache", open_deadline_s=5.0, read_deadline_s=5.0, request_timeout_s=5.0)
    with open_image(ImageConfig.from_json(FACTS["config"]), settings) as image:
        assert hashlib.sha256(image.read_at(0, PIECE)).hexdigest() == FACTS["sha256"]
        assert image.statistics()["requests"] == 0
    found = {entry.digest for entry in entries(CacheSpace(state / "cache"))}
    assert found == {lower["digest"] for lower in FACTS["config"]["lowers"]}


@pytest.mark.parametrize("known", ["manifest", "layers"])
def test_nothing_is_converted_again(state: Path, known: str, capsys: pytest.CaptureFixture[str]) -> None:
    database, target = state / "conversions.sqlite", state / "converted"
    with closing(sqlite3.connect(database)) as rows:  # a layout is known by its path
        for table in ("obdlab_layers", "obdlab_manifests"):
            change = f"UPDATE {table} SET repository = ? WHERE repository = ?"
            assert rows.execute(change, (str(target), f"{FACTS['place']}/converted")).rowcount > 0
        if known == "layers":
            rows.execute("DELETE FROM obdlab_manifests")
        rows.commit()
    blobs = {path.name for path in (target / "blobs" / "sha256").iterdir()}
    words = ["image", "convert", "--json", *OPTIONS, "--database", f"sqlite:{database}"]
    assert main([*words, str(state / "source"), f"oci:{target}:v2"]) == 0
    (converted,) = json.loads(capsys.readouterr().out)["images"]
    layers = converted["layers"]
    assert [layer["digest"] for layer in layers] == [lower["digest"] for lower in FACTS["config"]["lowers"]]
    assert all(layer["reused"] for layer in layers)
    assert {path.name for path in (target / "blobs" / "sha256").iterdir()} - blobs == set()


def test_a_root_goes_on(state: Path) -> None:
    snapshotter = open_snapshotter(state)
    try:
        found = {snapshot.key: snapshot for snapshot in snapshotter.walk()}
        assert {key: snapshot.kind for key, snapshot in found.items()} == {
            "plain": Kind.COMMITTED,
            "container": Kind.ACTIVE,
            FACTS["layer"]: Kind.COMMITTED,
        }
        assert found["container"].parent == "plain"
        assert found["plain"].labels == {"containerd.io/gc.root": "yes"}
        (mount,) = snapshotter.mounts("container")
        root = state / "root" / "snapshots"
        assert mount.type == "overlay"
        assert {f"lowerdir={root}/1/fs", f"upperdir={root}/2/fs"} <= set(mount.options)
        assert (root / "2" / "fs" / "written").read_text() == "by the container"
        with pytest.raises(AlreadyExistsError):  # what was pulled is not pulled again
            snapshotter.prepare("again", "", pull_labels() | {"containerd.io/snapshot.ref": FACTS["layer"]})
        snapshotter.prepare("new container", "plain", {})
        for key in ("new container", "container", "plain", FACTS["layer"]):
            snapshotter.remove(key)
        assert list(root.iterdir()) == []
    finally:
        snapshotter.close()


def test_the_check_finds_a_root_whole(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--run-dir", str(state / "run"), "--cache-dir", str(state / "cache")]
    assert main(["fsck", str(state / "root"), *places]) == 0, capsys.readouterr()
