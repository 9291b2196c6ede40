"""The states of a keeper's device, and the transitions between them."""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.Enum):
    """A state of a keeper's device."""

    #: The first server opens the image. The device does not exist yet; a failure fails the attach.
    STARTING = "starting"
    #: The device exists, served by the processes of another keeper; the first server is to replace them.
    REPLACING = "replacing"
    #: A server answers.
    SERVED = "served"
    #: No server answers: one is starting, or due after a pause. The device's users wait.
    RESTARTING = "restarting"
    #: The device was taken away. The keeper waits for its servers to end.
    ENDING = "ending"
    #: Nothing is left to do.
    OVER = "over"


#: The states that may follow a state.
TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.STARTING: frozenset({State.SERVED, State.RESTARTING, State.OVER}),
        State.REPLACING: frozenset({State.SERVED, State.OVER}),
        State.SERVED: frozenset({State.RESTARTING, State.ENDING, State.OVER}),
        State.RESTARTING: frozenset({State.SERVED, State.ENDING, State.OVER}),
        State.ENDING: frozenset({State.OVER}),
        State.OVER: frozenset(),
    }
)
#: States in which this keeper keeps the device going.
KEPT = frozenset({State.SERVED, State.RESTARTING})
