""".dockerignore: the last matching pattern decides."""

from __future__ import annotations

import pytest

from obdlab.build.dockerfile import BuildError
from obdlab.build.ignorefile import Ignored


@pytest.mark.parametrize(
    ("patterns", "left_out", "seen"),
    [
        ("*.log", ["a.log"], ["a.txt", "d/a.log", "a.log.gz"]),
        ("**/*.log", ["a.log", "d/e/a.log"], ["a.txt"]),
        ("/d/", ["d", "d/a", "d/e/f"], ["x/d", "dd"]),
        ("d/**", ["d/a", "d/e/f"], ["d"]),
        ("*\n!a*\nab", ["b", "ab"], ["a", "ac"]),
        ("a?c\n[x-z]1\n[^0-9]x", ["abc", "y1", "ax"], ["ac", "a/c", "w1", "5x"]),
        ("# comment\n\n  b  ", ["b"], ["# comment"]),
        ("a\\*", ["a*"], ["ab"]),
        # As in BuildKit, a pattern that could not change the result for a directory is not inherited from it.
        ("d/**\n!*", ["d/a"], ["d", "a"]),
        ("d\n!*", [], ["d", "d/a"]),
        ("./x/../d", ["d"], ["x"]),
    ],
)
def test_patterns(patterns: str, left_out: list[str], seen: list[str]) -> None:
    ignored = Ignored.parse(patterns.encode())
    assert [path for path in left_out if path not in ignored] == []
    assert [path for path in seen if path in ignored] == []


@pytest.mark.parametrize("pattern", ["!", "[a", "*" * 40])
def test_malformed(pattern: str) -> None:
    with pytest.raises(BuildError, match=r"\.dockerignore:2: "):
        Ignored.parse(f"a\n{pattern}\n".encode())


def test_exceptions_are_known() -> None:
    assert Ignored.parse(b"a\n!a/b").has_exceptions
    assert not Ignored.parse(b"a").has_exceptions
