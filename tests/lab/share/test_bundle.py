"""Bundles: the same bytes twice, whole tables, and no damaged or foreign file."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.cli.main import main
from obdlab.lab.run.spec import Spec
from obdlab.lab.share.bundle import BundleError, pack, unpack
from tests.lab.declared import declared
from tests.lab.paper.rows import start_rows, store_grid, store_starts


@pytest.fixture
def results(tmp_path: Path) -> Path:
    root = tmp_path / "results"
    starts = declared("start", snapshotters=("overlayfs", "obdlab"), a_a=False, repeats=3, disks=("native", "cloud"))
    store_starts(root / "start", starts, start_rows())
    store_grid(root / "index", Spec.from_values({"name": "index", "kind": "index", "repeats": 3}), {"batch_m_s": 3.0})
    for name in ("start", "index"):
        (root / name / "environments.jsonl").write_text('{"id": "e", "cores": 2}\n')
    return root


def rewritten(bundle: Path, target: Path, change: dict[str, bytes | None]) -> Path:
    """The bundle with some files replaced, added or (None) left out; the digests stay as they were."""
    with tarfile.open(bundle) as old:
        files = {entry.name: old.extractfile(entry).read() for entry in old}  # type: ignore[union-attr]
    for name, data in change.items():
        if data is None:
            del files[name]
        else:
            files[name] = data
    with tarfile.open(target, "w:gz") as new:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
    return target


def test_a_bundle_is_the_same_twice_and_is_checked_by_its_reader(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "1.tar.gz", tmp_path / "2.tar.gz"
    for target in (first, second):
        assert main(["lab", "bundle", "start", "index", "--results", str(results), "-o", str(target)]) == 0
    assert first.read_bytes() == second.read_bytes()
    place = tmp_path / "reader"
    assert main(["lab", "unbundle", str(first), str(place)]) == 0
    told = capsys.readouterr().out
    assert "start: 36 rows, table as stored" in told
    assert "2 experiments" in told
    assert (place / "results/start/rows.jsonl").read_bytes() == (results / "start/rows.jsonl").read_bytes()
    readme = (place / "README.md").read_text()
    assert "`results/index`" in readme
    assert "Functional" in readme
    assert "numpy==" in (place / "requirements.txt").read_text()
    # A reader renders everything from it.
    assert main(["lab", "show", "start", "--results", str(place / "results")]) == 0
    assert main(["lab", "report", "--ledger", "--results", str(place / "results")]) == 0
    with pytest.raises(BundleError, match="new or empty directory"):
        unpack(first, place)


def test_a_table_that_its_rows_do_not_come_to_is_found(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(results, ["index"], tmp_path / "b.tar.gz")
    found = unpack(tmp_path / "b.tar.gz", tmp_path / "good")
    assert [each.same for each in found] == [True]
    # An author who changes the table, and the digests with it.
    import hashlib

    with tarfile.open(tmp_path / "b.tar.gz") as old:
        sums = old.extractfile("bundle/SHA256SUMS").read().decode()  # type: ignore[union-attr]
        table = old.extractfile("bundle/results/index/table.txt").read()  # type: ignore[union-attr]
    better = table.replace(b"3", b"9")
    sums = sums.replace(hashlib.sha256(table).hexdigest(), hashlib.sha256(better).hexdigest())
    change: dict[str, bytes | None] = {"bundle/SHA256SUMS": sums.encode(), "bundle/results/index/table.txt": better}
    forged = rewritten(tmp_path / "b.tar.gz", tmp_path / "forged.tar.gz", change)
    assert main(["lab", "unbundle", str(forged), str(tmp_path / "bad")]) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bundle/results/index/rows.jsonl": b"{}"}, "damaged"),
        ({"bundle/results/index/spec.json": None}, "missing"),
        ({"bundle/more": b""}, "not in SHA256SUMS"),
        ({"bundle/SHA256SUMS": None}, "missing"),
        ({"bundle/../../etc/x": b"x"}, "foreign entry"),
        ({"/etc/x": b"x"}, "foreign entry"),
        ({"other/x": b"x"}, "foreign entry"),
    ],
)
def test_damaged_and_foreign_files_are_refused(
    results: Path, tmp_path: Path, change: dict[str, bytes | None], reason: str
) -> None:
    pack(results, ["index"], tmp_path / "b.tar.gz")
    bad = rewritten(tmp_path / "b.tar.gz", tmp_path / "bad.tar.gz", change)
    with pytest.raises(BundleError, match=reason):
        unpack(bad, tmp_path / "place")
    assert not (tmp_path / "place").exists()


def test_links_and_bombs_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        link = tarfile.TarInfo("bundle/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    (tmp_path / "link.tar.gz").write_bytes(stream.getvalue())
    with pytest.raises(BundleError, match="foreign entry"):
        unpack(tmp_path / "link.tar.gz", tmp_path / "place")
    bomb = tarfile.TarInfo("bundle/bomb")
    bomb.size = 1 << 40
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(bomb.tobuf() + bytes(1024)))
    with pytest.raises(BundleError, match="too large"):
        unpack(tmp_path / "bomb.tar.gz", tmp_path / "place")


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"missing rows\.jsonl"):
        pack(tmp_path, ["x"], tmp_path / "b.tar.gz")
    assert not (tmp_path / "b.tar.gz").exists()


@settings(max_examples=60)
@given(data=st.data())
def test_no_flipped_byte_is_unpacked(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("flips")
    root = place / "results"
    store_grid(root / "index", Spec.from_values({"name": "index", "kind": "index", "repeats": 1}), {})
    (root / "index" / "environments.jsonl").write_text('{"id": "e"}\n')
    pack(root, ["index"], place / "b.tar.gz")
    plain = bytearray(gzip.decompress((place / "b.tar.gz").read_bytes()))
    with tarfile.open(place / "b.tar.gz") as tar:
        entries = [entry for entry in tar if entry.size]
    entry = data.draw(st.sampled_from(entries), label="file")
    plain[entry.offset_data + data.draw(st.integers(0, entry.size - 1), label="offset")] ^= 1
    (place / "bad.tar.gz").write_bytes(gzip.compress(bytes(plain)))
    with pytest.raises(BundleError):
        unpack(place / "bad.tar.gz", place / "unpacked")
