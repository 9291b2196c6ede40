"""The agent itself: the open blobs, the rights to them, and their checks."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING

from obdlab.cache.eviction import EvictingSpace
from obdlab.cache.flights import Statistics
from obdlab.cache.units import CachedUnits
from obdlab.formats.hashtree import Shape
from obdlab.image.registryaccess import open_client
from obdlab.image.treenodes import KeptNodes, TreeNodes
from obdlab.peers.agent.asked import Asked, RefusedError, Rules
from obdlab.peers.agent.fetcher import Fetcher, Wanted
from obdlab.peers.agent.rights import Rights
from obdlab.peers.agent.route import Router
from obdlab.peers.agent.sharedblob import Recent, SharedBlob, SharedFile
from obdlab.peers.agent.tallies import Tallies
from obdlab.peers.agent.trees import MANAGED, ComputedTrees, ManagedTrees, Manager
from obdlab.peers.agent.watch import LONGEST_SILENCE_S, Watch
from obdlab.registry.errors import RegistryError
from obdlab.registry.remoteblob import RemoteBlob
from obdlab.registry.transport import Transport

if TYPE_CHECKING:
    from obdlab.peers.agent.members import Members
    from obdlab.peers.agent.trees import Trees
    from obdlab.registry.reference import Repository
    from obdlab.settings.settings import Settings

logger = logging.getLogger(__name__)

#: A blob of at most this size without a hash tree is fetched whole from other agents, and checked by its digest. The
#: files of hash trees are such blobs; one of 4 MiB is that of a layer of 2 GiB.
MOST_WHOLE = 4 << 20
#: A transfer ends within this time; so does a reader's wait for its bytes.
DEADLINE_S = 30.0

#: Ways in which agents find the agents to ask.
TOPOLOGIES = NONE, RENDEZVOUS, *_ = "none", "rendezvous", *MANAGED

_MOST_OPEN = 512
_IDLE_S = 600.0
_TRANSFERS = 64
_TREE_TRANSFERS = 16


@dataclass(frozen=True, slots=True)
class Options:
    """How an agent works with others.

    Attributes:
        own_id: its id, the same on all hosts.
        rules: the requests that it accepts.
        key: the key that all agents share; b"": none, then only public blobs go from agent to agent.
        topology: one of TOPOLOGIES.
        manager: the id of the agent that keeps the trees, for those that need one.
        arity: most children of an agent in a tree.
        unchecked: True if blobs without a hash tree may come from other agents, though nothing checks them.
        memory: bytes of the latest transfers that are kept in memory.
    """

    own_id: str
    rules: Rules
    key: bytes = b""
    topology: str = RENDEZVOUS
    manager: str = ""
    arity: int = 2
    unchecked: bool = False
    memory: int = 64 << 20


class Agent:
    """Passes blobs on. Thread-safe; :meth:`close` it in the end.

    ``settings`` name the cache's directory and limits, the credentials and the certificates. Other settings of
    sources (mirrors, P2P proxies) do not count: the agent is one itself.
    """

    def __init__(self, settings: Settings, options: Options, members: Members) -> None:
        settings = replace(settings, p2p_address="", hosts_dir=None, read_deadline_s=DEADLINE_S)
        self.options = options
        self.tallies = Tallies()
        self._members = members
        self._unit = settings.cache_unit
        self._space = EvictingSpace(settings.cache_dir, quota=settings.cache_quota, min_free=settings.cache_min_free)
        plain = frozenset(options.rules.plain_http)
        own = open_client(settings, plain_http_hosts=plain)
        anonymous = open_client(replace(settings, credentials_mode="file", credentials_path=None))
        self._client = own
        self._rights = Rights(anonymous, own, Transport(silence_s=10.0, user_agent=settings.user_agent))
        self._transport = Transport(silence_s=2 * LONGEST_SILENCE_S, user_agent=settings.user_agent)
        self._closing = [own.close, anonymous.close, self._transport.close]
        self.manager: Manager | None = None
        self.router = Router(members, self._trees(options, members))
        self._watch = Watch()
        self._fetcher = Fetcher(
            options.own_id,
            options.rules.prefix,
            options.key,
            self.router,
            own,
            self._transport,
            self._watch,
            self.tallies,
            DEADLINE_S,
        )
        # A blob's transfers wait for those of its hash tree's file, which must not wait for their threads.
        self._pool = ThreadPoolExecutor(_TRANSFERS, "obdlab-peer-transfer")
        self._tree_pool = ThreadPoolExecutor(_TREE_TRANSFERS, "obdlab-peer-tree")
        self._recent = Recent(options.memory)
        self._nodes = KeptNodes()
        self._lock = threading.Lock()
        self._open: OrderedDict[object, SharedBlob] = OrderedDict()
        self.tallies.gauges |= {
            "members": ("Agents in the list, this one included", lambda: len(members.known)),
            "open_blobs": ("Blobs whose files are open", lambda: len(self._open)),
            "re_parented": ("Chunks of blobs that got another parent, so far", lambda: self.router.re_parented),
            "left": (
                "Agents that were taken out of trees that this one keeps",
                lambda: getattr(self.manager, "left", 0),
            ),
            "moved": ("Agents that got another parent by that", lambda: getattr(self.manager, "moved", 0)),
        }

    def _trees(self, options: Options, members: Members) -> Trees | None:
        if options.topology == NONE:
            return None
        if options.topology == RENDEZVOUS:
            return ComputedTrees(options.own_id, members, options.arity)
        if options.manager == options.own_id:
            self.manager = Manager(options.own_id, members, options.topology, options.arity)
            return self.manager
        return ManagedTrees(options.own_id, options.manager, members, options.key, self._transport)

    def open(self, asked: Asked, *, local: bool, trusted: bool, authorization: str) -> SharedBlob:
        """Return a blob for a caller, held; the caller releases it.

        A ``trusted`` caller is an agent that has signed the request: it has asked the registry itself whether its
        reader may have the blob. A ``local`` one may have a private blob if the registry accepts its
        ``authorization``; others get public blobs alone. Raises RefusedError, with the registry's status if it
        refuses the blob to this host, and RegistryError if the registry cannot be asked.
        """
        try:
            known = self._rights.of(asked.repository, asked.digest)
            allowed = known.public or trusted
            if not allowed and local and authorization:
                allowed = self._rights.admits(asked.repository, asked.digest, authorization)
        except RegistryError as error:
            if error.status in (401, 403, 404):
                raise RefusedError(HTTPStatus(error.status), f"the registry refuses: {error}") from error
            raise
        if not allowed:
            raise RefusedError(HTTPStatus.FORBIDDEN, "the blob is not public")
        return self._shared(asked, known.size, may_ask=known.public or bool(self.options.key))

    def waits_for(self, digest: str, offset: int) -> bool:
        """Return True if a blob's bytes at ``offset`` are on their way to this agent."""
        with self._lock:
            blobs = [blob for blob in self._open.values() if blob.wanted.asked.digest == digest]
        return any(blob.waits_for(offset) for blob in blobs)

    def is_member(self, id_: str) -> bool:
        """Return True if the agent is in the list."""
        return id_ in self._members.known

    def close(self) -> None:
        """End all transfers and threads."""
        self._watch.close()
        self._members.close()
        for pool in (self._pool, self._tree_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        for close in self._closing:
            close()

    def _shared(self, asked: Asked, size: int, *, may_ask: bool) -> SharedBlob:
        key = (asked.repository, asked.digest, asked.tree, may_ask)
        with self._lock:
            blob = self._open.get(key)
            if blob is not None and blob.hold():
                self._open.move_to_end(key)
                return blob
            if len(self._open) >= 2 * _MOST_OPEN:
                raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many blobs are in use")
        made = self._make(replace(asked, hops=()), size, may_ask=may_ask)
        made.hold()
        with self._lock:
            other = self._open.get(key)
            if other is not None and other.hold():
                made.release()
                made.close_unused()
                return other
            self._open[key] = made
        self._close_idle()
        return made

    def _make(self, asked: Asked, size: int, *, may_ask: bool) -> SharedBlob:
        repository, digest, tree = asked.repository, asked.digest, asked.tree
        name = f"{repository}@{digest}"
        if not size:
            raise RefusedError(HTTPStatus.NOT_FOUND, "an empty blob is not passed on")
        whole = tree is None and size <= MOST_WHOLE
        peers = may_ask and (tree is not None or whole or self.options.unchecked)
        nodes = None
        if tree is not None:
            file = self._tree_file(repository, tree.file, Shape(size).file_size, may_ask=may_ask)
            origin = None
            if file is not None:
                origin = RemoteBlob(self._client, repository, tree.file, file.size, deadline_s=DEADLINE_S)
            nodes = TreeNodes(name, digest, size, tree, file, self._nodes, origin)
            directory = nodes.name
        else:
            # Bytes that nothing has checked must not get into files that devices trust as the registry's.
            directory = repository.cache_name + ("+peers" if peers and not whole else "")
        unit = self._unit if nodes is None else max(self._unit, nodes.unit)
        place = self._space.blobs / directory / digest
        units = CachedUnits(self._space, place, size, unit, name, Statistics(), nodes)
        pool = self._pool if tree is not None else self._tree_pool
        wanted = Wanted(asked, size, nodes, whole, peers)
        return SharedBlob(wanted, units, nodes, self._fetcher, pool, self._recent, self.tallies)

    def _tree_file(self, repository: Repository, digest: str, size: int, *, may_ask: bool) -> SharedFile | None:
        if not size:
            return None
        # The header of a request chose the file. The blob that is opened here serves other readers of that file, too:
        # a size that is not the registry's would give them wrong answers.
        if self._rights.of(repository, digest).size != size:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the hash tree's file is not that of a blob of this size")
        return SharedFile(self._shared(Asked(repository, digest), size, may_ask=may_ask), DEADLINE_S)

    def _close_idle(self) -> None:
        now = time.monotonic()
        with self._lock:
            many = len(self._open) - _MOST_OPEN
            chosen = [
                (key, blob)
                for number, (key, blob) in enumerate(self._open.items())
                if number < many or blob.used + _IDLE_S < now
            ]
        for key, blob in chosen:
            if blob.close_unused():
                with self._lock:
                    if self._open.get(key) is blob:
                        del self._open[key]
