"""An experiment as declared in TOML: a matrix of cells, each measured several times in interleaved order."""

from __future__ import annotations

import hashlib
import json
import random
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Self

from obdlab.errors import ObdlabError
from obdlab.formats.zfile import DEFAULT_ALGORITHM, DEFAULT_BLOCK_SIZE
from obdlab.lab.baselines import ADAPTERS
from obdlab.lab.testbed.cgroups import DISKS
from obdlab.settings.settings import Settings, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

#: Commands that replace the recipe's command until the container is ready: read all metadata, read all data (the
#: paper's figures 23 and 24). tar writes into a pipe, as it does not read files if its output is /dev/null.
WORKLOADS: dict[str, tuple[str, ...]] = {
    "start": (),
    "du": ("sh", "-c", "du -sx / > /dev/null; echo OBDLAB-READY"),
    "tar": ("sh", "-c", "tar -cf - --one-file-system -C / . 2> /dev/null | cat > /dev/null; echo OBDLAB-READY"),
}
WORKLOAD_LINE = "OBDLAB-READY"

#: The label of the second, identical baseline arm that shows the noise floor.
AA_SUFFIX = " (A/A)"


class SpecError(ObdlabError):
    """An experiment's declaration has an unknown key, a wrong type or an invalid value."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One start to measure, with those after it: image, arm, network, disk, workload and repeat."""

    image: str
    arm: str
    rate_mbit: float
    rtt_ms: float
    algorithm: str
    block_size: int
    repeat: int
    disk: str = "native"
    workload: str = "start"

    @property
    def snapshotter(self) -> str:
        """The snapshotter of the arm, without its A/A label."""
        return self.arm.removesuffix(AA_SUFFIX)

    def key(self, context: str, digest: str = "") -> str:
        """Return the cell's identity under ``context`` (code and host), the key of its rows in the store.

        ``digest`` is the image's; it is "" in rows from before images were pinned.
        """
        image = {"image_digest": digest} if digest else {}
        text = json.dumps({**asdict(self), **image, "context": context}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Spec:
    """A declared experiment. Rates in Mbit/s, round trips in ms, times in seconds."""

    name: str
    images: tuple[str, ...] = ("redis",)
    #: Names of adapters (``obdlab.lab.baselines``); the first is the baseline of every ratio.
    snapshotters: tuple[str, ...] = ("overlayfs", "obdlab")
    rates_mbit: tuple[float, ...] = (100.0,)
    rtts_ms: tuple[float, ...] = (5.0,)
    repeats: int = 5
    #: Warm starts measured after each cold one.
    warm_starts: int = 2
    #: Starts of a pulled image with the page cache dropped, after the warm ones.
    dropped_starts: int = 0
    #: A pause between pull and container creation, not counted in any phase, for work that a pull leaves running.
    pause_s: float = 0.0
    #: Names of disks (``obdlab.lab.testbed.cgroups.DISKS``); every cell is measured on each.
    disks: tuple[str, ...] = ("native",)
    workload: str = "start"
    #: Measure the first snapshotter a second time under another label, to show the noise floor.
    a_a: bool = True
    seed: int = 20200715
    ready_timeout_s: float = 120.0
    #: A cell (its cold start and the starts after it) that takes longer is stopped and counts as failed.
    cell_timeout_s: float = 900.0
    #: A cold start waits until the host's load of the last minute is below this ...
    load_limit: float = 1.5
    #: ... but all cells of one network together wait at most this long: the host may stay busy.
    quiet_wait_s: float = 120.0
    #: ZFile options of the converted images; the defaults are those of ``obdlab image convert``.
    algorithm: str = DEFAULT_ALGORITHM
    block_size: int = DEFAULT_BLOCK_SIZE
    #: Settings of obdlab (docs/reference/configuration.md) that differ from the defaults.
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    #: Free text, shown in the report.
    description: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in self.snapshotters:
            if name not in ADAPTERS:
                raise SpecError(f"snapshotters: unknown name (got {name!r}, wanted among {', '.join(ADAPTERS)})")
        for name in self.disks:
            if name not in DISKS:
                raise SpecError(f"disks: unknown name (got {name!r}, wanted among {', '.join(DISKS)})")
        if self.workload not in WORKLOADS:
            raise SpecError(f"workload: unknown (got {self.workload!r}, wanted one of {', '.join(WORKLOADS)})")
        for key in ("images", "snapshotters", "rates_mbit", "rtts_ms", "disks"):
            values = getattr(self, key)
            if not values or len(set(values)) != len(values):
                raise SpecError(f"{key}: must name at least one value, each once (got {list(values)})")
        if self.repeats < 1 or min(self.warm_starts, self.dropped_starts) < 0:
            raise SpecError("repeats must be at least 1, warm_starts and dropped_starts at least 0")
        if min(self.ready_timeout_s, self.cell_timeout_s) <= 0:
            raise SpecError("ready_timeout_s and cell_timeout_s must be positive")
        if not 0 <= self.pause_s <= 60:
            raise SpecError(f"pause_s: wanted 0 to 60 (got {self.pause_s:g})")
        if "cache_dir" in self.settings:
            raise SpecError("settings: cache_dir is the experiment's own")
        try:
            self.host_settings()
        except SettingsError as error:
            raise SpecError(str(error)) from error
        if min(self.rates_mbit) <= 0 or min(self.rtts_ms) < 0:
            raise SpecError("rates_mbit must be positive and rtts_ms not negative")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a declaration. Raises SpecError naming file and key."""
        values = read_declaration(path)
        try:
            return cls.from_values(values)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Check keys and types of a parsed declaration. Raises SpecError."""
        return cls(**{key: _checked(key, value) for key, value in values.items()})

    def with_values(self, **values: Any) -> Self:
        """Return the spec with some values changed, checked like a declaration."""
        return replace(self, **{key: _checked(key, value) for key, value in values.items()})

    def host_settings(self) -> Settings:
        """Return the settings for opening images, without the place of the cache."""
        return Settings().with_values(self.settings, name="settings")

    @property
    def arms(self) -> tuple[str, ...]:
        """The labels of the compared arms; with ``a_a`` the baseline appears twice."""
        extra = (self.snapshotters[0] + AA_SUFFIX,) if self.a_a else ()
        return self.snapshotters + extra

    def networks(self) -> list[tuple[float, float]]:
        """Every (rate, round trip) of the matrix."""
        return list(product(self.rates_mbit, self.rtts_ms))

    def cells(self, rate_mbit: float, rtt_ms: float) -> list[Cell]:
        """Return the cells under one network in the order of measuring.

        Each repeat is a block with every image and arm once, shuffled with the seed, so that a drift of the machine
        affects all arms alike.
        """
        order = random.Random(f"{self.seed}/{rate_mbit}/{rtt_ms}")
        cells: list[Cell] = []
        for repeat in range(self.repeats):
            block = [
                Cell(image, arm, rate_mbit, rtt_ms, self.algorithm, self.block_size, repeat, disk, self.workload)
                for image, arm, disk in product(self.images, self.arms, self.disks)
            ]
            order.shuffle(block)
            cells += block
        return cells


def read_declaration(path: Path) -> dict[str, Any]:
    """Return a declaration's values by key; "name" is the file's stem by default. Raises SpecError."""
    try:
        return {"name": path.stem, **tomllib.loads(path.read_text())}
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: {error}") from error


_TUPLES: dict[str, type] = {
    "images": str,
    "snapshotters": str,
    "rates_mbit": float,
    "rtts_ms": float,
    "disks": str,
}


def _checked(key: str, value: Any) -> Any:
    # TOML distinguishes ints from floats; a rate of 100 means 100.0.
    known = {entry.name: entry.type for entry in fields(Spec)}
    if key not in known:
        raise SpecError(f"unknown key (got {key!r}, wanted among {', '.join(sorted(known))})")
    if key == "settings":
        if not isinstance(value, dict):
            raise SpecError(f"settings: wanted a table (got {value!r})")
        return value
    if key in _TUPLES:
        if not isinstance(value, list | tuple):
            raise SpecError(f"{key}: wanted a list (got {value!r})")
        return tuple(_scalar(key, item, _TUPLES[key].__name__) for item in value)
    return _scalar(key, value, str(known[key]))


def _scalar(key: str, value: Any, kind: str) -> Any:
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    wanted = {"float": float, "int": int, "str": str, "bool": bool}[kind]
    if type(value) is not wanted:
        raise SpecError(f"{key}: wanted {kind} (got {value!r})")
    return value
