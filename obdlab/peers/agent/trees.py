"""The ancestors of this agent in the tree of a chunk or layer: computed here, or asked of the agent that keeps trees.

Rendezvous trees follow from the list of agents alone. The others depend on the order in which agents came, so one
agent, the manager, keeps them: it reads from the registry itself in "rooted" and "redirect", and is an agent like any
other in "balanced". If it does not answer, the last known ancestors are asked, and then the registry.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlencode

import msgspec

from obdlab.call import Call
from obdlab.peers.agent.asked import HOPS_HEADER
from obdlab.peers.agent.signature import SIGNATURE_HEADER, sign
from obdlab.peers.agent.watch import is_alive
from obdlab.peers.topology import BalancedTree, Group, RedirectTree, Rendezvous, RootedTree
from obdlab.registry.answer import from_response, read_small
from obdlab.registry.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from obdlab.peers.agent.members import Member, Members
    from obdlab.peers.topology import Topology
    from obdlab.registry.transport import Transport

logger = logging.getLogger(__name__)

#: Path at which the manager answers: ``?identity=<digest>&member=<id>`` and ``&lost=<id>`` of an agent that failed.
TREE_PATH = "/tree"
#: Topologies that a manager keeps.
MANAGED = ROOTED, REDIRECT, BALANCED = "rooted", "redirect", "balanced"
#: Most ancestors in an answer.
MOST_ABOVE = 32

_MOST_GROUPS = 1024
_ASK_S = 0.5
# A place is renewed this often while blocks are read; the shortest expiry of a place is a minute.
_FRESH_S = 20.0
_PAUSE_S = 5.0
_MOST_ANSWER = 64 << 10


class Trees(Protocol):
    """Gives ancestors. Thread-safe."""

    def above(self, group: Group, failing: Collection[str]) -> tuple[str, ...]:
        """Return this agent's ancestors, the parent first; ``failing`` are agents that do not answer it."""
        ...


class ComputedTrees:
    """Rendezvous trees over all agents of the list."""

    def __init__(self, own_id: str, members: Members, arity: int) -> None:
        self._own_id, self._members, self._arity = own_id, members, arity
        self._lock = threading.Lock()
        self._known: Mapping[str, Member] = {}
        self._trees = Rendezvous(arity)
        self._above: dict[Group, tuple[str, ...]] = {}

    def above(self, group: Group, failing: Collection[str]) -> tuple[str, ...]:
        """Return the ancestors in the tree of a chunk, failing or not."""
        with self._lock:
            if self._known is not self._members.known or len(self._above) > _MOST_GROUPS:
                self._known, self._trees = self._members.known, Rendezvous(self._arity)
                self._above.clear()
            found = self._above.get(group)
            if found is None:
                self._trees.admit(group, self._known)
                found = self._above[group] = _ancestors(self._trees, group, self._own_id, 0.0)
            return found


class Place(msgspec.Struct, forbid_unknown_fields=False):
    """The manager's answer: the ancestors of the agent that asked, its parent first."""

    above: list[str]


class ManagedTrees:
    """Trees that the agent ``manager`` keeps."""

    def __init__(self, own_id: str, manager: str, members: Members, key: bytes, transport: Transport) -> None:
        self._own_id, self._manager, self._members, self._key = own_id, manager, members, key
        self._transport = transport
        self._lock = threading.Lock()
        # By group: the ancestors, the time of the answer, and the parent that was reported as lost.
        self._places: OrderedDict[Group, tuple[tuple[str, ...], float, str]] = OrderedDict()
        self._silent_until = 0.0

    def above(self, group: Group, failing: Collection[str]) -> tuple[str, ...]:
        """Return the last known ancestors; ask for them if they are old, or if the parent fails."""
        group, now = Group(group.identity), time.monotonic()
        with self._lock:
            above, at, reported = self._places.get(group, ((), 0.0, ""))
            known = group in self._places
        lost = above[0] if above and above[0] in failing else ""
        if (known and now < at + _FRESH_S and lost in ("", reported)) or now < self._silent_until:
            return above
        try:
            above = self._ask(group.identity, lost)
        except (RegistryError, msgspec.DecodeError) as error:
            self._silent_until = time.monotonic() + _PAUSE_S
            logger.warning("the manager of the trees, %s, does not answer: %s", self._manager, error)
            return above
        with self._lock:
            self._places[group] = (above, now, lost)
            self._places.move_to_end(group)
            if len(self._places) > _MOST_GROUPS:
                self._places.popitem(last=False)
        return above

    def _ask(self, identity: str, lost: str) -> tuple[str, ...]:
        member = self._members.known.get(self._manager)
        if member is None:
            raise RegistryError(f"{self._manager} is not in the list of agents")
        target = f"{TREE_PATH}?{urlencode({'identity': identity, 'member': self._own_id, 'lost': lost})}"
        headers = {HOPS_HEADER: self._own_id}
        if self._key:
            headers[SIGNATURE_HEADER] = sign(self._key, self._manager, target, headers, time.time())
        doing = "asking for a place in the tree"
        answer = self._transport.send(
            "GET", f"http://{member.address}{target}", headers, doing=doing, call=Call(time.monotonic() + _ASK_S)
        )
        if answer.status != 200:
            raise from_response(answer, doing)
        place = msgspec.json.decode(read_small(answer, _MOST_ANSWER, doing), type=Place)
        return tuple(each for each in place.above[:MOST_ABOVE] if each != self._own_id)


class Manager:
    """Keeps the trees of all agents. Thread-safe; its own agent asks it directly, as one of :class:`Trees`."""

    def __init__(
        self,
        own_id: str,
        members: Members,
        topology: str,
        arity: int,
        alive: Callable[[str], bool] = is_alive,
    ) -> None:
        self._own_id, self._members, self._name, self._arity = own_id, members, topology, arity
        self._alive = alive
        self._lock = threading.Lock()
        self._topology = self._made()
        self._groups: set[Group] = set()
        #: Agents that left trees, and those that got another parent by that.
        self.left, self.moved = 0, 0

    def above(self, group: Group, failing: Collection[str]) -> tuple[str, ...]:
        """Return the manager's own ancestors."""
        own = Group(group.identity)
        lost = next((each for each in failing if each in self.place(own.identity, self._own_id, "")), "")
        return self.place(own.identity, self._own_id, lost)

    def place(self, identity: str, member: str, lost: str) -> tuple[str, ...]:
        """Return the ancestors of a member. Take ``lost`` out of the tree first if it does not answer here either.

        Otherwise a single member could put any other one out of its place.
        """
        group, now = Group(identity), time.monotonic()
        known = self._members.known
        gone = lost in known and lost not in (member, self._own_id) and not self._alive(known[lost].address)
        with self._lock:
            if group not in self._groups and len(self._groups) >= _MOST_GROUPS:
                self._topology, self._groups = self._made(), set()
            self._groups.add(group)
            if gone:
                moved = self._topology.leave(group, lost, now)
                self.left, self.moved = self.left + 1, self.moved + len(moved)
            self._topology.join(group, member, now)
            return _ancestors(self._topology, group, member, now)

    def _made(self) -> Topology:
        if self._name == ROOTED:
            return RootedTree(self._own_id, self._arity)
        if self._name == REDIRECT:
            return RedirectTree(self._own_id, Random(), self._arity)
        if self._name == BALANCED:
            return BalancedTree()
        raise ValueError(f"topology of a manager: wanted one of {', '.join(MANAGED)} (got {self._name!r})")


def _ancestors(topology: Topology, group: Group, member: str, now: float) -> tuple[str, ...]:
    parents = topology.parents(group, now)
    found: list[str] = []
    at = parents.get(member)
    while at is not None and len(found) < MOST_ABOVE:
        found.append(at)
        at = parents.get(at)
    return tuple(found)
