"""Tables of documents: each value checked by type, each error naming document, key and wanted value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from obdlab.plain import Table


class WrongError(Exception):
    pass


def table(**values: Any) -> Table:
    return Table(values, "f.json", WrongError)


def test_values_of_a_table() -> None:
    found = table(
        text=" a ", count=3, on=True, where="/a", places=["/a", "/b"], inner={"x": 1}, many=[{"x": 1}, {}], none=None
    )
    assert found.text("text") == "a"
    assert found.number("count", least=3, most=3) == 3
    assert found.get("on", bool) is True
    assert found.path("where") == Path("/a")
    assert found.paths("places") == (Path("/a"), Path("/b"))
    assert found.table("inner").get("x", int) == 1
    assert [each.get("x", int, 0) for each in found.tables("many")] == [1, 0]
    assert found.word("text", ("b", "a")) == "a"


@pytest.mark.parametrize("key", ["missing", "none"])
def test_a_missing_key_and_null_are_the_same(key: str) -> None:
    found = table(none=None)
    assert (found.text(key), found.get(key, int, 7), found.number(key, least=8, most=9)) == ("", 7, None)
    assert found.path(key) is None
    assert found.paths(key, (Path("/x"),)) == (Path("/x"),)
    assert found.table(key).values == {}
    assert found.tables(key) == []
    assert found.word(key, ("first", "second")) == "first"


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda found: found.get("n", str), "f.json: n: wrong value (got 5, wanted a string)"),
        (
            lambda found: found.number("n", least=1, most=4),
            "f.json: n: wrong value (got 5, wanted a number from 1 to 4)",
        ),
        (
            lambda found: found.number("n", least=6, most=9),
            "f.json: n: wrong value (got 5, wanted a number from 6 to 9)",
        ),
        (lambda found: found.word("t", ("a", "b")), "f.json: t: wrong value (got 'x', wanted one of a, b)"),
        (lambda found: found.path("t"), "f.json: t: wrong value (got 'x', wanted an absolute path)"),
        (lambda found: found.paths("p"), "f.json: p: wrong value (got ['/a', 'b'], wanted a list of absolute paths)"),
        (lambda found: found.table("n"), "f.json: n: wrong value (got 5, wanted an object)"),
        (lambda found: found.tables("n"), "f.json: n: wrong value (got 5, wanted a list of objects)"),
        (lambda found: found.tables("p"), "f.json: p[0]: wrong value (got '/a', wanted an object)"),
        (lambda found: found.table("o").get("x", int), "f.json: o.x: wrong value (got 'y', wanted a whole number)"),
        (
            lambda found: found.tables("l")[1].get("x", int),
            "f.json: l[1].x: wrong value (got True, wanted a whole number)",
        ),
    ],
)
def test_wrong_values_are_named(read: Any, message: str) -> None:
    with pytest.raises(WrongError) as raised:
        read(table(n=5, t="x", p=["/a", "b"], o={"x": "y"}, l=[{}, {"x": True}]))
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"f: not JSON \("), ("[1]", r"f: not a JSON object \(got list\)"), ("[" * 100_000, r"f: not JSON \(")],
)
def test_documents_that_are_no_objects(text: str, message: str) -> None:
    with pytest.raises(WrongError, match=message):
        Table.of_json(text, "f", WrongError)


def test_long_values_are_cut() -> None:
    with pytest.raises(WrongError) as raised:
        table(n="x" * 1000).get("n", int)
    assert len(str(raised.value)) < 200
