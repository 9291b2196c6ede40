"""Starting an agent: its options are checked, its key is read, and its parts are put together."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.peers.agent.agent import Agent, Options
from obdlab.peers.agent.asked import Rules, is_id
from obdlab.peers.agent.members import Members
from obdlab.peers.agent.server import PeerServer
from obdlab.peers.agent.signature import LEAST_KEY
from obdlab.peers.agent.trees import MANAGED
from obdlab.registry.reference import canonical_host, is_metadata

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from obdlab.settings.settings import Settings

_MOST_KEY = 4096


class PeerOptionsError(ObdlabError, code="peer-options"):
    """An agent cannot be started with these options."""


class PeerService:
    """A running agent: :meth:`run` in a thread, :meth:`stop` in the end."""

    def __init__(self, server: PeerServer, members: Members, own_id: str) -> None:
        self._server, self._members = server, members
        self.own_id = own_id

    @property
    def agent(self) -> Agent:
        """The agent that is served."""
        return self._server.agent

    @property
    def address(self) -> str:
        """``host:port`` at which it listens."""
        return _address(self._server)

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        self._members.watch()
        self._server.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """End :meth:`run`, and all that the agent does."""
        self._server.shutdown()
        self._server.server_close()
        self.agent.close()


def start(
    settings: Settings,
    *,
    listen: tuple[str, int],
    own_id: str,
    prefix: str,
    registries: Collection[str],
    plain_http: Collection[str],
    members: str,
    key_path: Path | None,
    topology: str,
    manager: str,
    arity: int,
    unchecked: bool,
    upload_limit: float,
) -> PeerService:
    """Return an agent that listens already. Raises ObdlabError for options that cannot work."""
    prefix = prefix.strip("/")
    if not (prefix.isascii() and prefix.isprintable() and prefix) or set(prefix) & set(" %?#") or prefix == "v2":
        raise PeerOptionsError(f"prefix: wanted a plain path, and not v2 (got {prefix[:100]!r})")
    for host in registries:
        if is_metadata(host):
            raise PeerOptionsError(f"registry: {host} is the address of a cloud's metadata service")
    if own_id and not is_id(own_id):
        raise PeerOptionsError(f"id: wanted a name without spaces, commas and slashes (got {own_id[:100]!r})")
    if members and not own_id and listen[0] in ("", "0.0.0.0", "::"):
        raise PeerOptionsError(f"id: needed with --listen {listen[0]}, as the list of agents has another address")
    if (topology in MANAGED) != bool(manager):
        raise PeerOptionsError(f"manager: needed for the topologies {', '.join(MANAGED)}, and for no others")
    key = b"" if key_path is None else read_key(key_path)
    rules = Rules(prefix, frozenset(map(canonical_host, registries)), frozenset(plain_http))
    # The socket comes first: with port 0 its port is part of the id.
    server = PeerServer(listen, upload_limit)
    try:
        own_id = own_id or _address(server)
        options = Options(own_id, rules, key, topology, manager, arity, unchecked)
        known = Members(members, own_id)
        server.agent = Agent(settings, options, known)
    except BaseException:
        server.server_close()
        raise
    return PeerService(server, known, own_id)


def read_key(path: Path) -> bytes:
    """Return the key in a file, stripped. Raises PeerOptionsError, also if other users may read the file."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(_MOST_KEY + 1).strip()
    except OSError as error:
        raise PeerOptionsError(f"key: {path}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PeerOptionsError(f"key: {path}: others may read it (got mode {stat.S_IMODE(mode):o}, wanted 600)")
    if not LEAST_KEY <= len(key) <= _MOST_KEY:
        raise PeerOptionsError(f"key: {path}: wanted {LEAST_KEY} to {_MOST_KEY} bytes (got {len(key)})")
    return key


def _address(server: PeerServer) -> str:
    host, port = server.server_address[:2]
    return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"
