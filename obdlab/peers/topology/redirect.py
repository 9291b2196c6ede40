"""The tree that forms by redirects: a host takes two children and sends a third on to one of them (307)."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from random import Random

from obdlab.peers.topology.interface import Group


class _Tree:
    def __init__(self, root: str) -> None:
        self.parent: dict[str, str] = {}
        self.children: dict[str, list[str]] = {root: []}
        self.seen: OrderedDict[str, float] = OrderedDict()  # least recent request first


class RedirectTree:
    """The admission rule of dadi-p2proxy as intended: a newcomer walks down from the root to a free place.

    A request is taken to reach the root, so it renews the places above as well: a host never expires before
    those below it. (A host that answers from its cache sends no request, and may lose its place earlier.)

    Args:
        root: the host that reads from the origin; it is no member and never leaves.
        random: chooses the child to which a newcomer is sent.
        most_children: a third child is redirected by default.
        expiry: seconds after its last request until a child no longer counts.
    """

    def __init__(self, root: str, random: Random, most_children: int = 2, expiry: float = 60.0) -> None:
        if most_children < 1 or expiry <= 0:
            raise ValueError(
                f"tree below {root}: wanted children >= 1 and expiry > 0, got {most_children} and {expiry}"
            )
        self._root, self._random, self._most, self._expiry = root, random, most_children, expiry
        self._trees: defaultdict[Group, _Tree] = defaultdict(lambda: _Tree(root))

    def join(self, group: Group, member: str, now: float) -> str | None:
        """Return the host's parent; the root's own parent is the origin."""
        if member == self._root:
            return None
        tree = self._expired(group, now)
        if member not in tree.parent:
            tree.children[member] = []
            self._descend(tree, member)
        above = member
        while above != self._root:
            tree.seen[above] = now
            tree.seen.move_to_end(above)
            above = tree.parent[above]
        return tree.parent[member]

    def leave(self, group: Group, member: str, now: float) -> tuple[str, ...]:
        """Take a host out; its children begin at the root again, with all hosts below them."""
        tree = self._expired(group, now)
        if member not in tree.parent:
            return ()
        orphans = tree.children[member]
        self._forget(tree, member)
        for orphan in orphans:
            self._descend(tree, orphan)
            # The new places above must not expire before the subtree that has come below them.
            above = tree.parent[orphan]
            while above != self._root and tree.seen[above] < tree.seen[orphan]:
                tree.seen[above] = tree.seen[orphan]
                above = tree.parent[above]
        tree.seen = OrderedDict(sorted(tree.seen.items(), key=lambda item: item[1]))
        return tuple(sorted(orphans))

    def parents(self, group: Group, now: float) -> dict[str, str | None]:
        """Return the parents of hosts whose places have not expired."""
        return dict(self._expired(group, now).parent)

    def _expired(self, group: Group, now: float) -> _Tree:
        tree = self._trees[group]
        while tree.seen:
            member, seen = next(iter(tree.seen.items()))
            if seen + self._expiry > now:
                break
            self._forget(tree, member)
        return tree

    def _forget(self, tree: _Tree, member: str) -> None:
        siblings = tree.children.get(tree.parent.pop(member))
        if siblings is not None:  # else the parent expired at the same time
            siblings.remove(member)
        del tree.children[member], tree.seen[member]

    def _descend(self, tree: _Tree, member: str) -> None:
        at = self._root
        while len(tree.children[at]) >= self._most:
            at = self._random.choice(tree.children[at])
        tree.parent[member] = at
        tree.children[at].append(member)
