"""The package's imports and names: no import cycle, and few module names in several rooms."""

from __future__ import annotations

import graphlib
from collections import defaultdict
from pathlib import Path

import grimp
import pytest

import obdlab

#: Names of which a reader expects one in each room that has such a thing.
_USUAL = {"__init__", "errors", "server", "client", "config", "layout"}
_MOST_SHARED = 15


def test_no_module_imports_itself_through_others() -> None:
    # Imports in functions and under TYPE_CHECKING count too.
    graph = grimp.build_graph("obdlab", include_external_packages=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 300
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_few_module_names_are_used_in_several_rooms() -> None:
    root = Path(obdlab.__file__).parent
    rooms = defaultdict(list)
    for file in root.rglob("*.py"):
        room = file.parent.relative_to(root)
        if file.stem not in _USUAL and "_pb" not in room.parts:
            rooms[file.stem].append(str(room))
    shared = {name: sorted(found) for name, found in rooms.items() if len(found) > 1}
    assert len(shared) <= _MOST_SHARED, shared
    # A command is named after what it does, and so is the module that does it: the former's file says "_command".
    assert not [name for name, found in shared.items() if any(room.split("/")[0] == "cli" for room in found)]
