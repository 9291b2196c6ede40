"""Experiments that are no container starts, by the name that a declaration's ``kind`` has.

A new one is a class like those here (``obdlab.lab.kinds.kind``) and a line in KINDS.
"""

from __future__ import annotations

from obdlab.lab.kinds.build import Build
from obdlab.lab.kinds.codec import Codec
from obdlab.lab.kinds.conversion import Conversion
from obdlab.lab.kinds.fio import Fio
from obdlab.lab.kinds.index import Index
from obdlab.lab.kinds.kind import Kind
from obdlab.lab.kinds.memory import Memory
from obdlab.lab.kinds.misses import Misses

KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (Codec(), Index(), Fio(), Build(), Conversion(), Misses(), Memory())
}

__all__ = ["KINDS", "Kind"]
