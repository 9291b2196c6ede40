"""DADI's tree: a root knows each layer's hosts and gives a newcomer the first free place, breadth-first."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque

from obdlab.peers.topology.interface import Group


class _Tree:
    def __init__(self, root: str) -> None:
        self.parent: dict[str, str] = {}
        self.children: dict[str, list[str]] = {root: []}
        self.seen: OrderedDict[str, float] = OrderedDict()  # least recent request first
        self.frontier = deque([root])  # breadth-first; the hosts before it are full


class RootedTree:
    """A k-ary tree per layer below a root that never leaves (DADI, section on P2P).

    A host that sent no request for `expiry` seconds loses its place; its children move, with all hosts below them.

    Args:
        root: name of the root, which reads from the origin and is no member.
        arity: most children of a host.
        expiry: seconds; DADI's default is about 20 minutes.
    """

    def __init__(self, root: str, arity: int = 2, expiry: float = 1200.0) -> None:
        if arity < 1 or expiry <= 0:
            raise ValueError(f"tree below {root}: wanted arity >= 1 and expiry > 0, got {arity} and {expiry}")
        self._root, self._arity, self._expiry = root, arity, expiry
        self._trees: defaultdict[Group, _Tree] = defaultdict(lambda: _Tree(root))

    def join(self, group: Group, member: str, now: float) -> str | None:
        """Return the host's parent; the root's own parent is the origin."""
        if member == self._root:
            return None
        tree = self._expired(group, now)
        tree.seen[member] = now
        tree.seen.move_to_end(member)
        if member not in tree.parent:
            tree.children[member] = []
            self._attach(tree, member)
        return tree.parent[member]

    def leave(self, group: Group, member: str, now: float) -> tuple[str, ...]:
        """Take a host out and return its children that stay, all of which have another parent now."""
        tree = self._expired(group, now)
        return tuple(sorted(self._remove(tree, [member]))) if member in tree.parent else ()

    def parents(self, group: Group, now: float) -> dict[str, str | None]:
        """Return the parents of hosts whose places have not expired."""
        return dict(self._expired(group, now).parent)

    def _expired(self, group: Group, now: float) -> _Tree:
        tree = self._trees[group]
        gone = []
        for member, seen in tree.seen.items():
            if seen + self._expiry > now:
                break
            gone.append(member)
        if gone:
            self._remove(tree, gone)
        return tree

    # Orphans keep the hosts below them. The walk begins at the root, so it cannot enter a subtree that is detached.
    def _remove(self, tree: _Tree, gone: list[str]) -> list[str]:
        orphans: dict[str, None] = {}
        for member in gone:
            tree.children[tree.parent.pop(member)].remove(member)
            del tree.seen[member]
        for member in gone:
            orphans.update(dict.fromkeys(tree.children.pop(member)))  # those that are gone were taken out above
        tree.frontier = deque([self._root])
        for orphan in orphans:
            self._attach(tree, orphan)
        return list(orphans)

    def _attach(self, tree: _Tree, member: str) -> None:
        while len(tree.children[tree.frontier[0]]) >= self._arity:
            tree.frontier.extend(tree.children[tree.frontier.popleft()])
        tree.parent[member] = tree.frontier[0]
        tree.children[tree.frontier[0]].append(member)
