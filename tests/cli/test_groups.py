"""The groups of commands: their help, their examples, commands that other packages add, and the cost of starting."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.cli.groups import GROUPS, SINGLE, Group
from obdlab.cli.main import build_parser, main
from tests.layers.golden import GOLDEN

LAYER = GOLDEN / "ext4" / "layer1.obd"

# An entry point's module, and the package that announces it.
_MODULE = """
from obdlab.cli.groups import Command
COMMAND = Command("renamed by the entry point", "say a word", "added_command:declare")
def declare(parser):
    parser.add_argument("word")
    parser.set_defaults(run=run)
def run(args):
    print(f"{args.prog}: {args.word}")
    return 7
"""


def help_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_help_is_a_map_of_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(capsys=capsys).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    for group in GROUPS:
        assert any(re.match(rf"  {group.name} +{re.escape(group.summary)}$", line) for line in lines)
        named = " ".join(lines)
        assert all(f" {command.name} " in f"{named} " for command in group.commands)
    for command in SINGLE:
        assert any(re.match(rf"  {command.name} +", line) for line in lines)


def test_without_a_command_the_map_is_printed_and_the_status_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "groups (obdlab GROUP --help" in capsys.readouterr().out


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_a_groups_help_lists_its_commands_and_shows_an_example(
    group: Group, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(group.name, capsys=capsys)
    assert max(map(len, text.splitlines())) <= 118
    for command in group.commands:
        assert re.search(rf"^ +{command.name} ", text, re.MULTILINE), command.name
    assert "\nexample: " in text
    joined = group.example.replace("\\\n", " ")
    commands = [line.strip() for line in joined.splitlines() if line.strip().startswith("obdlab ")]
    assert commands
    for line in commands:
        words = shlex.split(line)[1:]
        assert build_parser(words).parse_args(words).run is not None
        assert words[0] in {each.name for each in GROUPS}


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for group in GROUPS:
        for command in group.commands:
            text = help_of(group.name, command.name, capsys=capsys)
            assert text.startswith(f"usage: obdlab {group.name} {command.name} "), text[:80]
    for command in SINGLE:
        assert help_of(command.name, capsys=capsys).startswith(f"usage: obdlab {command.name} ")


# numpy alone takes longer than all else that --version needs.
def test_only_the_command_in_use_is_imported() -> None:
    script = "import sys; from obdlab.cli.main import build_parser; build_parser(sys.argv[1:]); print(*sys.modules)"
    loaded = {}
    for words in ((), ("--help",), ("image", "ls", "x:/")):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        loaded[words] = set(done.stdout.split())
    for words in ((), ("--help",)):
        assert not {"numpy", "tqdm", "grpc", "shtab", "obdlab.formats", "obdlab.settings"} & loaded[words]
        assert {name for name in loaded[words] if name.startswith("obdlab.cli.")} == {
            "obdlab.cli.groups",
            "obdlab.cli.main",
            "obdlab.cli.oldnames",
            "obdlab.cli.reporting",
        }
    of_images = {name for name in loaded["image", "ls", "x:/"] if name.startswith("obdlab.cli.image.")}
    assert "obdlab.cli.image.ls" in of_images
    assert not {"obdlab.cli.image.convert", "obdlab.cli.image.pull"} & of_images


def run_with(packages: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    command = [sys.executable, "-m", "obdlab", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def announce(packages: Path, name: str, line: str) -> None:
    facts = packages / f"{name}-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[obdlab.commands]\n{line}\n")


def test_a_package_adds_a_command_to_a_group(tmp_path: Path) -> None:
    (tmp_path / "added_command.py").write_text(_MODULE)
    announce(tmp_path, "added", "serve.added = added_command:COMMAND")
    done = run_with(tmp_path, "serve", "added", "hello")
    assert (done.returncode, done.stdout, done.stderr) == (7, "obdlab serve added: hello\n", "")
    assert re.search(r"^ +added +say a word$", run_with(tmp_path, "serve", "--help").stdout, re.MULTILINE)
    assert re.search(r"^ +snapshotter .* added\b", run_with(tmp_path, "--help").stdout, re.MULTILINE)
    assert "added" not in run_with(tmp_path, "image", "--help").stdout


def test_a_package_that_cannot_be_loaded_takes_no_other_command_away(tmp_path: Path) -> None:
    announce(tmp_path, "broken", "cache.broken = no_such_module:COMMAND")
    listed = run_with(tmp_path, "cache", "--help")
    assert listed.returncode == 0
    assert "verify" in listed.stdout
    assert "obdlab.commands: cache.broken: cannot be imported (no_such_module:COMMAND)" in listed.stderr
    done = run_with(tmp_path, "cache", "list", "--json", "--cache-dir", str(tmp_path / "none"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
