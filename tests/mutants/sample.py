"""The mutants of a room, sampled by seed: where cosmic-ray's operators apply, less places that no test can notice.

Positions are sampled, then one operator for each: comparisons and arithmetic have ten operators a place, and would
crowd out the rest otherwise.
"""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

#: Sources and the tests that are run for them, by room. Paths end in "/" for folders.
ROOMS: dict[str, tuple[str, ...]] = {
    "formats": ("obdlab/formats/",),
    "layers": ("obdlab/layers/",),
    "cache": ("obdlab/cache/",),
    "registry": ("obdlab/registry/",),
    "ext4": ("obdlab/volumes/ext4/",),
    "erofs": ("obdlab/volumes/erofs/",),
    "convert": ("obdlab/convert/",),
    "devices": ("obdlab/devices/",),
    "snapshotter": ("obdlab/snapshotter/",),
    "statistics": (
        "obdlab/lab/run/statistics.py",
        "obdlab/lab/run/summary.py",
        "obdlab/lab/run/rows.py",
        "obdlab/lab/paper/verdicts.py",
        "obdlab/lab/paper/claims.py",
        "obdlab/lab/paper/questions.py",
        "obdlab/lab/paper/results.py",
        "obdlab/lab/paper/ledger.py",
    ),
}

# These need arguments that cosmic-ray cannot guess.
_LEFT_OUT = ("VariableReplacer", "VariableInserter")
# Removing or changing one of these changes nothing that runs (a dataclass that is not frozen works as well).
_DECORATORS = (
    "dataclass",
    "abstractmethod",
    "override",
    "overload",
    "runtime_checkable",
    "lru_cache",
    "cache",
    "final",
)
_LOGGING = ("debug", "info", "warning", "error", "exception", "log")


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    operator: str
    #: Which of the operator's places in the file.
    occurrence: int
    line: int

    def source(self, root: Path) -> str:
        """Return the file's text with the change."""
        text = (root / self.file).read_text()
        changed = mutate_code(text, cosmic_ray.plugins.get_operator(self.operator)(), self.occurrence)
        if changed is None:
            raise ValueError(f"{self}: no such place")
        return str(changed)

    def change(self, root: Path) -> dict[str, str]:
        """Return the first changed line before and after, without indentation."""
        before = (root / self.file).read_text().splitlines()
        after = self.source(root).splitlines()
        for was, now in zip(before, after, strict=False):
            if was != now:
                return {"was": was.strip(), "now": now.strip()}
        return {"was": "", "now": ""}


def files_of(room: str, root: Path) -> list[str]:
    """Return the room's sources, sorted, relative to the root."""
    found: list[str] = []
    for place in ROOMS[room]:
        found += (
            [str(path.relative_to(root)) for path in sorted((root / place).rglob("*.py"))]
            if (place.endswith("/"))
            else [place]
        )
    return [name for name in found if "/_pb/" not in name]


def sample(room: str, root: Path, *, seed: int, count: int) -> list[Mutant]:
    """Draw ``count`` mutants of the room, each of another place."""
    places: list[list[Mutant]] = []
    for name in files_of(room, root):
        places += _places(name, (root / name).read_text())
    chooser = random.Random(f"{room} {seed}")
    chooser.shuffle(places)
    found: list[Mutant] = []
    for alternatives in places:
        mutant = chooser.choice(alternatives)
        if _is_another_program(mutant, root):
            found.append(mutant)
        if len(found) == count:
            break
    return found


# Operators read text: some make no program ("*" before keyword arguments becomes "**"), some change nothing, and the
# one for exceptions fails with AttributeError at a name with a dot.
def _is_another_program(mutant: Mutant, root: Path) -> bool:
    try:
        return ast.dump(ast.parse(mutant.source(root))) != ast.dump(ast.parse((root / mutant.file).read_text()))
    except (SyntaxError, AttributeError):
        return False


def _places(name: str, text: str) -> list[list[Mutant]]:
    silent = _silent_places(ast.parse(text))
    nodes = list(ast_nodes(get_ast(text)))
    found: dict[tuple[object, object], list[Mutant]] = defaultdict(list)
    for operator_name in sorted(cosmic_ray.plugins.operator_names()):
        if operator_name.endswith(_LEFT_OUT):
            continue
        operator = cosmic_ray.plugins.get_operator(operator_name)()
        occurrence = 0
        for node in nodes:
            for start, stop in operator.mutation_positions(node):
                if not any(first <= start and stop <= last for first, last in silent):
                    found[start, stop].append(Mutant(name, operator_name, occurrence, start[0]))
                occurrence += 1
    return [found[key] for key in sorted(found, key=repr)]


# Annotations are never evaluated, log lines are for people, and decorators of the kinds above do nothing.
def _silent_places(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    silent: list[ast.expr | ast.stmt | None] = []
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                silent += [argument.annotation for argument in arguments]
                silent.append(node.returns)
                silent += [each for each in node.decorator_list if _name_of(each) in _DECORATORS]
            case ast.ClassDef():
                silent += [each for each in node.decorator_list if _name_of(each) in _DECORATORS]
            case ast.AnnAssign():
                silent.append(node.annotation)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Expr(value=ast.Constant()):
                silent.append(node)
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr=attribute))) if attribute in _LOGGING:
                silent.append(node)
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)) for node in silent if node
    ]


def _name_of(decorator: ast.expr) -> str:
    return ast.unparse(decorator).split("(")[0].split(".")[-1]
