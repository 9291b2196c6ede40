"""Variables and quotes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.build.expansion import ExpansionError, expand, expand_document, pairs, split

VARIABLES = {"a": "1", "empty": "", "x_y": "z"}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$a${a}b$x_y", "11bz"),
        ("${a:-w}${b:-w}${empty:-w}", "1ww"),
        ("${a-w}${b-w}${empty-w}", "1w"),
        ("${a:+w}${b:+w}${empty:+w}|${empty+w}", "w|w"),
        ("${b:-${a:-c}$a}", "11"),
        ("'$a'\"$a\"", "$a1"),
        (r"\$a \\ \"", r'$a \ "'),
        (r'"\$a \n"', r"$a \n"),
        ("$ $1 50%", "$ $1 50%"),
        ("${a:?must}", "1"),
        ("$missing", ""),
    ],
)
def test_forms(text: str, expanded: str) -> None:
    assert expand(text, VARIABLES) == expanded


@pytest.mark.parametrize("text", ["${", "${a", "${a#x}", "'a", '"a', "${b:?must be set}", "${b?}", "${a:", "${:-x}"])
def test_refused(text: str) -> None:
    with pytest.raises(ExpansionError):
        expand(text, VARIABLES)


def test_bounds() -> None:
    with pytest.raises(ExpansionError, match="more than"):
        expand("$a" * 20, {"a": "x" * 100_000})
    with pytest.raises(ExpansionError, match="nested"):
        expand("${b:-" * 100 + "}" * 100, {})


def test_documents_keep_quotes() -> None:
    assert expand_document("'$a' \"$a\" \\$a \\n", VARIABLES) == "'1' \"1\" $a \\n"


def test_words_and_pairs() -> None:
    assert split(r'a "b c" d\ e' + " 'f g'") == ["a", '"b c"', r"d\ e", "'f g'"]
    assert pairs('a=1 b="2 3" c=4\\ 5') == [("a", "1"), ("b", '"2 3"'), ("c", "4\\ 5")]
    assert pairs("name all of the rest") == [("name", "all of the rest")]
    for text in ("name", "a=1 b", "=1"):
        with pytest.raises(ExpansionError):
            pairs(text)


@given(st.text(alphabet="abc $'\"\\", max_size=30))
def test_quoting_gives_the_text_back(text: str) -> None:
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'
    assert expand(quoted, VARIABLES) == text
    assert split(quoted) == [quoted]


@given(st.text(alphabet="ab${}:-+?'\"\\ ", max_size=40))
def test_any_text_is_expanded_or_refused(text: str) -> None:
    try:
        expand(text, VARIABLES)
        split(text)
    except ExpansionError:
        pass
