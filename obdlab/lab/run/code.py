"""Which code measured a row: a digest of the modules that a kind of experiment measures.

The digest covers what the kind's bench reaches by imports or by names of modules, and the programs that it starts;
not the engine, reports, figures, the paper's claims or, but for pulls, the command line. It hashes syntax trees, one
top-level statement at a time and in no order, without comments, docstrings, places of imported modules and texts of
raised errors; of a module in C, the lines without comments. So prose, and moves of whole functions and classes
between modules, leave it as it is. It takes about 2 s.

``data/codes.json`` maps digests of all files, which rows carried before, to this digest of the same code.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import obdlab
from obdlab.lab.kinds import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

#: Rooms that are not measured, though the bench imports from them.
NOT_MEASURED = (
    "obdlab.cli",
    "obdlab.lab.images",
    "obdlab.lab.kinds.kind",
    "obdlab.lab.paper",
    "obdlab.lab.paths",
    "obdlab.lab.run",
    "obdlab.lab.show",
    "obdlab.lab.workbench",
)
#: Modules of these rooms that are measured all the same: a pull is measured as its users call it.
MEASURED = ("obdlab.cli.entry", "obdlab.cli.image.pull", "obdlab.cli.prefork")
#: Modules that start programs of obdlab, each with the modules that those programs run.
PROGRAMS = {
    "obdlab.lab.testbed.containerd": (
        "obdlab.cli.entry",
        "obdlab.cli.image.pull",
        "obdlab.cli.prefork.asking",
        "obdlab.cli.prefork.forkserver",
        "obdlab.pull.rpull",
        "obdlab.snapshotter.service",
    ),
    "obdlab.server.client": ("obdlab.server.host",),
}


@functools.cache
def code_digest(kind: str) -> str:
    """Return the digest of the installed code that a kind of experiment measures."""
    measures = KINDS[kind]
    return digest_of(Path(obdlab.__file__).parent, measures.measured or (type(measures).__module__,))


def older_codes(kind: str, digest: str) -> tuple[str, ...]:
    """Return the digests of all files under which rows of the same code were stored before."""
    known: dict[str, dict[str, str]] = json.loads(
        resources.files("obdlab.lab").joinpath("data/codes.json").read_text()
    )
    return tuple(old for old, kinds in known.items() if kinds.get(kind) == digest)


def digest_of(
    package: Path,
    roots: Iterable[str],
    not_measured: Sequence[str] = NOT_MEASURED,
    programs: Mapping[str, Sequence[str]] = PROGRAMS,
) -> str:
    """Return the digest of the modules below ``package`` that ``roots`` reach. Raises SyntaxError and OSError."""
    found = {digest for module in reached(package, roots, not_measured, programs) for digest in module.digests}
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]


def reached(
    package: Path, roots: Iterable[str], not_measured: Sequence[str], programs: Mapping[str, Sequence[str]]
) -> list[Module]:
    """Return the modules that ``roots`` reach by imports, themselves included, without those not measured."""
    found: dict[str, Module] = {}
    pending = list(roots)
    while pending:
        name = pending.pop()
        if name in found or (_is_in(name, not_measured) and not _is_in(name, MEASURED)):
            continue
        found[name] = module = _module(package, name)
        pending += [*module.imports, *programs.get(name, ())]
    return list(found.values())


def _is_in(name: str, rooms: Iterable[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


# Kinds share most modules, and an evaluation runs several kinds.
@functools.cache
def _module(package: Path, name: str) -> Module:
    return Module(package, name)


class Module:
    """A module's statements as digests, and the modules that it imports."""

    def __init__(self, package: Path, name: str) -> None:
        self.name = name
        self._package = package
        path = self._path(name)
        if path is None:
            raise FileNotFoundError(f"{name}: no such module below {package}")
        #: Modules of the package that this one imports.
        self.imports: set[str] = set()
        if path.suffix == ".c":
            text = " ".join(_C_COMMENT.sub(" ", path.read_text()).split())
            self.digests = {hashlib.sha256(text.encode()).hexdigest()}
            return
        tree = ast.parse(path.read_bytes())
        # What an imported name stands for: never the place of a module of the package.
        self._origins: dict[str, str] = {}
        for node in _run(tree):
            if isinstance(node, ast.Import):
                self._import(node)
            elif isinstance(node, ast.ImportFrom):
                self._import_from(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
                # A module that is loaded by its name at run time.
                self.imports |= {node.value} if self._path(node.value) is not None else set()
        #: Digests of the top-level statements, without imports and bare texts.
        self.digests = {
            hashlib.sha256(self._text(statement).encode()).hexdigest()
            for statement in tree.body
            if not _says_nothing(statement)
        }

    def _import(self, node: ast.Import) -> None:
        for alias in node.names:
            inside = self._path(alias.name) is not None
            if inside:
                self.imports.add(alias.name)
            self._origins[alias.asname or alias.name.partition(".")[0]] = (
                "obdlab" if inside else alias.name if alias.asname else alias.name.partition(".")[0]
            )

    def _import_from(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        for alias in node.names:
            full = f"{base}.{alias.name}"
            if self._path(full) is not None:
                self.imports.add(full)
                origin = "module"
            elif self._path(base) is not None:
                self.imports.add(base)
                origin = alias.name
            else:
                origin = full
            self._origins[alias.asname or alias.name] = origin

    def _path(self, name: str) -> Path | None:
        top, *parts = name.split(".")
        if top != self._package.name or not name.replace(".", "").isidentifier():
            return None
        place = self._package.joinpath(*parts)
        forms = (place / "__init__.py", place.with_suffix(".py"), place.with_suffix(".c"))
        return next((path for path in forms if path.is_file()), None)

    def _text(self, node: object) -> str:
        if isinstance(node, list):
            return f"[{','.join(self._text(each) for each in node if not _says_nothing(each))}]"
        if isinstance(node, ast.Name):
            return f"Name({self._origins.get(node.id, node.id)})"
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            return f"Raise({self._text(node.exc.func)})"
        if isinstance(node, ast.AST):
            # Fields without a value differ between versions of Python.
            values = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
            parts = (f"{name}={self._text(value)}" for name, value in values if name not in _NO_FIELDS)
            return f"{type(node).__name__}({','.join(parts)})"
        if isinstance(node, str):
            return repr(_MODULE_NAME.sub("obdlab", node))
        return repr(node)


_NO_FIELDS = ("ctx", "kind", "type_comment")
_C_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
# Names of modules in texts, such as the program of a child process.
_MODULE_NAME = re.compile(r"\bobdlab(\.\w+)+")


def _says_nothing(node: object) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom) or _is_for_types(node):
        return True
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# "if TYPE_CHECKING:" never runs.
def _is_for_types(node: object) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


# Every node that can run.
def _run(tree: ast.AST) -> Iterator[ast.AST]:
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        pending += [child for child in ast.iter_child_nodes(node) if not _is_for_types(child)]
