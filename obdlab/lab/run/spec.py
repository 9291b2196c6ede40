"""An experiment as declared in TOML: points of axes, each measured several times in interleaved order.

A declaration has the same form for every kind: keys of all experiments, a table of axes, a table of options. A kind
may have short keys at the top that stand for some of these (container starts: ``images``, ``repeats`` ...).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import MISSING, dataclass, field, fields
from itertools import product
from typing import TYPE_CHECKING, Any, Self

from obdlab.lab.kinds import KINDS, START
from obdlab.lab.kinds.kind import SpecError
from obdlab.lab.run.rows import AA_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obdlab.lab.kinds.kind import Kind, Option, Point, Row, Value

__all__ = ["Cell", "Spec", "SpecError"]

_TABLES = ("axes", "options")


@dataclass(frozen=True, slots=True)
class Cell:
    """One point to measure once. The arm of a point can have the A/A label."""

    point: Point
    repeat: int


@dataclass(frozen=True, slots=True)
class Spec:
    """A declared experiment. ``axes`` and ``options`` are complete: the declaration's values over the defaults."""

    name: str
    kind: str
    axes: Mapping[str, tuple[Value, ...]]
    options: Mapping[str, Option]
    repeats: int = 5
    #: Measure the baseline a second time under another label, to show the noise floor.
    a_a: bool = False
    #: Other than 0: repeats end early for a comparison whose ratio is surely not 1, or surely 1 to this share.
    precision: float = 0.0
    seed: int = 20200715
    #: A cell waits until the host's load of the last minute is below this ...
    load_limit: float = 1.5
    #: ... but all cells of one bench together wait at most this long: the host may stay busy.
    quiet_wait_s: float = 120.0
    #: A cell (of starts: its cold start and the starts after it) that takes longer is stopped and counts as failed.
    cell_timeout_s: float = 600.0
    #: Free text, shown in the report.
    description: str = field(default="", compare=False)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Check keys, types and values of a parsed declaration. Raises SpecError naming key, got and wanted."""
        name = values.get("kind", START)
        kind = KINDS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise SpecError(f"kind: unknown (got {name!r}, wanted one of {', '.join(KINDS)})")
        given = _by_table(kind, values)
        axes = {key: _axis(kind, key, value) for key, value in {**kind.axes, **given.pop("axes")}.items()}
        options = {**kind.options, **given.pop("options")}
        for key, value in options.items():
            _typed(_label(kind, f"options.{key}"), value, kind.options[key])
        checked_axes, checked_options = kind.checked(axes, options)
        defaults = {"kind": START, "a_a": kind.a_a, "cell_timeout_s": kind.cell_timeout_s}
        common = {**defaults, **{key: _common(key, value) for key, value in given.items()}}
        if "name" not in common:
            raise SpecError("name: missing (wanted the name of the results)")
        return cls(axes=checked_axes, options=checked_options, **common)

    def with_values(self, **values: Any) -> Self:
        """Return the spec with some values changed, checked like a declaration.

        "axes.NAME" and "options.NAME" change one of them, as the kind's short keys do. Raises SpecError.
        """
        if values.get("kind", self.kind) != self.kind:
            raise SpecError(f"kind: cannot be changed (got {values['kind']!r}, wanted {self.kind!r})")
        changes = _by_table(KINDS[self.kind], values)
        tables = {table: {**getattr(self, table), **changes.pop(table)} for table in _TABLES}
        return self.from_values({**self._common(), **changes, **tables})

    def declaration(self) -> dict[str, Any]:
        """Return the spec as the values of a declaration, with the kind's short keys, JSON-ready."""
        short = {of: key for key, of in KINDS[self.kind].short_keys.items()}
        values: dict[str, Any] = {
            key: value for key, value in self._common().items() if (key, value) != ("kind", START)
        }
        for table in _TABLES:
            for name, value in getattr(self, table).items():
                plain = list(value) if isinstance(value, tuple) else value
                if (key := short.get(f"{table}.{name}")) is not None:
                    values[key] = plain
                else:
                    values.setdefault(table, {})[name] = plain
        return values

    def _common(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in _TABLES}

    @property
    def arm_axis(self) -> str:
        """The axis whose values are the compared arms."""
        return KINDS[self.kind].arm_axis or next(iter(self.axes))

    @property
    def first_metric(self) -> str:
        """The key of the metric that reports compare."""
        return KINDS[self.kind].metrics[0].key

    @property
    def baseline(self) -> Value:
        """The arm to which the others are compared."""
        return self.axes[self.arm_axis][0]

    @property
    def arms(self) -> tuple[Value, ...]:
        """The compared arms; with ``a_a`` the baseline appears twice, the second time as a labelled text."""
        return self.axes[self.arm_axis] + ((f"{self.baseline}{AA_SUFFIX}",) if self.a_a else ())

    def benches(self) -> list[Point]:
        """Return the values of the axes that points of one bench share, for each bench."""
        names = KINDS[self.kind].bench_axes
        return [dict(zip(names, values, strict=True)) for values in product(*(self.axes[name] for name in names))]

    def shared(self, cell: Cell) -> Point:
        """Return the values of a cell's point that its bench is made for."""
        return {name: cell.point[name] for name in KINDS[self.kind].bench_axes}

    def measured_point(self, cell: Cell) -> Point:
        """Return the point that is measured for a cell: the A/A label stands for the baseline."""
        arm = cell.point[self.arm_axis]
        is_label = self.a_a and arm == f"{self.baseline}{AA_SUFFIX}"
        seed = {"repeat": cell.repeat} if KINDS[self.kind].seeded else {}
        return {**cell.point, **({self.arm_axis: self.baseline} if is_label else {}), **seed}

    def points(self, shared: Point | None = None) -> list[Point]:
        """Return every point, or those of the bench of ``shared``."""
        values = {**self.axes, self.arm_axis: self.arms, **{key: (value,) for key, value in (shared or {}).items()}}
        return [dict(zip(values, point, strict=True)) for point in product(*values.values())]

    def cells(self, shared: Point | None = None) -> list[Cell]:
        """Return the cells of all benches, or of the bench of ``shared``, in the order of measuring.

        Each repeat is a block with every point once, shuffled with the seed, so that a drift of the machine affects
        all arms alike.
        """
        if shared is None:
            return [cell for each in self.benches() for cell in self.cells(each)]
        order = random.Random("/".join(map(str, (self.seed, *shared.values()))))
        cells: list[Cell] = []
        for repeat in range(self.repeats):
            block = self.points(shared)
            order.shuffle(block)
            cells += [Cell(point, repeat) for point in block]
        return cells

    def image(self, point: Point) -> str:
        """Return the name of a point's image; "" if the kind uses no image."""
        return str(point.get("image", self.options.get("image", "")))

    def images(self) -> list[str]:
        """Return the names of all images that the experiment needs."""
        return list(dict.fromkeys(filter(None, map(self.image, self.points()))))

    def columns(self, cell: Cell) -> Row:
        """Return the columns of a cell's rows that come from the declaration."""
        return {**KINDS[self.kind].columns(self.options, cell.point), "repeat": cell.repeat}

    def key(self, cell: Cell, context: str, digest: str = "") -> str:
        """Return a cell's identity under ``context`` (code and host), the key of its rows in the store.

        ``digest`` is that of the cell's image; it is "" without one, and in rows from before images were pinned.
        """
        about = {**KINDS[self.kind].identity(self.options, cell.point), "repeat": cell.repeat, "context": context}
        about |= {"image_digest": digest} if digest else {}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


# The values with every key of an axis or option in its table: "axes.NAME" and the kind's short keys, too.
def _by_table(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {table: {} for table in _TABLES}
    common = {entry.name for entry in fields(Spec)}
    for given, value in values.items():
        table, _, name = kind.short_keys.get(given, given).partition(".")
        if table not in common or (name and table not in _TABLES):
            known = ", ".join(sorted(common | set(kind.short_keys)))
            raise SpecError(f"unknown key (got {given!r}, wanted among {known})")
        if table not in _TABLES:
            found[table] = value
            continue
        entries = {name: value} if name else value
        if not isinstance(entries, dict):
            raise SpecError(f"{table}: wanted a table (got {value!r})")
        for key, each in entries.items():
            if key not in getattr(kind, table):
                known = ", ".join(getattr(kind, table)) or "none"
                raise SpecError(f"{table}: unknown key (got {key!r}, wanted among {known})")
            if key in found[table]:
                raise SpecError(f"{table}.{key}: given twice (again as {given!r})")
            found[table][key] = each
    return found


# The name of an axis or option as declarations have it.
def _label(kind: Kind, target: str) -> str:
    return next((key for key, of in kind.short_keys.items() if of == target), target)


def _axis(kind: Kind, key: str, values: Any) -> tuple[Value, ...]:
    where = _label(kind, f"axes.{key}")
    if not isinstance(values, list | tuple) or not values:
        raise SpecError(f"{where}: wanted a list of at least one value (got {values!r})")
    for value in values:
        _typed(where, value, kind.axes[key][0])
    if len(set(values)) != len(values):
        raise SpecError(f"{where}: wanted each value once (got {list(values)})")
    return tuple(values)


# Least values of the common keys.
_LEAST = {"repeats": 1, "quiet_wait_s": 0, "load_limit": 0, "precision": 0}


def _common(key: str, value: Any) -> Any:
    (entry,) = (entry for entry in fields(Spec) if entry.name == key)
    default: Any = "" if entry.default is MISSING else entry.default
    _typed(key, value, default)
    if key in _LEAST and value < _LEAST[key]:
        raise SpecError(f"{key}: wanted at least {_LEAST[key]} (got {value!r})")
    if key == "cell_timeout_s" and value <= 0:
        raise SpecError(f"{key}: wanted a positive number (got {value!r})")
    return float(value) if type(default) is float else value


# TOML distinguishes ints from floats; a rate of 100 means 100.0.
def _typed(where: str, value: Any, example: Option) -> None:
    wanted = type(example)
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise SpecError(f"{where}: wanted {'a table' if wanted is dict else wanted.__name__} (got {value!r})")
    if wanted is float and not math.isfinite(value):
        raise SpecError(f"{where}: wanted a finite number (got {value!r})")
