"""Files that old code wrote: caches, databases of conversions, roots of snapshotters. All go on in use."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

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
def test_a_database_goes_on(state: Path, known: str, capsys: pytest.CaptureFixture[str]) -> None:
    database, target = state / "conversions.sqlite", state / "converted"
    words = ["image", "convert", "--json", *OPTIONS, "--database", f"sqlite:{database}"]

    def convert(tag: str) -> list[dict[str, Any]]:
        assert main([*words, str(state / "source"), f"oci:{target}:{tag}"]) == 0
        (converted,) = json.loads(capsys.readouterr().out)["images"]
        return list(converted["layers"])

    with closing(sqlite3.connect(database)) as rows:  # a layout is known by its path
        for table in ("obdlab_layers", "obdlab_manifests"):
            change = f"UPDATE {table} SET repository = ? WHERE repository = ?"
            assert rows.execute(change, (str(target), f"{FACTS['place']}/converted")).rowcount > 0
        rows.commit()
    before = {lower["digest"] for lower in FACTS["config"]["lowers"]}
    # Layers have their metadata at the front now, so each is converted once more. Those of before stay.
    first = convert("v2")
    assert not before & {layer["digest"] for layer in first}
    assert {digest.partition(":")[2] for digest in before} <= {path.name for path in blobs_of(target)}
    if known == "layers":
        with closing(sqlite3.connect(database)) as rows:
            rows.execute("DELETE FROM obdlab_manifests")
            rows.commit()
    blobs = blobs_of(target)
    again = convert("v3")
    assert [layer["digest"] for layer in again] == [layer["digest"] for layer in first]
    assert all(layer["reused"] for layer in again)
    assert blobs_of(target) == blobs


def blobs_of(layout: Path) -> set[Path]:
    """The blobs of an OCI layout."""
    return set((layout / "blobs" / "sha256").iterdir())


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
