"""Commands in shell scripts, and names in configurations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.traces.scripts import commands_in, names_in, search_paths, unwrapped


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("redis-server /etc/redis.conf &\n", [["redis-server", "/etc/redis.conf"]]),
        ("# install nothing\nset -e; cd /srv; exec gosu app server \\\n  --x", [["gosu", "app", "server", "--x"]]),
        ("if ! id app; then A=1 make; fi", [["id", "app"], ["make"]]),
        (". /etc/envvars\n", [["source", "/etc/envvars"]]),
        ("x=$(date +%s)\n", [["date", "+%s"]]),
        ("echo one | sort\n", [["sort"]]),
        ("a 'open\n", [["a", "open"]]),
        ("$SERVER run\n", []),
    ],
)
def test_commands_are_found_where_they_may_begin(text: str, found: list[list[str]]) -> None:
    listed = commands_in(text)
    for each in found:
        assert each in listed or each in [words[1:] for words in listed], listed
    if not found:
        assert not listed


def test_wrappers_run_what_they_are_given() -> None:
    assert ["gosu", "app", "server"] in unwrapped(["env", "-i", "A=1", "gosu", "app", "server"])
    assert ["server"] in [words[-1:] for words in unwrapped(["tini", "--", "server"])]
    assert unwrapped(["server", "x"]) == [["server", "x"]]


def test_names_are_absolute_or_have_a_dot_or_slash() -> None:
    text = b"include mime.types;\n# /not/this\nroot /srv/www;\nuser nobody 1.2.3;\nload mods/*.load\n"
    assert list(names_in(text)) == [b"mime.types", b"/srv/www", b"mods/*.load"]


def test_paths_that_a_script_adds() -> None:
    assert search_paths('PATH=/opt/bin:$PATH\nexport PATH="/a:b"\n') == ["/opt/bin", "/a"]


@given(st.text(max_size=400))
def test_any_text_ends(text: str) -> None:
    for words in commands_in(text):
        assert unwrapped(words)
    list(names_in(text.encode(errors="replace")))
