"""Kinds of experiments other than container starts, by the value of a declaration's key ``kind``.

To add one, write a subclass of ``obdlab.lab.kinds.kind.Kind`` and list it in KINDS.
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
