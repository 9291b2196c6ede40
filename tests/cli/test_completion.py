"""Completion in real shells: the scripts of ``obdlab completion``, and what the shells offer with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.cli.completion import SHELLS
from tests.capabilities import require

# What a user has typed, and words that the shell must offer for the last one.
TYPED = {
    "obdlab ser": ["serve"],
    "obdlab image con": ["convert", "convert-list"],
    "obdlab layer inspect --ver": ["--verify"],
    "obdlab image convert --fs e": ["erofs", "ext4"],
    "obdlab lab dataset pu": ["push"],
    "obdlab layer commit my-lay": ["my-layer.obd"],
    "obdlab device mount my-": ["my-directory", "my-layer.obd"],
    "obdlab image convert --work-dir my-d": ["my-directory"],
}

# $1: directory of the script, $2: what was typed, $3: what to wait for.
_ZSH = """
zmodload zsh/zpty
zpty child zsh -f -i
zpty -w child "PROMPT=; fpath=($1 \\$fpath); autoload -U compinit; compinit -u -D; setopt no_beep; echo ready"
zpty -r -m child out '*ready*'
zpty -w -n child "$2"$'\\t\\t'
zpty -r -m child out "*$3*"
print -r -- "$out"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a layer, a directory, and the shells' scripts below "scripts"."""
    require("shells")
    place = tmp_path_factory.mktemp("completion")
    (place / "my-layer.obd").touch()
    (place / "my-directory").mkdir()
    (place / "scripts").mkdir()
    for shell in SHELLS:
        done = subprocess.run([sys.executable, "-m", "obdlab", "completion", shell], capture_output=True, check=True)
        (place / "scripts" / ("_obdlab" if shell == "zsh" else f"obdlab.{shell}")).write_bytes(done.stdout)
    return place


def output(place: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("typed", TYPED)
def test_bash_completes(typed: str, place: Path) -> None:
    words = typed.split()
    script = """
    source scripts/obdlab.bash
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
    _shtab_obdlab obdlab "${!#}" "${COMP_WORDS[COMP_CWORD - 1]}"
    printf "%s\\n" "${COMPREPLY[@]}"
    """
    offered = output(place, "bash", "--norc", "-c", script, "bash", *words).split()
    assert [word.removesuffix("/") for word in sorted(offered)] == sorted(TYPED[typed])
    assert "complete -F _shtab_obdlab obdlab" in output(
        place, "bash", "--norc", "-c", "source scripts/obdlab.bash; complete -p obdlab"
    ).replace("-o bashdefault ", "")


@pytest.mark.parametrize("typed", TYPED)
def test_fish_completes(typed: str, place: Path) -> None:
    script = f"source scripts/obdlab.fish; complete -C '{typed}'"
    offered = [
        line.split("\t")[0].rstrip("/") for line in output(place, "fish", "--no-config", "-c", script).splitlines()
    ]
    assert sorted(offered) == sorted(TYPED[typed])


@pytest.mark.parametrize("typed", TYPED)
def test_zsh_completes(typed: str, place: Path) -> None:
    for word in TYPED[typed]:
        offered = output(place, "zsh", "-f", "-c", _ZSH, "zsh", str(place / "scripts"), typed, word)
        assert word in offered  # the terminal of a child: the typed line, then what zsh offers


def test_another_shell_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "obdlab", "completion", "tcsh"], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"choose from 'bash', 'zsh', 'fish'" in done.stderr
