"""Comments, docstrings, docs and texts of commands name the actor: wordings that hide it may only become fewer."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: A wording, and how to say it instead.
WORDINGS = {
    "who ..., whoever ...": r"\b[Ww]ho(?:ever)?\b",
    "what ..., whatever ... as a subject or object": (
        r"(?:^|[.;:,(] ?|\b(?:of|for|to|in|with|by|from|is|and|than|as) )[Ww]hat(?:ever)?\b"
    ),
    "is none (malformed, missing, not a ...)": r"\b(?:is|are|was|be|than|that|of|has) none\b",
    "told, tells (logged, reported, configured, Return True if)": r"\b(?:told|tells?|telling)\b",
    "anew (again)": r"\banew\b",
    "nobody, somebody, anybody (name the process, thread or user)": r"\b(?:[Nn]o|[Ss]ome|[Aa]ny|[Ee]very)body\b",
    "that is so": r"\bthat is so\b",
}
#: How often each part still has one. Lower a number when you mend some; never raise it.
MOST = {"obdlab": 2, "docs": 6, "the command line": 0}


def _python(path: Path) -> Iterator[str]:
    text = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


# Help, errors and other output: all strings with a blank in them, docstrings apart.
def _strings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
        if isinstance(value, str) and " " in value:
            yield value


def _texts(part: str) -> Iterator[tuple[Path, str]]:
    if part == "docs":
        for path in [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("experiments/**/*.md")]:
            yield path, re.sub(r"(?ms)^```.*?^```", "", path.read_text())  # commands and what they print stay
        return
    if part == "the command line":
        for path in [*ROOT.glob("obdlab/cli/**/*.py"), *ROOT.glob("obdlab/contrib/**/command.py")]:
            for text in _strings(path):
                yield path, text
        return
    for path in sorted((ROOT / part).rglob("*.py")):
        if "_pb" not in path.parts:
            for text in _python(path):
                yield path, text


@pytest.mark.parametrize("part", MOST)
def test_wordings_that_hide_the_actor(part: str) -> None:
    found: Counter[str] = Counter()
    examples = []
    for path, text in _texts(part):
        for wording, pattern in WORDINGS.items():
            begins = {text.rfind("\n", 0, hit.end()) + 1 for hit in re.finditer(pattern, text)}
            found[wording] += len(begins)
            for begin in sorted(begins):
                line = text[begin:].partition("\n")[0]
                examples.append(f"{path.relative_to(ROOT)}: {line.strip()[:100]}  <- {wording}")
    summary = f"{found.total()} in {part}, at most {MOST[part]}"
    assert found.total() <= MOST[part], "\n".join([*examples[:40], summary])
