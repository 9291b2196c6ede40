"""The digest of measured code: the same for other prose and other places, another for other code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import obdlab
from obdlab.lab.kinds import KINDS
from obdlab.lab.run.code import MEASURED, NOT_MEASURED, PROGRAMS, code_digest, digest_of, reached

_PACKAGE = Path(obdlab.__file__).parent
BENCH = '''
"""Measures."""
from __future__ import annotations
import time
from typing import TYPE_CHECKING
from obdlab.deep.tools import work
from obdlab.deep import helpers
from obdlab.lab.run.engine import order
if TYPE_CHECKING:
    from obdlab.unused import Thing

def measure(thing: Thing) -> float:
    """Return seconds."""
    began = time.perf_counter()  # the clock
    if not work(helpers.size()):
        raise ValueError("nothing was done")
    return time.perf_counter() - began
'''
FILES = {
    "bench": BENCH,
    "deep/tools": "LIMIT = 3\ndef work(size):\n    return size < LIMIT\ndef other():\n    return 1\n",
    "deep/helpers": 'import sys\nDAEMON = ("-m", "obdlab.deep.daemon")\ndef size():\n    return sys.maxsize\n',
    "deep/daemon": "def serve():\n    return 1\n",
    "lab/run/engine": "def order():\n    return 1\n",
    "unused": "class Thing:\n    pass\n",
}


def _digest(root: Path, changes: dict[str, str] | None = None, bench: str = "obdlab.bench") -> str:
    package = root / f"tree{len(list(root.iterdir()))}" / "obdlab"
    for name, text in {**FILES, **(changes or {})}.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        if text:
            path.write_text(text)
    return digest_of(package, [bench], ("obdlab.lab.run",), {})


@pytest.mark.parametrize(
    "changes",
    [
        {
            "bench": BENCH.replace("# the clock", "# another comment").replace(
                "Return seconds.", "Returns\n\n    time."
            )
        },
        {"bench": BENCH.replace("nothing was done", "wanted work (got none)")},
        {"bench": BENCH.replace("(  # the clock", "( # the clock").replace("\n    began", "\n\n    began")},
        {"lab/run/engine": "def order():\n    return 2\n"},
        {"unused": "class Thing:\n    size = 1\n"},
        # The tools are in two modules of another room.
        {
            "bench": BENCH.replace("obdlab.deep.tools", "obdlab.other.instruments"),
            "deep/tools": "",
            "other/instruments": "from obdlab.other.limits import LIMIT\ndef work(size):\n    return size < LIMIT\n",
            "other/limits": "LIMIT = 3\ndef other():\n    return 1\n",
        },
        # A module that is used by its name, and one that is named in a text.
        {
            "bench": BENCH.replace("from obdlab.deep import helpers", "from obdlab.far import aids").replace(
                "helpers.size", "aids.size"
            ),
            "deep/helpers": "",
            "far/aids": FILES["deep/helpers"].replace("deep.daemon", "far.server"),
            "far/server": FILES["deep/daemon"],
        },
    ],
    ids=["prose", "error", "layout", "engine", "types", "split", "renamed"],
)
def test_prose_and_places_change_nothing(tmp_path: Path, changes: dict[str, str]) -> None:
    assert _digest(tmp_path, changes) == _digest(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"bench": BENCH.replace("not work", "work")},
        {"bench": BENCH.replace("ValueError", "KeyError")},
        {"bench": BENCH.replace("import time", "import clock as time")},
        {"deep/tools": FILES["deep/tools"].replace("3", "4")},
        {"deep/daemon": "def serve():\n    return 2\n"},
        {"deep/helpers": FILES["deep/helpers"].replace('"-m"', '"-c"')},
    ],
    ids=["branch", "exception", "import", "constant", "daemon", "text"],
)
def test_other_code_is_another_digest(tmp_path: Path, changes: dict[str, str]) -> None:
    assert _digest(tmp_path, changes) != _digest(tmp_path)


def test_a_module_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"obdlab\.absent: no such module"):
        _digest(tmp_path, bench="obdlab.absent")


def test_every_kind_covers_what_it_measures_and_nothing_of_the_engine() -> None:
    for name, kind in KINDS.items():
        roots = kind.measured or (type(kind).__module__,)
        modules = {module.name for module in reached(_PACKAGE, roots, NOT_MEASURED, PROGRAMS)}
        assert set(roots) <= modules, name
        assert not any(each.startswith(("obdlab.lab.run", "obdlab.lab.paper")) for each in modules)
        assert all(each.startswith(MEASURED) for each in modules if each.startswith("obdlab.cli"))
        if name in ("start", "fio", "build", "memory"):
            # Processes of their own: the device host, its server, the block device, the cache.
            wanted = ("server.host", "devices.fuse_loop", "devices.fuse", "cache.fetching", "registry.client")
            assert {f"obdlab.{each}" for each in wanted} <= modules, name
    assert len({code_digest(name) for name in KINDS}) == len(KINDS)


def test_the_bench_of_starts_covers_its_daemons_and_arms() -> None:
    modules = {module.name for module in reached(_PACKAGE, KINDS["start"].measured, NOT_MEASURED, PROGRAMS)}
    wanted = ("snapshotter.service", "pull.rpull", "lab.testbed.coldness", "lab.baselines.stargz", "convert.image")
    wanted += ("cli.image.pull", "cli.prefork.forkserver")  # a pull, as its users call it
    assert {f"obdlab.{each}" for each in wanted} <= modules


def test_a_changed_docstring_of_the_real_package_changes_nothing(tmp_path: Path) -> None:
    copy = tmp_path / "obdlab"
    shutil.copytree(_PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    index = copy / "formats" / "lsmt" / "index.py"
    root = ["obdlab.lab.kinds.index"]
    assert digest_of(copy, root) == code_digest("index")
    again = tmp_path / "again" / "obdlab"
    index.write_text(index.read_text().replace('"""', '"""In other words: ', 1) + "\n# A comment.\n")
    shutil.copytree(copy, again)
    assert digest_of(again, root) == code_digest("index")
    more = tmp_path / "more" / "obdlab"
    index.write_text(index.read_text() + "\n_MORE = 1\n")
    shutil.copytree(copy, more)
    assert digest_of(more, root) != code_digest("index")


def test_a_module_in_c_is_covered_but_for_its_comments(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        package = tmp_path / f"c{len(list(tmp_path.iterdir()))}" / "obdlab"
        package.mkdir(parents=True)
        (package / "bench.py").write_text("def unpack():\n    from obdlab.fast import go\n    return go()\n")
        (package / "fast.c").write_text(text)
        return digest_of(package, ["obdlab.bench"], (), {})

    plain = digest("int go(void) { return 1; }\n")
    assert digest("/* Goes\n * fast. */\nint go(void) {\n  return 1; // one\n}\n") == plain
    assert digest("int go(void) { return 2; }\n") != plain


def test_starts_measure_the_compiled_unpacking() -> None:
    measured = KINDS["start"].measured or (type(KINDS["start"]).__module__,)
    names = {module.name for module in reached(_PACKAGE, measured, NOT_MEASURED, PROGRAMS)}
    assert {"obdlab.layers.native", "obdlab.layers._blocks"} <= names
