"""Parsing: instructions, continued lines, comments, exec forms, here-documents; refusals name file and line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.build.dockerfile import INSTRUCTIONS, BuildError, parse


def texts(source: str) -> list[tuple[str, str, str]]:
    return [(each.name, each.text, each.place) for each in parse(source.encode()).instructions]


def test_instructions_with_comments_and_continued_lines() -> None:
    source = (
        "# syntax=docker/dockerfile:1\n\nfrom a AS b\n# comment\nRUN one && \\\n  # in between\n\n  two\nEnv A=1 \\\n"
    )
    assert texts(source) == [
        ("FROM", "a AS b", "Dockerfile:3"),
        ("RUN", "one &&   two", "Dockerfile:5"),
        ("ENV", "A=1", "Dockerfile:9"),
    ]


def test_the_escape_directive() -> None:
    found = parse(b"# escape=`\nFROM a\nRUN dir C:\\ `\n x\n")
    assert found.escape == "`"
    assert found.instructions[1].text == "dir C:\\  x"


def test_an_escaped_escape_does_not_continue_a_line() -> None:
    assert [text for _, text, _ in texts("FROM a\nRUN echo \\\\\nCMD x")] == ["a", "echo \\\\", "x"]


def test_exec_form_and_what_only_looks_like_it() -> None:
    found = parse(b'FROM a\nRUN ["a b", "c"]\nRUN [ -f x ]\nRUN ["a", 1]\nENV ["a"]=1').instructions
    assert [each.words for each in found[1:]] == [("a b", "c"), None, None, None]


def test_flags() -> None:
    found = parse(
        b"FROM --platform=linux/amd64 a\nCOPY --from=b --chown=1:2 c d\nRUN --network=none echo --x"
    ).instructions
    assert found[1].flags == (("from", "b"), ("chown", "1:2"))
    assert (found[1].text, found[2].text) == ("c d", "echo --x")
    assert found[1].flag("chmod") == ""


def test_here_documents() -> None:
    source = "FROM a\nRUN <<EOF\none\n  two\nEOF\nCOPY <<-'X' /a\n\t$b\n\tX\nRUN echo 1 <<< 2\n"
    found = parse(source.encode()).instructions
    assert [(each.name, each.text, each.expands) for each in found[1].heredocs] == [("EOF", "one\n  two\n", True)]
    assert [(each.text, each.expands) for each in found[2].heredocs] == [("$b\n", False)]
    assert found[3].heredocs == ()
    quoted = parse(b"FROM a\nRUN echo \"a <<EOF b\" '<<EOF' x<<EOF\nCMD x").instructions
    assert [len(each.heredocs) for each in quoted] == [0, 0, 0]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("", "has no instructions"),
        ("FROM a\nONBUILD RUN x", "Dockerfile:2: instruction 'ONBUILD' is not supported"),
        ("FROM a\n\nRUM x", "Dockerfile:3: instruction 'RUM' is not supported"),
        ("FROM a\nRUN", "Dockerfile:2: RUN: wants an argument"),
        ("FROM a\nCOPY --From=x a b", "Dockerfile:2: COPY: malformed flag"),
        ("FROM a\nRUN <<EOF\nx", "Dockerfile:2: here-document without an end"),
        ("FROM a\nRUN x\nCOPY --parents a b", "Dockerfile:3: COPY: flag --parents is not supported"),
        ("FROM a\nRUN --mount=a --mount=b --network=a --network=b x", "flag --network is given twice"),
        ("FROM a\nRUN x\nENV a=1 b", "Dockerfile:3: ENV: got 'b', wanted name=value"),
        ("# escape=x\nFROM a", "Dockerfile:1: escape: got 'x'"),
        ("FROM a\0", "holds a zero byte"),
    ],
)
def test_refusals(source: str, error: str) -> None:
    with pytest.raises(BuildError) as caught:
        parse(source.encode())
    assert error in str(caught.value)


def test_not_utf8_and_too_large() -> None:
    with pytest.raises(BuildError, match="not UTF-8"):
        parse(b"FROM \xff")
    with pytest.raises(BuildError, match="too large"):
        parse(b"#" * (1 << 21))


@given(st.text(alphabet="FROMUNrun a$\\\n\"'[]<>E#=-{}", max_size=80))
def test_any_text_is_parsed_or_refused(source: str) -> None:
    try:
        found = parse(source.encode()).instructions
    except BuildError as error:
        assert str(error).startswith("Dockerfile")
        return
    assert found
    assert all(each.name in INSTRUCTIONS and each.text for each in found)
