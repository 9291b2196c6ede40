"""Image recipes: the parts of a dataset's image, and the probe of its containers.

A recipe is a TOML file. Its image is built from Debian packages (``obdlab.lab.images.builder``) or taken from a
registry (``image = "host/name:tag"``)::

    name = "redis"
    description = "what it stands for"
    base = "debian"                  # or "busybox"
    suite = "trixie"                 # Debian release of the base
    size_mb = 37                     # size of its compressed layers, for estimates of disk and time

    [[layer]]                        # one image layer each, applied in this order: packages, files, run
    comment = "the server"
    packages = ["redis-server"]
    files = [{ path = "/etc/redis/redis.conf", source = "redis.conf", mode = "0644" }]
    run = ["install -d -o redis -g redis /data"]

    [config]                         # the image's own configuration
    command = ["/usr/local/bin/start"]
    user = "redis"

    [probe]
    ready_line = "READY"             # ready when a line of the container's output holds this text

A recipe may have arguments: ``[arguments]`` names whole numbers with their defaults, and ``@name@`` stands for each
anywhere in the file. The image ``weights?mib=64`` is that of the recipe ``weights`` with another value;
``size_mb_each`` adds to ``size_mb`` for each unit.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from obdlab.errors import ObdlabError
from obdlab.lab.images.lock import LOCK_NAME, read_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BASES = ("debian", "busybox")
#: Part of every fingerprint: raise it when the builder makes other layers from the same recipe.
BUILDER_VERSION = 2

_MOST_TIMEOUT_S = 24 * 3600.0
_MOST_SIZE_MB = 1e6
_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?:=[A-Za-z0-9.+~:-]+)?")
_LOCKED = re.compile(r"[a-z0-9][a-z0-9+.-]+:[a-z0-9-]+=[A-Za-z0-9.+~:-]+")
_NUMBER = re.compile(r"[0-9]{1,9}")
_SUITE = re.compile(r"[a-z][a-z0-9-]*")


class RecipeError(ObdlabError):
    """A recipe is malformed. Names the file, the key, the value and the wanted value."""


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A file that a layer puts into the image. ``mode`` holds permission bits."""

    path: str
    content: bytes
    mode: int


@dataclass(frozen=True, slots=True)
class RecipeLayer:
    """One layer: packages are installed, then files written, then commands run (each by ``sh -c`` in the image)."""

    comment: str
    packages: tuple[str, ...]
    files: tuple[RecipeFile, ...]
    run: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The image's own configuration ("OCI image configuration", key ``config``)."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    user: str = ""
    working_directory: str = "/"
    ports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """A container is ready when a line of its output holds ``ready_line``, which must happen within ``timeout_s``.

    ``command`` replaces the image's command unless it is empty.
    """

    ready_line: str
    timeout_s: float = 120.0
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A dataset's image and its probe. Either ``image`` names one, or ``base`` and ``layers`` define its build."""

    name: str
    description: str
    probe: Probe
    image: str = ""
    base: str = ""
    suite: str = "trixie"
    layers: tuple[RecipeLayer, ...] = ()
    config: ImageConfig = ImageConfig()
    #: The approximate size of its compressed layers in MB (10**6 bytes); 0 if it is unknown before the build.
    size_mb: float = 0.0
    #: The packages of the recipe's lock (``obdlab.lab.images.lock``); empty without a lock.
    locked: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path, arguments: Mapping[str, int] | None = None) -> Self:
        """Read a recipe file, the sources of its files and its lock, all in its directory. Raises RecipeError.

        ``arguments`` replace defaults of the recipe's.
        """
        try:
            values = _with_arguments(path.read_text(), arguments or {}, path)
            locked = read_lock(path.with_name(LOCK_NAME))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{path}: {error}") from error
        for line in locked:
            if not _LOCKED.fullmatch(line):
                raise RecipeError(f"{path.with_name(LOCK_NAME)}: wanted lines like name:amd64=1.0 (got {line!r})")
        return replace(cls.from_values(values, path), locked=locked)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], path: Path) -> Self:
        """Check a parsed recipe. Raises RecipeError."""
        top = _Table(values, str(path))
        arguments, each = top.table("arguments"), top.table("size_mb_each")
        more_mb = sum(each.number(key, 0.0) * arguments.number(key, 0.0) for key in each.keys())  # noqa: SIM118 - takes them while it goes
        recipe = cls(
            name=top.text("name", pattern=_NAME),
            description=top.text("description", ""),
            image=top.text("image", ""),
            base=top.text("base", ""),
            suite=top.text("suite", "trixie", pattern=_SUITE),
            layers=tuple(_layer(table, path.parent) for table in top.tables("layer")),
            config=_config(top.table("config")),
            probe=_probe(top.table("probe")),
            size_mb=top.number("size_mb", 0.0) + more_mb,
        )
        top.end()
        if not 0 <= recipe.size_mb <= _MOST_SIZE_MB:
            raise RecipeError(f"{path}: size_mb: wanted 0 to {_MOST_SIZE_MB:g} (got {recipe.size_mb:g})")
        _check_origin(recipe, path)
        return recipe

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the image the recipe asks for, independent of probe and lock."""
        values = asdict(self)
        for key in ("name", "description", "probe", "size_mb", "locked"):
            del values[key]
        values["builder"] = BUILDER_VERSION
        text = json.dumps(values, sort_keys=True, default=lambda content: content.hex())
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def image_label(name: str, directories: Iterable[Path] = ()) -> str:
    """Return an image's name for tables and reports: its recipe's name, also if ``name`` is a path."""
    place, mark, arguments = name.partition("?")
    if not place.endswith(".toml"):
        return name
    try:
        return find_recipe(name, directories).name + mark + arguments
    except RecipeError:  # the recipe may be gone; stored rows outlive it
        return (Path(place).parent.name or place) + mark + arguments


def find_recipe(name: str, directories: Iterable[Path]) -> Recipe:
    """Return the recipe ``name``: a TOML file's path, or a dataset in one of ``directories``. Raises RecipeError.

    ``name?key=number&key=number`` gives arguments.
    """
    arguments = {}
    for word in filter(None, name.partition("?")[2].split("&")):
        key, _, value = word.partition("=")
        if not _NUMBER.fullmatch(value):
            raise RecipeError(f"{name}: wanted name?key=number (got {word!r})")
        arguments[key] = int(value)
    return Recipe.load(recipe_path(name, directories), arguments)


def recipe_path(name: str, directories: Iterable[Path]) -> Path:
    """Return the path of the recipe that :func:`find_recipe` reads. Raises RecipeError."""
    name = name.partition("?")[0]
    if name.endswith(".toml"):
        return Path(name)
    tried = [directory / name / "recipe.toml" for directory in directories]
    for path in tried:
        if path.is_file():
            return path
    raise RecipeError(f"no recipe named {name!r} (looked for {', '.join(map(str, tried))})")


def list_recipes(directories: Iterable[Path]) -> list[Recipe]:
    """Return every recipe in ``directories``, sorted by name."""
    paths = [path for directory in directories for path in directory.glob("*/recipe.toml")]
    return sorted((Recipe.load(path) for path in paths), key=lambda recipe: recipe.name)


# The values of a recipe with its arguments in place of their marks. Raises RecipeError and TOMLDecodeError.
def _with_arguments(text: str, given: Mapping[str, int], path: Path) -> dict[str, Any]:
    declared = tomllib.loads(text).get("arguments", {})
    if not isinstance(declared, Mapping) or any(type(value) is not int for value in declared.values()):
        raise RecipeError(f"{path}: arguments: wanted a table of whole numbers (got {declared!r})")
    if unknown := sorted(set(given) - set(declared)):
        raise RecipeError(
            f"{path}: arguments: unknown (got {', '.join(unknown)}, wanted among {', '.join(declared)})"
        )
    arguments = {**declared, **given}
    for key, value in arguments.items():
        text = text.replace(f"@{key}@", str(value))
    values = tomllib.loads(text)
    return {**values, "arguments": arguments} if arguments else values


def _check_origin(recipe: Recipe, path: Path) -> None:
    if recipe.image:
        if recipe.base or recipe.layers:
            raise RecipeError(f"{path}: image: an image of a registry has no base and no layers of its own")
        return
    if recipe.base not in BASES:
        raise RecipeError(
            f"{path}: base: unknown (got {recipe.base!r}, wanted one of {', '.join(BASES)}, or an image)"
        )
    if recipe.base == "busybox" and any(layer.packages for layer in recipe.layers):
        raise RecipeError(f"{path}: layer.packages: a busybox base has no package manager")


def _layer(table: _Table, directory: Path) -> RecipeLayer:
    layer = RecipeLayer(
        comment=table.text("comment", ""),
        packages=table.texts("packages", pattern=_PACKAGE),
        files=tuple(_file(entry, directory) for entry in table.tables("files")),
        run=table.texts("run"),
    )
    table.end()
    if not (layer.packages or layer.files or layer.run):
        raise RecipeError(f"{table.where}: an empty layer (wanted packages, files or run)")
    return layer


def _file(table: _Table, directory: Path) -> RecipeFile:
    path = table.text("path")
    source = table.text("source", "")
    content = table.text("content", "").encode()
    mode = table.text("mode", "0644", pattern=re.compile(r"[0-7]{3,4}"))
    table.end()
    if not path.startswith("/") or ".." in PurePosixPath(path).parts or "\0" in path:
        raise RecipeError(f"{table.where}.path: wanted an absolute path without '..' (got {path!r})")
    if source:
        content = _read_source(directory, source, f"{table.where}.source")
    return RecipeFile(path, content, int(mode, 8))


def _read_source(directory: Path, source: str, where: str) -> bytes:
    if "\0" in source or not (directory / source).resolve().is_relative_to(directory.resolve()):
        raise RecipeError(f"{where}: wanted a file beside the recipe (got {source!r})")
    try:
        return (directory / source).read_bytes()
    except OSError as error:
        raise RecipeError(f"{where}: {error}") from error


def _config(table: _Table) -> ImageConfig:
    environment = table.table("environment")
    config = ImageConfig(
        entrypoint=table.texts("entrypoint"),
        command=table.texts("command"),
        environment=tuple((key, environment.text(key)) for key in sorted(environment.keys())),
        user=table.text("user", ""),
        working_directory=table.text("working_directory", "/"),
        ports=table.texts("ports", pattern=re.compile(r"[0-9]{1,5}/(tcp|udp)")),
    )
    table.end()
    return config


def _probe(table: _Table) -> Probe:
    probe = Probe(table.text("ready_line"), table.number("timeout_s", 120.0), table.texts("command"))
    table.end()
    if not probe.ready_line.strip() or not 0 < probe.timeout_s <= _MOST_TIMEOUT_S:
        raise RecipeError(
            f"{table.where}: wanted a ready_line that is not blank and a positive, finite timeout_s "
            f"(got {probe.ready_line!r} and {probe.timeout_s})"
        )
    return probe


class _Table:
    # A TOML table. Callers take its keys one by one, with their type checked; end() raises an error if keys are left.

    def __init__(self, values: object, where: str) -> None:
        self.where = where
        if not isinstance(values, Mapping):
            raise RecipeError(f"{where}: wanted a table (got {values!r})")
        self._values = dict(values)

    def keys(self) -> list[str]:
        return list(self._values)

    def text(self, key: str, default: str | None = None, pattern: re.Pattern[str] | None = None) -> str:
        value = self._take(key, default, lambda item: isinstance(item, str), "a string")
        if pattern is not None and not pattern.fullmatch(value):
            raise RecipeError(f"{self.where}: {key}: wanted text like {pattern.pattern} (got {value!r})")
        return str(value)

    def number(self, key: str, default: float) -> float:
        def is_number(item: object) -> bool:
            return isinstance(item, float) or (type(item) is int and abs(item) < 1 << 53)

        return float(self._take(key, default, is_number, "a number"))

    def texts(self, key: str, pattern: re.Pattern[str] | None = None) -> tuple[str, ...]:
        def are_texts(items: object) -> bool:
            return isinstance(items, list) and all(isinstance(item, str) and "\0" not in item for item in items)

        values = self._take(key, [], are_texts, "a list of strings")
        for value in values:
            if pattern is not None and not pattern.fullmatch(value):
                raise RecipeError(f"{self.where}: {key}: wanted texts like {pattern.pattern} (got {value!r})")
        return tuple(values)

    def table(self, key: str) -> _Table:
        return _Table(self._values.pop(key, {}), f"{self.where}: {key}")

    def tables(self, key: str) -> list[_Table]:
        values = self._take(key, [], lambda item: isinstance(item, list), "an array of tables")
        return [_Table(value, f"{self.where}: {key}[{number}]") for number, value in enumerate(values)]

    def end(self) -> None:
        if self._values:
            raise RecipeError(f"{self.where}: unknown key (got {', '.join(map(repr, sorted(self._values)))})")

    def _take(self, key: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        value = self._values.pop(key, default)
        if value is None:
            raise RecipeError(f"{self.where}: {key}: missing (wanted {wanted})")
        if not fits(value):
            raise RecipeError(f"{self.where}: {key}: wanted {wanted} (got {value!r})")
        return value
