from __future__ import annotations

import csv
import json
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
