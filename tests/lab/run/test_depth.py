"""Stacks of made-up layers: what is in them, and that their counts can be relied on."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

from obdlab.lab.kinds.depth import _layer, _measure

OPTIONS = {"files": 6, "changed": 2, "mean_kib": 8}


def test_layers_add_replace_delete_and_append() -> None:
    rng, found = random.Random(1), list[str]()
    layers = [_layer(number, found, rng, OPTIONS) for number in range(2)]
    first, second = (tarfile.TarFile(fileobj=io.BytesIO(layer)) for layer in layers)
    added = {name for name in first.getnames() if "/l0-" in name}
    assert len(added) == 6
    replaced = added & set(second.getnames())
    assert len(replaced) == 2
    assert any(second.getmember(name).size != first.getmember(name).size for name in replaced)
    (gone,) = (name for name in second.getnames() if "/.wh." in name)
    hidden = gone.replace(".wh.", "")
    assert hidden in added - replaced
    assert hidden not in found
    assert len(found) == 11
    assert (first.getmember("log").size, second.getmember("log").size) == (2000, 4000)


def test_the_same_stack_has_the_same_index_and_a_deeper_one_a_larger(tmp_path: Path) -> None:
    shallow, deep = (_measure(layers, OPTIONS, tmp_path) for layers in (2, 12))
    assert _measure(12, OPTIONS, tmp_path) == deep
    assert deep["segments"] > shallow["segments"] + 10
    assert deep["index_kib"] == deep["segments"] * 16 / 1024
    assert not list(tmp_path.iterdir())
