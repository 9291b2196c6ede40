"""Rendezvous hashing as DART does it: each host computes a chunk's tree from the list of hosts alone.

Hashes, order and tree are those of DART's protocol, so that hosts of both kinds agree on them.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping

from obdlab.peers.topology.interface import Group

_WORD = 2**64 - 1
_SEPARATOR = b"\x1f"


def _hash(data: bytes) -> int:
    value = 0xCBF29CE484222325  # FNV-1a
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & _WORD
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):  # murmur3's finaliser
        value = ((value ^ value >> 33) * factor) & _WORD
    return value ^ value >> 33


def chunk_key(identity: str, chunk: int, namespace: str = "dart") -> int:
    """Return the 64-bit key of a chunk of a blob; chunk -1 stands for the whole blob."""
    if "\x1f" in namespace:
        raise ValueError(f"namespace {namespace!r} has a separator (0x1F) in it")
    return _hash(_SEPARATOR.join((namespace.encode(), identity.encode(), struct.pack(">q", chunk))))


def host_hash(key: int, host: str) -> int:
    """Return the 64-bit hash of a host for a chunk's key."""
    return _hash(key.to_bytes(8, "little") + host.encode())


def epoch(weights: Mapping[str, float]) -> int:
    """Return the number by which hosts compare their lists of hosts and weights."""
    hosts = sorted((host.encode(), weight) for host, weight in weights.items())
    return _hash(b"".join(host + _SEPARATOR + struct.pack(">d", weight) + b"\x1e" for host, weight in hosts))


def rank(key: int, weights: Mapping[str, float]) -> list[str]:
    """Return the hosts, the chunk's owner first. Weights of 0 and below count as 1."""

    # Sorts by falling score; a unit of 1 (the highest hashes, by rounding) has the lowest score, not a division by 0.
    def place(host: str) -> tuple[float, bytes]:
        unit = (float(host_hash(key, host)) + 0.5) / 2.0**64
        weight = weights[host] if weights[host] > 0 else 1.0
        return (weight / math.log(unit) if unit < 1.0 else math.inf), host.encode()

    return sorted(weights, key=place)


def tree(order: list[str], arity: int = 2) -> dict[str, str | None]:
    """Return the parent of each host: the order is read as the pre-order of a tree with equal parts."""
    if arity < 1:
        raise ValueError(f"arity: wanted 1 or more, got {arity}")
    if not order:
        return {}
    parents: dict[str, str | None] = {order[0]: None}
    parts = [(0, len(order))]
    while parts:
        top, end = parts.pop()
        size, longer = divmod(end - top - 1, arity)
        begin = top + 1
        for part in range(arity):
            length = size + (part < longer)
            if length:
                parents[order[begin]] = order[top]
                parts.append((begin, begin + length))
                begin += length
    return parents


class Rendezvous:
    """A tree per chunk over the hosts that have joined, each of weight 1.

    Args:
        arity: most children of a host.
        namespace: of the chunks' keys; equal on all hosts.
    """

    def __init__(self, arity: int = 2, namespace: str = "dart") -> None:
        self._arity, self._namespace = arity, namespace
        self._members: defaultdict[Group, dict[str, float]] = defaultdict(dict)
        self._trees: dict[Group, dict[str, str | None]] = {}

    def join(self, group: Group, member: str, now: float) -> str | None:
        """Return the host's parent; the owner's is the origin. Other hosts' parents may change, as with any list."""
        if member not in self._members[group]:
            self._members[group][member] = 1.0
            self._trees.pop(group, None)
        return self._tree(group)[member]

    def leave(self, group: Group, member: str, now: float) -> tuple[str, ...]:
        """Take a host out and return all hosts whose parent is another one in the new tree."""
        if member not in self._members[group]:
            return ()
        before = self._tree(group)
        del self._members[group][member], self._trees[group]
        return tuple(sorted(host for host, parent in self._tree(group).items() if parent != before[host]))

    def parents(self, group: Group, now: float) -> dict[str, str | None]:
        """Return the parent of each host that has joined."""
        return dict(self._tree(group))

    def admit(self, group: Group, hosts: Iterable[str]) -> None:
        """Add hosts without asking for their parents: one tree is computed for all."""
        self._members[group].update(dict.fromkeys(hosts, 1.0))
        self._trees.pop(group, None)

    def _tree(self, group: Group) -> dict[str, str | None]:
        if group not in self._trees:
            key = chunk_key(group.identity, group.chunk, self._namespace)
            self._trees[group] = tree(rank(key, self._members[group]), self._arity)
        return self._trees[group]
