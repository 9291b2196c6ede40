"""Commands in shell scripts, and names in configurations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.traces.scripts import commands_in, names_in, unwrapped
from obdlab.traces.shellvariables import Variables


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
        ("$SERVER run\n", [["run"]]),  # as a shell does, if it was never set
        ("SERVER=$(find . -name server)\n$SERVER run\n", [["find", ".", "-name", "server"]]),
        ('HOME_DIR=/opt/app\nexec "$HOME_DIR/bin/app" --port 1\n', [["exec", "/opt/app/bin/app", "--port", "1"]]),
        ('X=/a; if t; then X=/b; fi; exec "$X/p"\n', [["exec", "/b/p"], ["exec", "/a/p"]]),
        ('exec ${debugger} "$X" "$@"\n', [["exec"]]),
        (
            'J=/jvm; eval exec "\\"$J/bin/java\\"" -cp "$J/a:$J/b"\n',
            [["eval", "exec", "/jvm/bin/java", "-cp", "/jvm/a:/jvm/b"]],
        ),
        (': "${D:=/srv}"\n. "$D/env.sh"\n', [["source", "/srv/env.sh"]]),
        ("export A=/a B=$A/b\n$B/run\n", [["/a/b/run"]]),
        ("for each in /a /b; do $each/run; done\n", [["/a/run"], ["/b/run"]]),
        ("O='-jar /x.jar'\njava $O\n", [["java", "-jar", "/x.jar"]]),
        ("S='a b'\nsh -c \"$S\"\n", [["sh", "-c", "a b"]]),
        ("P=/opt\nP+=/more\n$P/run\n", [["/opt/more/run"]]),
    ],
)
def test_commands_are_found_where_they_may_begin(text: str, found: list[list[str]]) -> None:
    listed = list(commands_in(text))
    for each in found:
        assert each in listed or each in [words[1:] for words in listed], listed
    if not found:
        assert not listed


def test_an_expansion_is_no_group_of_commands() -> None:
    assert list(commands_in(": ${ARCH=}\nexec /lib$ARCH/program\n")) == [["exec", "/lib/program"]]


def test_wrappers_run_what_they_are_given() -> None:
    assert ["gosu", "app", "server"] in unwrapped(["env", "-i", "A=1", "gosu", "app", "server"])
    assert ["server"] in [words[-1:] for words in unwrapped(["tini", "--", "server"])]
    assert unwrapped(["server", "x"]) == [["server", "x"]]


def test_names_are_absolute_or_have_a_dot_or_slash() -> None:
    text = b"include mime.types;\n# /not/this\nroot /srv/www;\nuser nobody 1.2.3;\nload mods/*.load\n"
    assert list(names_in(text)) == [b"mime.types", b"/srv/www", b"mods/*.load"]


def test_a_script_adds_to_the_search_path_and_knows_its_own_path() -> None:
    variables = Variables({"PATH": "/usr/bin"})
    variables.name_script("/opt/app/bin/start.sh")
    text = 'HERE=$(cd "$(dirname "$0")" && pwd)\nexport PATH="$HERE:$PATH"\nexec ./server\n'
    assert ["exec", "./server"] in list(commands_in(text, variables))
    assert "/opt/app/bin:/usr/bin" in variables.values("PATH")


def test_what_a_sourced_file_assigns_is_known_behind_it() -> None:
    variables = Variables({})
    found = []
    for words in commands_in(". ./env\nexec $SERVER\n", variables):
        if words[0] == "source":
            list(commands_in("SERVER=/opt/server\n", variables))
        found.append(words)
    assert found == [["source", "./env"], ["exec", "/opt/server"]]


@given(st.text(max_size=400))
def test_any_text_ends(text: str) -> None:
    for words in commands_in(text):
        assert unwrapped(words)
    list(names_in(text.encode(errors="replace")))
