"""The states of a cached blob's units, and the transitions between them."""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.Enum):
    """A state of a unit, as one process sees it. Units of one flight (``obdlab.cache.flights``) have the same."""

    #: Not cached, as far as this process knows: the files are looked at before a flight begins.
    MISSING = "missing"
    #: In a flight that waits for a thread of the pool. A reader that comes earlier takes the flight over.
    QUEUED = "queued"
    #: In the flight of a thread that fetches it, or is about to. Readers wait for that thread.
    FETCHING = "fetching"
    #: Its bytes are here, and given to the waiting readers; they are being stored.
    FETCHED = "fetched"
    #: In the files, with its sum.
    CACHED = "cached"


#: The states that may follow a state. Other processes store units, and evict them.
TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.MISSING: frozenset({State.QUEUED, State.FETCHING, State.CACHED}),
        State.QUEUED: frozenset({State.FETCHING, State.MISSING}),
        State.FETCHING: frozenset({State.FETCHED, State.MISSING}),
        State.FETCHED: frozenset({State.CACHED, State.MISSING}),
        State.CACHED: frozenset({State.MISSING}),
    }
)
