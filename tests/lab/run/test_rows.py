from __future__ import annotations

import csv
import json
import resource
import signal
import sys
from pathlib import Path

import pytest

from obdlab.lab.run.rows import Row, RowsError, RowStore, last_attempts, told_apart, write_rows


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "results")
    store.append([{"cell": "a", "attempt": 1, "total_s": 1.5}, {"cell": "a", "attempt": 1, "total_s": 0.5}])
    store.append([{"cell": "b", "attempt": 2, "total_s": 2.0}, {"cell": "b", "attempt": 2, "error": "no answer"}])
    assert [row["cell"] for row in RowStore(tmp_path / "results").rows()] == ["a", "a", "b", "b"]
    assert store.done_keys() == {"a"}


def test_a_torn_line_is_dropped_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([{"cell": "a", "attempt": 1}])
    whole = store.path.read_bytes()
    for cut in range(1, len(json.dumps({"cell": "b"}))):
        store.path.write_bytes(whole + json.dumps({"cell": "b"}).encode()[:cut])
        assert store.done_keys() == {"a"}
        store.append([{"cell": "c", "attempt": 2}])
        assert store.done_keys() == {"a", "c"}


@pytest.mark.parametrize("line", ["[1]", '"text"', "nonsense}", "7"])
def test_damage_is_an_error_naming_the_line(tmp_path: Path, line: str) -> None:
    store = RowStore(tmp_path)
    store.append([{"cell": "a"}])
    with store.path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(RowsError, match=r"rows\.jsonl:2"):
        store.rows()


def test_the_error_shows_the_start_of_a_line(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    line = json.dumps("x" * 200)
    store.path.write_text(f'{{"cell": "a"}}\n\n{line}\n')
    with pytest.raises(RowsError) as caught:
        store.rows()
    assert str(caught.value) == f"{store.path}:3: not an object (got {line[:80]!r})"


def test_lines_are_stored_to_the_letter(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([{"cell": "a", "attempt": 1}])
    store.append([{"start": "cold", "cell": "b", "attempt": 2}, {"cell": "b", "attempt": 2}])
    whole = (
        b'{"attempt": 1, "attempt_rows": 1, "cell": "a"}\n'
        b'{"attempt": 2, "attempt_rows": 2, "cell": "b", "start": "cold"}\n'
        b'{"attempt": 2, "attempt_rows": 2, "cell": "b"}\n'
    )
    assert store.path.read_bytes() == whole
    # A torn line ends before the row that follows, wherever in the file its end is.
    for torn in (b"{", whole[: len(whole) // 2] + b'{"a', b'{"' + b"x" * 300):
        store.path.write_bytes(whole + torn)
        store.append([{"cell": "c"}])
        assert store.path.read_bytes() == whole + torn + b'\n{"cell": "c"}\n'


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.path.write_text('\n{"cell": "a"}\n\n{"cell": "b"}\n\n')
    assert store.rows() == [{"cell": "a"}, {"cell": "b"}]


@pytest.mark.parametrize("end", ['{"cell": "b"}', "nonsense}", "[1", ""])
def test_an_end_that_is_not_torn_stays(tmp_path: Path, end: str) -> None:
    store = RowStore(tmp_path)
    store.path.write_text('{"cell": "a"}\n' + end)
    assert store.mend() == []
    assert store.path.read_text() == '{"cell": "a"}\n' + end
    assert not (tmp_path / "rows.jsonl.torn").exists()


def test_of_each_cell_the_last_good_attempt_counts_else_the_last_failed_one() -> None:
    def attempt(cell: str, number: int, *errors: str) -> list[Row]:
        return [{"cell": cell, "attempt": number, "error": error, "row": row} for row, error in enumerate(errors)]

    failed, good = attempt("a", 1, "", "no answer"), attempt("a", 2, "", "")
    again, late = attempt("a", 3, "timeout", ""), attempt("b", 4, "timeout", "")
    first, last = attempt("b", 1, "no answer"), attempt("c", 9, "", "")
    for given, kept in (
        (failed, failed),
        (failed + good, good),
        (good + failed, good),
        (failed + good + again, good),
        # A host whose clock went back numbers a later attempt lower.
        (again + failed, failed),
        (first + late, late),
        (failed + first + good + last + late, good + late + last),
        ([], []),
    ):
        assert last_attempts(given) == kept


def test_one_name_of_several_images_is_told_apart_by_digest() -> None:
    one, two = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    rows: list[Row] = [
        {"image": "redis", "image_digest": one},
        {"image": "nginx", "image_digest": one},
        {"image": "redis", "image_digest": two},
        {"image": "nginx", "image_digest": one},
        {"image": "wordpress", "image_digest": one},
        {"image": "wordpress"},
        {"cell": "of a grid"},
        {"cell": "of another", "image_digest": two},
    ]
    assert [row.get("image") for row in told_apart(rows)] == [
        "redis (sha256:111111111111)",
        "nginx",
        "redis (sha256:222222222222)",
        "nginx",
        "wordpress (sha256:111111111111)",
        "wordpress (not pinned)",
        None,
        None,
    ]
    assert rows[0]["image"] == "redis"
    assert [{**row, "image": 0} for row in told_apart(rows)] == [{**row, "image": 0} for row in rows]


def test_exports_to_the_letter(tmp_path: Path) -> None:
    rows: list[Row] = [{"b": 1, "a": {"z": {"y": 2}, "x": "é"}}, {"c": None}]
    assert write_rows(rows, tmp_path / "out.jsonl") == 2
    assert (tmp_path / "out.jsonl").read_text() == '{"a": {"x": "\\u00e9", "z": {"y": 2}}, "b": 1}\n{"c": null}\n'
    assert write_rows(rows, tmp_path / "out.csv") == 2
    assert (tmp_path / "out.csv").read_bytes() == "a.x,a.z.y,b,c\r\né,2,1,\r\n,,,\r\n".encode()
    with pytest.raises(RowsError, match=r"out\.xml: unknown kind of file \(wanted \.csv, \.jsonl or \.parquet\)"):
        write_rows(rows, tmp_path / "out.xml")


def test_parquet_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The import system treats None like a package that is not installed.
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        RowsError, match=r"out\.parquet: Parquet needs pandas and pyarrow: .*install.* pandas pyarrow"
    ):
        write_rows([{"a": 1}], tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_equal_environments_are_kept_once(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    first = store.add_environment({"kernel": "6.18", "cores": 2})
    assert store.add_environment({"cores": 2, "kernel": "6.18"}) == first
    assert store.add_environment({"kernel": "6.12", "cores": 2}) != first
    assert store.environments()[first]["kernel"] == "6.18"
    assert len(store.environments()) == 2


def test_csv_flattens_nested_values(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([{"cell": "a", "cold": {"cache_bytes": 0}}, {"cell": "b", "total_s": 1.0}])
    with store.write_csv().open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0] == {"cell": "a", "cold.cache_bytes": "0", "total_s": ""}
    assert rows[1]["total_s"] == "1.0"


def test_an_attempt_of_which_some_rows_were_stored_counts_for_nothing(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([{"cell": "a", "attempt": 1, "start": start} for start in ("cold", "warm", "warm")])
    whole = store.path.read_bytes()
    assert store.done_keys() == {"a"}
    # Cut at the end of each line but the last, and inside the last.
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 0x0A]
    for cut in [*ends[:-1], ends[-1] - 20]:
        store.path.write_bytes(whole[:cut])
        assert store.done_keys() == set()
        assert store.rows() == []


def test_a_torn_last_line_is_moved_aside_and_said(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([{"cell": "a", "attempt": 1}])
    store.add_environment({"kernel": "6.18"})
    assert store.mend() == []
    whole = store.path.read_bytes()
    for path in (store.path, tmp_path / "environments.jsonl"):
        with path.open("ab") as stream:
            stream.write(b'{"cell": "b", "att')
    said = store.mend()
    assert [path.split(":")[0] for path in said] == [str(store.path), str(tmp_path / "environments.jsonl")]
    assert "18 bytes, moved to rows.jsonl.torn" in said[0]
    assert store.path.read_bytes() == whole
    assert (tmp_path / "rows.jsonl.torn").read_bytes() == b'{"cell": "b", "att\n'
    assert store.mend() == []


def test_a_write_that_fails_leaves_nothing_of_an_attempt(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([{"cell": "a", "attempt": 1}])
    before = store.path.read_bytes()
    # The kernel's own limit: the write is cut short, then refused, as on a full disk.
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.append([{"cell": "b", "attempt": 2, "text": "x" * 50} for _ in range(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert store.path.read_bytes() == before


def test_what_is_no_text_is_an_error(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.path.write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(RowsError, match="not text"):
        store.rows()
