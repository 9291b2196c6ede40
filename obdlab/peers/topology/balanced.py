"""FaaSNet's function tree: a height-balanced binary tree per image, whose root alone reads from the origin."""

from __future__ import annotations

from collections import deque

from obdlab.peers.topology.interface import Group


class _Node:
    __slots__ = ("height", "left", "name", "parent", "right")

    def __init__(self, name: str) -> None:
        self.name = name
        self.parent: _Node | None = None
        self.left: _Node | None = None
        self.right: _Node | None = None
        self.height = 0


def _height(node: _Node | None) -> int:
    return -1 if node is None else node.height


def _balance(node: _Node) -> int:
    return _height(node.left) - _height(node.right)


class _Tree:
    def __init__(self) -> None:
        self.root: _Node | None = None
        self.nodes: dict[str, _Node] = {}
        self.frontier: deque[_Node] = deque()  # breadth-first; the nodes before it have two children

    def insert(self, name: str) -> None:
        node = self.nodes[name] = _Node(name)
        if self.root is None:
            self.root = node
            self.frontier = deque([node])
            return
        while (at := self.frontier[0]).left is not None and at.right is not None:
            self.frontier.popleft()
            self.frontier.extend((at.left, at.right))
        if at.left is None:
            at.left = node
        else:
            at.right = node
        node.parent = at
        self._settle(at)

    def delete(self, name: str) -> None:
        gone = self.nodes.pop(name)
        if gone.left is None or gone.right is None:
            heir, lowest = gone.left or gone.right, gone.parent
        else:
            heir = self._first_leaf(gone)
            lowest = heir.parent if heir.parent is not gone else heir
            self._replace(heir, None)
            heir.left, heir.right = gone.left, gone.right
            for child in (heir.left, heir.right):
                if child is not None:
                    child.parent = heir
        self._replace(gone, heir)
        self._settle(lowest)
        self.frontier = deque([self.root] if self.root is not None else [])

    def _first_leaf(self, top: _Node) -> _Node:
        queue = deque([top])
        while (node := queue.popleft()).height:
            queue.extend(child for child in (node.left, node.right) if child is not None)
        return node

    # A root's heir has no parent: the prototype leaves the removed node there.
    def _replace(self, old: _Node, new: _Node | None) -> None:
        above = old.parent
        if above is None:
            self.root = new
        elif above.left is old:
            above.left = new
        else:
            above.right = new
        if new is not None:
            new.parent = above

    def _settle(self, node: _Node | None) -> None:
        while node is not None:
            self._measure(node)
            balance = _balance(node)
            if balance > 1 and node.left is not None:
                if _balance(node.left) < 0:
                    self._rotate(node.left, to_left=True)
                node = self._rotate(node, to_left=False)
            elif balance < -1 and node.right is not None:
                if _balance(node.right) > 0:
                    self._rotate(node.right, to_left=False)
                node = self._rotate(node, to_left=True)
            node = node.parent

    def _rotate(self, node: _Node, *, to_left: bool) -> _Node:
        pivot = node.right if to_left else node.left
        assert pivot is not None
        self._replace(node, pivot)
        if to_left:
            inner = node.right = pivot.left
            pivot.left = node
        else:
            inner = node.left = pivot.right
            pivot.right = node
        if inner is not None:
            inner.parent = node
        node.parent = pivot
        self._measure(node)
        self._measure(pivot)
        return pivot

    def _measure(self, node: _Node) -> None:
        node.height = 1 + max(_height(node.left), _height(node.right))

    def parents(self) -> dict[str, str | None]:
        return {name: node.parent.name if node.parent else None for name, node in self.nodes.items()}


class BalancedTree:
    """FaaSNet's tree: insertion at the first free place breadth-first, removal with rotations. Nothing expires.

    The rules are those of FaaSNet's prototype, apart from its defect on removing a root with one child.
    """

    def __init__(self) -> None:
        self._trees: dict[Group, _Tree] = {}

    def join(self, group: Group, member: str, now: float) -> str | None:
        """Return the host's parent; that of the first host is the origin."""
        tree = self._trees.setdefault(group, _Tree())
        if member not in tree.nodes:
            tree.insert(member)
        parent = tree.nodes[member].parent
        return parent.name if parent else None

    def leave(self, group: Group, member: str, now: float) -> tuple[str, ...]:
        """Take a host out and return the hosts with another parent.

        In the mean at most 1.4 while as many hosts join as leave; more in a tree that only shrinks.
        """
        tree = self._trees.get(group)
        if tree is None or member not in tree.nodes:
            return ()
        before = tree.parents()
        tree.delete(member)
        return tuple(sorted(name for name, parent in tree.parents().items() if parent != before[name]))

    def parents(self, group: Group, now: float) -> dict[str, str | None]:
        """Return the parent of each host in the image's tree."""
        tree = self._trees.get(group)
        return tree.parents() if tree else {}
