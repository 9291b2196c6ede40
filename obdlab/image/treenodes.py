"""The hash tree of one blob in use: its nodes are fetched when they are needed, checked up to the root, and kept.

The file of the tree is read through the block cache as any blob. A node that is wrong there is fetched again once,
past mirrors and proxies; so a wrong file, of any origin, ends in an error, and never in a wrong unit taken for right.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING

from obdlab.cache.fetchpool import FetchPool
from obdlab.errors import CorruptBlobError, ObdlabError, SourceError
from obdlab.formats.hashtree import (
    FAN_OUT,
    HASH_SIZE,
    NODE_SPAN,
    UNIT,
    NodeId,
    Shape,
    leaf_hash,
    node_hash,
    root_of,
)
from obdlab.observe.counters import CHECKSUM_FAILURES, CORRUPTIONS_HEALED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Blob, Buffer
    from obdlab.call import Call
    from obdlab.formats.hashtree import TreeReference

logger = logging.getLogger(__name__)

# Up to this size a tree's file, of a layer of 16 MiB, is fetched whole by the first request.
_SMALL_FILE = 32 << 10
# Nodes that are no further apart in the file are fetched by one request.
_GAP = 16 << 10

# As many as layers are opened at a time: opening waits for the nodes of all.
_pool = FetchPool(threads=32, queued=64)


class KeptNodes:
    """Checked nodes of all blobs of an image: the last ones used, 4 MiB at most, which cover 2 GiB. Thread-safe."""

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._nodes: OrderedDict[tuple[object, NodeId], bytes] = OrderedDict()

    def get(self, tree: TreeNodes, node: NodeId) -> bytes | None:
        """Return a node's bytes, if they are kept."""
        with self._lock:
            data = self._nodes.get((tree, node))
            if data is not None:
                self._nodes.move_to_end((tree, node))
            return data

    def put(self, tree: TreeNodes, node: NodeId, data: bytes) -> None:
        """Keep a node's bytes."""
        with self._lock:
            self._nodes[tree, node] = data
            if len(self._nodes) > self._most:
                self._nodes.popitem(last=False)


class TreeNodes:
    """Checks units of the blob ``digest`` of ``size`` bytes against the root of ``tree``. Thread-safe.

    ``file`` is the blob of the tree's file, with any content; None for a blob of one unit. This object owns it.
    ``origin`` is the same without a cache, for reading again.
    """

    unit = UNIT

    def __init__(
        self,
        blob: str,
        digest: str,
        size: int,
        tree: TreeReference,
        file: Blob | None,
        kept: KeptNodes,
        origin: Blob | None = None,
    ) -> None:
        self._blob = blob
        self._digest = digest
        self._root = tree.root
        self._shape = Shape(size)
        self._file = file
        self._origin = origin or file
        self._kept = kept
        self._lock = threading.Lock()
        self._requested: set[NodeId] = set()
        #: Name of the directory of the block cache with the checked units.
        self.name = tree.cache_name

    def close(self) -> None:
        """Close the tree's file."""
        if self._file is not None:
            self._file.close()

    def request(self, begin: int, end: int) -> None:
        """Begin to fetch, in other threads, the missing nodes for the bytes ``[begin, end)``. Never fails."""
        missing = self._missing(begin, end)
        with self._lock:
            missing = [node for node in missing if node not in self._requested]
            self._requested.update(missing)
        if missing:
            for run in self._runs(missing):
                if not _pool.submit(partial(self._fetch_run, run)):  # first_wrong() fetches them
                    self._end_of(run)

    def first_wrong(self, offset: int, data: Buffer, call: Call | None = None) -> int | None:
        """Return the offset of the first wrong unit in ``data``, whole units at ``offset``; None if all are right.

        Fetches missing nodes on the terms of the ``call``.
        Raises CorruptBlobError if the tree is wrong, and the errors of reading its file.
        """
        view = memoryview(data)
        end = offset + len(view)
        if offset % UNIT or (end % UNIT and end != self._shape.size):
            return offset  # cannot be checked
        if not self._shape.levels:
            return offset if root_of(self._shape.size, self._digest, leaf_hash(view)) != self._root else None
        number, node = -1, b""
        for unit in range(offset // UNIT, -(-end // UNIT)):
            if unit // FAN_OUT != number:
                number = unit // FAN_OUT
                node = self._node(NodeId(1, number), call)
            at = unit % FAN_OUT * HASH_SIZE
            begin = unit * UNIT - offset
            if leaf_hash(view[begin : begin + UNIT]) != node[at : at + HASH_SIZE]:
                return unit * UNIT
        return None

    def _node(self, node: NodeId, call: Call | None) -> bytes:
        kept = self._kept.get(self, node)
        if kept is not None:
            return kept
        offset, length = self._shape.place(node)
        data = self._read(self._file, offset, length, call)
        if not self._is_right(node, data, call):
            self._file_is_wrong(offset, length)
            # Through the cache, this thread could get the answer to a request that a mirror got before.
            data = self._read(self._origin, offset, length, call)
            if not self._is_right(node, data, call):
                raise CorruptBlobError(
                    "hash tree does not match its root", blob=self._blob, offset=node.number * NODE_SPAN
                )
            CORRUPTIONS_HEALED.add(label="tree")
        self._kept.put(self, node, data)
        return data

    # The hash of a node is in the node above, which is checked first; the top node's is in the root.
    def _is_right(self, node: NodeId, data: bytes, call: Call | None) -> bool:
        above = self._shape.above(node)
        found = node_hash(node, data)
        if above is None:
            return root_of(self._shape.size, self._digest, found) == self._root
        at = above[1] * HASH_SIZE
        return self._node(above[0], call)[at : at + HASH_SIZE] == found

    def _read(self, file: Blob | None, offset: int, length: int, call: Call | None) -> bytes:
        if file is None:
            raise CorruptBlobError("blob has a hash tree without a file", blob=self._blob)
        try:
            return file.read_at(offset, length, call)
        except ObdlabError as error:
            temporary = isinstance(error, SourceError) and error.temporary
            what = f"bytes cannot be checked without their hash tree: {error}"
            raise SourceError(what, blob=self._blob, temporary=temporary) from error

    def _file_is_wrong(self, offset: int, length: int) -> None:
        CHECKSUM_FAILURES.add(label="tree")
        logger.warning("%s: wrong bytes in the file of its hash tree at offset %d", self._blob, offset)
        if self._file is not None:
            self._file.evict(offset, length)

    # -- ahead of first_wrong() --------------------------------------------------------------------------------------

    def _missing(self, begin: int, end: int) -> list[NodeId]:
        # Returns the nodes for the range that are not kept, and those above them.
        levels = self._shape.levels
        first, last = begin // NODE_SPAN, max(begin, end - 1) // NODE_SPAN
        missing: list[NodeId] = []
        for level in range(1, levels + 1):
            above = [NodeId(level, number) for number in range(first, last + 1)]
            found = [node for node in above if self._kept.get(self, node) is None]
            if not found:
                break  # a kept node was checked by those above it
            missing += found
            first, last = first // FAN_OUT, last // FAN_OUT
        return missing

    def _runs(self, nodes: Sequence[NodeId]) -> Iterator[list[NodeId]]:
        gap = _SMALL_FILE if self._shape.file_size <= _SMALL_FILE else _GAP
        run: list[NodeId] = []
        for node in sorted(nodes):
            if run and self._shape.place(node)[0] - sum(self._shape.place(run[-1])) > gap:
                yield run
                run = []
            run.append(node)
        yield run

    def _end_of(self, run: Sequence[NodeId]) -> None:
        with self._lock:
            self._requested.difference_update(run)

    def _fetch_run(self, run: Sequence[NodeId]) -> None:
        try:
            if any(self._kept.get(self, node) is None for node in run):  # else first_wrong() was sooner
                self._fetch(run)
        finally:
            self._end_of(run)

    def _fetch(self, run: Sequence[NodeId]) -> None:
        begin, end = self._shape.place(run[0])[0], sum(self._shape.place(run[-1]))
        try:
            data = self._read(self._file, begin, end - begin, None)
            for node in reversed(run):  # those above come first
                offset, length = self._shape.place(node)
                content = data[offset - begin :][:length]
                if self._is_right(node, content, None):
                    self._kept.put(self, node, content)
        except ObdlabError as error:  # first_wrong() raises it
            logger.debug("%s: hash tree not fetched ahead: %s", self._blob, error)
