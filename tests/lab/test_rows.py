from __future__ import annotations

import csv
import json
import resource
import signal
from pathlib import Path

import pytest

from obdlab.lab.rows import RowsError, RowStore


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
