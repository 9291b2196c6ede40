"""Every command line of obdlab in the docs is one that the program takes: names, options and kinds of values.

``tests/e2e/test_quick_start.py`` follows the tutorial for containers word by word, and other tests run what their
pages show; this test keeps the rest from naming commands that are gone.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from obdlab.cli.main import build_parser

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
# The reference of the command line is made from the parsers themselves; changes tell of names as they were.
_GENERATED = {"commands.md", "changes.md", "states.md"}
PAGES = sorted(
    path
    for path in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "experiments" / "README.md"]
    if path.name not in _GENERATED
)
_FENCE = re.compile(r"^( *)```([a-z]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}.*\S.*\n)+", re.MULTILINE)
_PROMPT = re.compile(r"^[\w.-]*[#$] ")
_COMMAND = re.compile(r"^(?:\w+=\$?\(?)?(?:\.venv/bin/)?(?=obdlab [^ ]+[^: ](?: |$|\)))")
# "a|b" and "..." stand for several command lines, and a diagram for none.
_NO_LINE = re.compile(r"\w\|\w|\.\.\.|─")


def command_lines(page: str) -> Iterator[str]:
    """Yield each command line of obdlab in a page's blocks, without prompt, comment and redirections."""
    blocks = [(match[2], match[3]) for match in _FENCE.finditer(page)]
    blocks += [("", match[0]) for match in _INDENTED.finditer(_FENCE.sub("", page))]
    for language, block in blocks:
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        if language == "console":  # the lines without a prompt are what commands print
            lines = [_PROMPT.sub("", line) for line in lines if _PROMPT.match(line)]
        for line in lines:
            for part in re.split(r"(?:&&|;) +", line.partition("   #")[0]):
                if (begin := _COMMAND.match(part)) and not _NO_LINE.search(part):
                    yield part[begin.end() :]


def words_of(line: str) -> list[str]:
    """Return the words of a command line after "obdlab", up to a comment, a redirection or a pipe."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|&")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in lexer:
        if word.startswith(("#", "<", ">", "|", "&")):
            break
        words.append(word.rstrip(")"))
    return words[1:]


def refuse(self: argparse.ArgumentParser, message: str) -> NoReturn:
    raise ValueError(f"{self.prog}: {message}")


def test_lines_are_found_in_blocks_alone() -> None:
    page = """
Text with `obdlab image ls X` and obdlab ls.

```console
# obdlab image ls oci:DIR:/etc   # a comment
obdlab lab: not a command but a line of its output
```
```
dev=$(obdlab device attach config.json --id disk); obdlab device list >out
mount x y
```

    obdlab device list     # in an indented block
"""
    lines = list(command_lines(page))
    assert [words_of(line) for line in lines] == [
        ["image", "ls", "oci:DIR:/etc"],
        ["device", "attach", "config.json", "--id", "disk"],
        ["device", "list"],
        ["device", "list"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_are_taken(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    wrong = []
    for line in command_lines(page.read_text()):
        words = words_of(line)
        try:
            build_parser(words).parse_args(words)
        except (ValueError, argparse.ArgumentError) as error:
            wrong.append(f"{line}\n    {error}")
        except SystemExit as ended:  # --help and --version
            assert ended.code == 0, line
    assert not wrong, "\n".join(wrong)


def test_the_pages_have_command_lines() -> None:
    assert sum(len(list(command_lines(page.read_text()))) for page in PAGES) > 80
