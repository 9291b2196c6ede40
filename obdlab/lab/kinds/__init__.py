"""Kinds of experiments, by the value of a declaration's key ``kind``.

To add one, write a subclass of ``obdlab.lab.kinds.kind.Kind`` and list it in KINDS.
"""

from __future__ import annotations

from obdlab.lab.kinds.build import Build
from obdlab.lab.kinds.codec import Codec
from obdlab.lab.kinds.conversion import Conversion
from obdlab.lab.kinds.depth import Depth
from obdlab.lab.kinds.diskforms import Forms
from obdlab.lab.kinds.emulation import Swarm
from obdlab.lab.kinds.fio import Fio
from obdlab.lab.kinds.index import Index
from obdlab.lab.kinds.kind import Kind
from obdlab.lab.kinds.lazybuild import LazyBuild
from obdlab.lab.kinds.memory import Memory
from obdlab.lab.kinds.misses import Misses
from obdlab.lab.kinds.simulation import Simulation
from obdlab.lab.kinds.start import Start
from obdlab.lab.kinds.suggestion import Suggestion

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Start(),
        Codec(),
        Index(),
        Depth(),
        Fio(),
        Forms(),
        Build(),
        LazyBuild(),
        Conversion(),
        Misses(),
        Memory(),
        Simulation(),
        Swarm(),
        Suggestion(),
    )
}
#: The kind of a declaration that names none.
START = Start.name

__all__ = ["KINDS", "START", "Kind"]
