"""The agents to ask for a chunk of a blob, by the topology and their health."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from obdlab.peers.topology import Group

if TYPE_CHECKING:
    from obdlab.peers.agent.members import Member, Members
    from obdlab.peers.agent.trees import Trees

#: Bytes of a blob with one tree.
CHUNK = 256 << 20

# An agent that failed is not asked for this long; one that sent a wrong unit is not asked for the blob.
_PAUSE_S = 5.0
_BANNED_S = 3600.0
_MOST_BANNED = 4096
_MOST_GROUPS = 1024
_MOST_ASKED = 2


class Route(NamedTuple):
    """The agents to ask, the nearest ancestor first; and how many ancestors there are."""

    members: tuple[Member, ...]
    depth: int


class Router:
    """Chooses agents. Thread-safe."""

    def __init__(self, members: Members, trees: Trees | None) -> None:
        """Without ``trees`` no agent is ever asked."""
        self._members, self._trees = members, trees
        self._lock = threading.Lock()
        self._parents: OrderedDict[Group, str | None] = OrderedDict()
        self._paused: dict[str, float] = {}
        self._silences: dict[str, int] = {}
        self._banned: OrderedDict[tuple[str, str], float] = OrderedDict()
        #: Chunks whose usual parent was another one at their last route.
        self.re_parented = 0

    def route(self, identity: str, offset: int) -> Route:
        """Return at most two agents above this one that are well, for a blob's bytes from ``offset`` on."""
        if self._trees is None:
            return Route((), 0)
        now = time.monotonic()
        group = Group(identity, offset // CHUNK)
        with self._lock:
            failing = [each for each, until in self._paused.items() if until > now]
        above = self._trees.above(group, failing)
        known = self._members.known
        with self._lock:
            usable = [
                known[each]
                for each in above
                if each in known
                and self._paused.get(each, 0.0) <= now
                and self._banned.get((each, identity), 0.0) <= now
            ]
            parent = usable[0].id if usable else None
            self.re_parented += self._parents.get(group, parent) != parent
            self._parents[group] = parent
            if len(self._parents) > _MOST_GROUPS:
                self._parents.popitem(last=False)
        return Route(tuple(usable[:_MOST_ASKED]), len(above))

    def failed(self, member: str) -> bool:
        """Do not ask the agent for a few seconds. Return True if it was well until now."""
        now = time.monotonic()
        with self._lock:
            was_well = self._paused.get(member, 0.0) <= now
            self._paused[member] = now + _PAUSE_S
            if len(self._paused) > _MOST_BANNED:
                self._paused = {each: until for each, until in self._paused.items() if until > now}
        return was_well

    def silent(self, member: str) -> bool:
        """Note that the agent is alive and sent nothing. As :meth:`failed`, from the second time in a row on."""
        with self._lock:
            self._silences[member] = self._silences.get(member, 0) + 1
            again = self._silences[member] > 1
        return again and self.failed(member)

    def worked(self, member: str) -> None:
        """Note that the agent sent what it was asked for."""
        if self._silences:
            with self._lock:
                self._silences.pop(member, None)

    def ban(self, member: str, identity: str) -> None:
        """Do not ask the agent for this blob again: it sent wrong bytes."""
        with self._lock:
            self._banned[member, identity] = time.monotonic() + _BANNED_S
            if len(self._banned) > _MOST_BANNED:
                self._banned.popitem(last=False)
