"""The questions that an agent or a simulator asks a topology, and the topology without peers."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple, Protocol


class Group(NamedTuple):
    """The hosts that share one thing: a layer, an image, or a chunk of a blob.

    Attributes:
        identity: name of the blob or image, such as its digest.
        chunk: index of the chunk, for topologies with a tree per chunk.
    """

    identity: str
    chunk: int = 0


class Topology(Protocol):
    """Parents of hosts, per group. A parent of None is the origin. Times are in seconds and never go back."""

    def join(self, group: Group, member: str, now: float) -> str | None:
        """Return the parent for a request at `now`: the present one, else that of a new place. Renews the place."""
        ...

    def leave(self, group: Group, member: str, now: float) -> tuple[str, ...]:
        """Take a host out and return the others whose parent has changed, sorted. Hosts not in the group: none."""
        ...

    def parents(self, group: Group, now: float) -> dict[str, str | None]:
        """Return the parent of each host that is in the group at `now`."""
        ...


class Direct:
    """No peers: each host reads from the origin. The control of every comparison."""

    def __init__(self) -> None:
        self._members: defaultdict[Group, dict[str, None]] = defaultdict(dict)

    def join(self, group: Group, member: str, now: float) -> str | None:
        """Return None, the origin."""
        self._members[group][member] = None
        return None

    def leave(self, group: Group, member: str, now: float) -> tuple[str, ...]:
        """Take a host out; no other one is concerned."""
        self._members[group].pop(member, None)
        return ()

    def parents(self, group: Group, now: float) -> dict[str, str | None]:
        """Return None for each host of the group."""
        return dict(self._members[group])
