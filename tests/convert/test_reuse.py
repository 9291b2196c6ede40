"""Nothing is converted twice: not after a kill, not for another image or repository; nothing is believed blindly."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.convert.database import (
    Database,
    DatabaseError,
    LayerKey,
    LayerRecord,
    open_database,
    options_digest,
    stack_digest,
)
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.convert.workdir import FinishedLayers, work_directory
from obdlab.formats import oci
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from tests.convert.converting import convert
from tests.convert.layouts import make_layout, member
from tests.registry.server import running_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.convert.image import ConvertedImage
    from tests.convert.layouts import Member
    from tests.registry.server import RegistryServer

BASE = [member(f"base{n}", b"%d" % n * 1000) for n in range(10)]


def image_of(root: Path, *layers: list[Member]) -> str:
    make_layout(root, layers, how="plain")
    return f"oci:{root}"


def reused(image: ConvertedImage) -> list[str]:
    return [layer.reused for layer in image.layers]


@pytest.fixture
def options(tmp_path: Path) -> ConvertOptions:
    work = tmp_path / "work"
    work.mkdir()
    database = str(tmp_path / "db" / "converted.sqlite")
    return ConvertOptions(layer=LayerOptions(virtual_size=1 << 30), database=database, work_dir=work)


@pytest.fixture(
    params=[pytest.param("layout", marks=pytest.mark.slow), pytest.param("registry", marks=pytest.mark.registry)]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "layout":
        yield Place(f"oci:{tmp_path / 'out'}:", tmp_path / "out" / "blobs" / "sha256", "")
        return
    with running_registry(tmp_path) as server:
        yield Place(f"{server.host}/reuse/app:", server.storage, server.host)


class Place:
    """Where images go, and how a blob is lost there."""

    def __init__(self, prefix: str, storage: Path, host: str) -> None:
        self.prefix = prefix
        self._storage = storage
        self._host = host

    def lose(self, digest: str) -> None:
        number = digest.removeprefix("sha256:")
        if not self._host:
            (self._storage / number).unlink()
            return
        (link,) = self._storage.rglob(f"_layers/sha256/{number}/link")
        link.unlink()


def test_the_same_image_again(place: Place, options: ConvertOptions, tmp_path: Path) -> None:
    source = image_of(tmp_path / "source", BASE, [member("top", b"1")])
    first = convert(source, f"{place.prefix}a", options)
    again = convert(source, f"{place.prefix}b", options)
    assert reused(first) == ["", ""]
    assert reused(again) == ["image was there"] * 2
    assert (again.digest, again.document) == (first.digest, first.document)
    with closing(RegistryClient()) as client:
        from obdlab.convert.endpoints.names import open_source

        with closing(open_source(f"{place.prefix}b", client)) as stored:
            root, _ = stored.root()
    assert root is not None
    assert root.digest == first.digest


def test_layers_of_another_image(place: Place, options: ConvertOptions, tmp_path: Path) -> None:
    changed = [member("top", b"2"), member("base3", b"changed")]
    convert(image_of(tmp_path / "one", BASE, [member("top", b"1")]), f"{place.prefix}a", options)
    source = image_of(tmp_path / "two", BASE, changed, [member("more", b"3")])
    shared = convert(source, f"{place.prefix}b", options)
    assert reused(shared) == ["was there", "", ""]
    # Built on what is read at the destination, it is what it is when built from scratch.
    alone = convert(source, f"oci:{tmp_path / 'alone'}", replace(options, database=""))
    assert [layer.built.digest for layer in shared.layers] == [layer.built.digest for layer in alone.layers]
    assert list(options.work_dir.iterdir()) == []


def test_what_is_gone_is_made_again(place: Place, options: ConvertOptions, tmp_path: Path) -> None:
    source = image_of(tmp_path / "source", BASE, [member("top", b"1")], [member("more", b"2")])
    first = convert(source, f"{place.prefix}a", options)
    place.lose(first.layers[1].built.digest)
    again = convert(source, f"{place.prefix}a", options)
    # Above a layer that is built, all are: but not pushed again.
    assert reused(again) == ["was there", "", ""]
    assert [layer.stored for layer in again.layers] == [False, True, False]
    assert again.digest == first.digest
    assert reused(convert(source, f"{place.prefix}a", options)) == ["image was there"] * 3


@pytest.mark.parametrize("database", [True, False])
def test_a_stored_layer_that_was_cut_is_stored_again(
    database: bool, options: ConvertOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = image_of(tmp_path / "source", BASE, [member("top", b"1")]), f"oci:{tmp_path / 'out'}:a"
    chosen = options if database else replace(options, database="")
    first = convert(source, out, chosen)
    os.truncate(ImageLayout(tmp_path / "out").blob_path(first.layers[1].built.digest), 100)
    again = convert(source, out, chosen)
    assert [layer.stored for layer in again.layers] == [False, True]
    assert again.digest == first.digest
    assert main(["image", "inspect", "--verify", out]) == 0, capsys.readouterr().err


def test_other_options_are_other_layers(options: ConvertOptions, tmp_path: Path) -> None:
    source = image_of(tmp_path / "source", BASE)
    out = f"oci:{tmp_path / 'out'}"
    convert(source, f"{out}:a", options)
    for layer in (LayerOptions("lz4"), LayerOptions(filesystem="erofs")):
        other = replace(options, layer=replace(layer, virtual_size=1 << 30))
        assert reused(convert(source, f"{out}:b", other)) == [""]
    docker = replace(options, docker=True)
    assert reused(convert(source, f"{out}:b", docker)) == ["was there"]


@pytest.mark.registry
def test_another_repository_shares_its_layers(
    options: ConvertOptions, registry_server: RegistryServer, tmp_path: Path
) -> None:
    source = image_of(tmp_path / "source", BASE, [member("top", b"1")])
    first = convert(source, f"{registry_server.host}/reuse/one:a", options)
    before = len(registry_server.requests())
    second = convert(source, f"{registry_server.host}/reuse/two:a", options)
    assert reused(second) == ["shared by reuse/one"] * 2
    assert second.digest == first.digest
    puts = [entry["uri"] for entry in registry_server.requests()[before:] if entry["method"] == "PUT"]
    assert sum("/blobs/" in uri for uri in puts) == 1  # the config
    # And knows them for its own from now on.
    more = image_of(tmp_path / "more", BASE, [member("top", b"1")], [member("x", b"x")])
    assert reused(convert(more, f"{registry_server.host}/reuse/two:b", options)) == ["was there", "was there", ""]


def test_layers_that_fit_by_name_only_are_not_stacked(options: ConvertOptions, tmp_path: Path) -> None:
    source = image_of(tmp_path / "source", BASE, [member("top", b"1")])
    place = ("oci", str((tmp_path / "out").resolve()))
    image = convert(source, f"oci:{tmp_path / 'out'}:a", options)
    with closing(open_database(options.database)) as database:
        # As if another version had made the lower layer, which then went away.
        layout = ImageLayout(tmp_path / "out")
        layout.blob_path(image.layers[0].built.digest).unlink()
        config = layout.read_blob(image.manifest.config, 1 << 20)
    assert config
    again = convert(source, f"oci:{tmp_path / 'out'}:a", options)
    assert reused(again) == ["", ""]
    with closing(open_database(options.database)) as database:
        key = LayerKey(chain_id_of(tmp_path / "source", 1), options.layer.digest(), stack_digest(["sha256:other"]))
        assert database.find_layer(place, key) == []


def chain_id_of(layout: Path, number: int) -> str:
    from obdlab.convert.endpoints.layoutimages import LayoutSource

    source = LayoutSource(ImageLayout(layout), None)
    config = source.config(source.manifest(oci.Platform("linux", "amd64")))
    return oci.chain_ids(config.diff_ids)[number]


# Kills

# A conversion that gets as far as the third layer and no further.
_STUCK = """
import sys, time
from obdlab.cli.main import main
from obdlab.convert.pipeline import Pipeline
build = Pipeline._build
def stuck(self, builder, group, *rest):
    if group.first == 2:
        time.sleep(600)
    return build(self, builder, group, *rest)
Pipeline._build = stuck
sys.exit(main(["image", "convert", "-q", *sys.argv[1:]]))
"""
THREE = (BASE, [member("second", b"2")], [member("third", b"3")])


def killed(arguments: list[str], reached: Callable[[], bool]) -> None:
    """Run a conversion, and kill it once it has got so far."""
    process = subprocess.Popen([sys.executable, "-c", _STUCK, *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not reached():
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait(30)


def test_finished_layers_survive_a_kill(tmp_path: Path) -> None:
    # Nothing but the work directory knows of them: an archive appears as a whole.
    source = image_of(tmp_path / "source", *THREE)
    work = tmp_path / "work"
    work.mkdir()
    arguments = ["--database", "none", "--work-dir", str(work), source, f"oci-archive:{tmp_path / 'out.tar'}"]
    killed(arguments, lambda: len(list(work.glob("*/*.json"))) == 2)
    assert not (tmp_path / "out.tar").exists()
    image = convert(source, f"oci-archive:{tmp_path / 'out.tar'}", ConvertOptions(work_dir=work))
    assert reused(image) == ["finished before", "finished before", ""]
    assert list(work.iterdir()) == []
    alone = convert(source, f"oci:{tmp_path / 'alone'}", ConvertOptions(work_dir=work))
    assert image.digest == alone.digest


def test_damaged_and_foreign_finished_layers_are_not_taken(tmp_path: Path) -> None:
    record = LayerRecord(oci.digest_of(b"layer"), 5, 1, 512)
    for number, content in enumerate((b"layer", b"lAyer", b"layers")):
        (tmp_path / f"blob{number}").write_bytes(content)
    with work_directory(tmp_path) as left:
        finished = FinishedLayers(left)
        for name, number in (("whole", 0), ("damaged", 1), ("longer", 2), ("nonsense", 0), ("list", 0)):
            finished.add(name, tmp_path / f"blob{number}", record)
        later = json.loads((left / "whole.json").read_text()) | {"of_a_later_version": 1}
        (left / "whole.json").write_text(json.dumps(later))
        (left / "nonsense.json").write_text('{"digest": 7}')
        (left / "list.json").write_text("[]")
        (left / "torn.json").write_text("{}")
        shutil.copytree(left, tmp_path / "obdlab-convert-killed")
    with work_directory(tmp_path) as directory:
        pool = tmp_path / f"obdlab-finished-{os.geteuid()}"
        assert pool.stat().st_mode & 0o777 == 0o700
        finished = FinishedLayers(directory)
        for name in ("damaged", "longer", "nonsense", "list", "torn", "other"):
            assert finished.take(name) is None
        found = finished.take("whole")
        assert found is not None
        assert (found[0].read_bytes(), found[1]) == (b"layer", record)
        assert finished.take("whole") is None
    assert not pool.exists()


def test_finished_layers_are_kept_for_a_day(tmp_path: Path) -> None:
    pool = tmp_path / f"obdlab-finished-{os.geteuid()}"
    pool.mkdir(0o700)
    for name, age_s in (("old.layer", 90_000), ("new.layer", 0)):
        (pool / name).touch()
        os.utime(pool / name, (time.time() - age_s,) * 2)
    with work_directory(tmp_path):
        assert [path.name for path in pool.iterdir()] == ["new.layer"]


@pytest.mark.registry
def test_stored_layers_survive_a_kill(
    options: ConvertOptions, registry_server: RegistryServer, tmp_path: Path
) -> None:
    source = image_of(tmp_path / "source", *THREE)
    destination = f"{registry_server.host}/reuse/killed:a"
    database = Path(options.database)

    def noted() -> bool:
        with closing(sqlite3.connect(database)) as connection:
            tables = connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'obdlab_layers'")
            if not tables.fetchone()[0]:
                return False
            return int(connection.execute("SELECT COUNT(*) FROM obdlab_layers").fetchone()[0]) == 2

    arguments = [
        "--database",
        options.database,
        "--work-dir",
        str(options.work_dir),
        "--vsize-gib",
        "1",
        source,
        destination,
    ]
    killed(arguments, lambda: database.exists() and noted())
    for left in options.work_dir.glob("*/*.layer"):
        left.unlink()  # so that only the registry has them
    image = convert(source, destination, options)
    assert reused(image) == ["was there", "was there", ""]
    assert [layer.stored for layer in image.layers] == [False, False, True]


# Databases


def contract(url: str) -> None:
    """What every kind of database must do; twice, as it is opened again and again."""
    place, other = ("registry.example", "app"), ("registry.example", "other")
    key = LayerKey("sha256:" + "1" * 64, options_digest({"a": 1}), stack_digest([]))
    record = LayerRecord("sha256:" + "2" * 64, 1 << 40, 7, 1 << 41)
    for _ in range(2):
        with closing(open_database(url)) as database:
            assert database.find_layer(place, key) == []
            database.add_layer(other, key, record)
            database.add_layer(place, key, record)
            database.add_layer(place, key, record)
            assert database.find_layer(place, key) == [("app", record), ("other", record)]
            assert database.find_layer(("elsewhere.example", "app"), key) == []
            assert database.find_layer(place, LayerKey(key.chain_id, key.options, stack_digest(["x"]))) == []
            database.drop_layer(place, key)
            assert database.find_layer(place, key) == [("other", record)]
            database.drop_layer(other, key)
            assert database.find_manifest(place, record.digest, key.options) is None
            database.add_manifest(place, record.digest, key.options, key.chain_id)
            database.add_manifest(place, record.digest, key.options, record.digest)
            assert database.find_manifest(place, record.digest, key.options) == record.digest
            database.drop_manifest(place, record.digest, key.options)
            long_place = ("oci", "/very/long" * 100)
            database.add_layer(long_place, key, record)
            assert [found for _, found in database.find_layer(long_place, key)] == [record]
            database.drop_layer(long_place, key)


def test_sqlite(tmp_path: Path) -> None:
    contract(str(tmp_path / "made" / "too.sqlite"))
    contract(f"sqlite:{tmp_path / 'x'}")


def test_many_write_at_once(tmp_path: Path) -> None:
    many_writers(str(tmp_path / "db"))


def many_writers(url: str) -> None:
    """Several make the tables and write the same rows at once."""
    place = ("registry.example", "app")
    record = LayerRecord("sha256:" + "2" * 64, 1, 1, 1)

    def work(number: int) -> None:
        with closing(open_database(url)) as database:
            for n in range(20):
                database.add_layer(place, LayerKey(f"sha256:{n:064x}", "o", f"{number % 2}"), record)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    with closing(open_database(url)) as database:
        assert all(database.find_layer(place, LayerKey(f"sha256:{n:064x}", "o", "1")) for n in range(20))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://x", r"no such kind .got redis://, wanted a path, sqlite:PATH, mysql://..., postgres://..."),
        ("/proc/x/y", "cannot make the database's directory"),
    ],
)
def test_databases_that_cannot_be_opened(url: str, message: str) -> None:
    with pytest.raises(DatabaseError, match=message):
        open_database(url)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no database at all, but a file" * 100)
    with pytest.raises(DatabaseError, match="file is not a database"):
        open_database(str(tmp_path / "x"))


def test_a_database_that_fails_later_costs_only_time(
    options: ConvertOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise DatabaseError("gone")

    source = image_of(tmp_path / "source", BASE)
    wanted = convert(source, f"oci:{tmp_path / 'wanted'}", options).digest
    for name in ("find_layer", "add_layer", "find_manifest", "add_manifest"):
        monkeypatch.setattr(Database, name, fail)
    assert convert(source, f"oci:{tmp_path / 'out'}", options).digest == wanted


def test_blob_is_asked_for_at_the_registry(registry_server: RegistryServer) -> None:
    reference = Reference.parse(f"{registry_server.host}/reuse/none")
    with closing(RegistryClient()) as client:
        repository = client.repository(reference)
        digest = "sha256:" + "5" * 64
        assert not client.has_blob(repository, digest)
        assert not client.mount_blob(repository, digest, "reuse/one")
