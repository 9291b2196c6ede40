"""Values of shell variables without running the script, against what a shell says."""

from __future__ import annotations

import subprocess
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from obdlab.traces import shellvariables
from obdlab.traces.scripts import MAX_TEXT, commands_in
from obdlab.traces.shellvariables import Variables, closing, raw_words, word_end


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("plain", ["plain"]),
        ("'$HOME'", ["$HOME"]),
        ('"a b"c', ["a bc"]),
        (r"\$HOME", ["$HOME"]),
        ('"it\'s"', ["it's"]),
        ("$HOME/bin", ["/srv/bin"]),
        ("${HOME}bin", ["/srvbin"]),
        ("$NEVER/x", ["/x"]),
        ("${NEVER:-/opt}/x", ["/opt/x"]),
        ("${NEVER-${HOME}}/x", ["/srv/x"]),
        ("${HOME:-/opt}/x", ["/srv/x"]),
        ("${HOME:+set}", ["set"]),
        ("${NEVER:+set}", [""]),
        ("${HOME:?missing}", ["/srv"]),
        ("${PROGRAM%/*}", ["/usr/lib/app/bin"]),
        ("${PROGRAM##*/}", ["app.sh"]),
        ("${PROGRAM%.sh}", ["/usr/lib/app/bin/app"]),
        ("${PROGRAM#/usr}", ["/lib/app/bin/app.sh"]),
        ("${PROGRAM%[a-z]*}", []),
        ("$(dirname $PROGRAM)", ["/usr/lib/app/bin"]),
        ('"$(dirname "$PROGRAM")/../lib"', ["/usr/lib/app/bin/../lib"]),
        ('`dirname "$PROGRAM"`', ["/usr/lib/app/bin"]),
        ("$(basename $PROGRAM)", ["app.sh"]),
        ("$(readlink -f $PROGRAM)", ["/usr/lib/app/bin/app.sh"]),
        ('$(cd "$(dirname "$PROGRAM")/.." && pwd)', ["/usr/lib/app"]),
        ("$(command -v app)", ["app"]),
        ("$(date +%s)", []),
        ("$(echo $PROGRAM | sed s/app//)", []),
        ("$1", []),
        ('"$@"', []),
        ("$((1 + 2))", []),
        ("${#HOME}", []),
        ("${", []),
        ("$", ["$"]),
        ("a'open", ["aopen"]),
    ],
)
def test_words(word: str, values: list[str]) -> None:
    assert Variables({"HOME": "/srv", "PROGRAM": "/usr/lib/app/bin/app.sh"}).expanded(word) == values


@pytest.mark.parametrize(
    "word",
    ["${A:-x}", "${B:-$A}", "$A/${B-c}", "'$A'\"$A\"", r"\"$A\"", "${A%/*}", "${A##*/}", "$(dirname $A)", "${B:+x}y"],
)
def test_a_shell_gives_the_same_value(word: str) -> None:
    said = subprocess.run(["sh", "-c", f"A=/one/two; printf %s {word}"], capture_output=True, text=True, check=True)
    assert Variables({"A": "/one/two"}).expanded(word) == [said.stdout]


def test_values_of_branches_stay_possible_and_those_of_the_environment_come_first() -> None:
    variables = Variables({"HOME": "/srv"})
    for word in ("/a", "/b", "$(unknown)", "/c", "/d", "/e"):
        variables.assign("PLACE", word)
    assert variables.values("PLACE") == ("/e", "/d", "/c", "/b")
    variables.assign("HOME", "/root")
    assert variables.values("HOME") == ("/srv", "/root")
    variables.assign("OUTPUT", "$(unknown)")
    assert variables.values("OUTPUT") == ()
    assert variables.expanded("$OUTPUT/bin") == []
    assert variables.environment() == {"HOME": "/srv", "PLACE": "/e"}


def test_a_default_is_assigned_once() -> None:
    variables = Variables({})
    assert variables.expanded(": ${PLACE:=/opt}") == [": /opt"]
    assert variables.expanded("${PLACE:=/other}") == ["/opt"]


def test_words_end_where_a_shell_ends_them() -> None:
    assert raw_words("one 'two three' \"$(four \"five six\")\" ${x:-a b} `c d` >out more") == [
        "one", "'two three'", '"$(four "five six")"', "${x:-a b}", "`c d`",
    ]  # fmt: skip
    assert raw_words("a;b") == ["a"]
    assert closing("(a(b)c)d", 0) == 7
    assert closing("{open", 0) == 5
    assert word_end("'open", 0) == 5


@given(st.text(alphabet="ab$\"'`\\(){}:-=%#/* \n;", max_size=80))
@example("${" * 20)
@example("$(" * 20)
@example("`'`\"`")
def test_any_text_has_few_bounded_values(text: str) -> None:
    variables = Variables({"a": "/x", "b": "1 2"})
    for _ in range(3):
        variables.assign("a", text)
    values = variables.expanded(text)
    assert len(values) <= 8
    assert 0 <= word_end(text, 0) <= len(text)
    assert all(len(value) <= 4096 for value in (*values, *variables.values("a")))


@pytest.mark.parametrize(
    "text",
    [
        "a=$a$a;" * 20_000,
        "A=\"$A$B$C\";B=\"$B$A$C\";C=\"$C$A\"\n" * 4000,
        "(\"" * 60_000,
        "${" * 60_000,
        "`" * 120_000,
        "x=$(y=$(" * 16_000,
        ("a" * 4000 + "=$a\n") * 30,
        "for a in $a $a $a; do\n" * 6000,
        ": ${a:=$a}\n" * 10_000,
    ],
)  # fmt: skip
def test_the_work_for_hostile_scripts_is_bounded(text: str) -> None:
    variables = Variables({"a": "x" * 5000, "A": "1", "B": "2", "C": "3"})
    began_s = time.process_time()
    assert len(list(commands_in(text[:MAX_TEXT], variables))) <= 256
    # No benchmark: without a bound these take minutes and more memory than there is.
    assert time.process_time() - began_s < 60
    assert len(variables.environment()) <= 1024


def test_long_values_cost_more_steps() -> None:
    variables = Variables({})
    for each in "abcd":
        variables.assign("A", each * 4096)
    assert variables.expanded("a") == ["a"]
    for _ in range(50):
        variables.expanded("$A" * 900)
    assert variables.expanded("a") == []


def test_nothing_is_followed_once_the_steps_are_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shellvariables, "MAX_STEPS", 10)
    assert Variables({}).expanded("a" * 100) == []
    assert not list(commands_in("server --with-a-long-command-line\n", Variables({})))
