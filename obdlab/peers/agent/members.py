"""The agents that pass blocks on to each other: a fixed list, a file, or the addresses of a name."""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import TYPE_CHECKING, NamedTuple

from obdlab.errors import ObdlabError
from obdlab.formats.decimal import decimal
from obdlab.peers.agent.asked import is_id

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

#: How often a file or a name is looked at again.
LOOK_EVERY_S = 5.0
_MOST = 10_000
_MOST_BYTES = 4 << 20


class MembersError(ObdlabError, code="peer-members"):
    """The list of agents is malformed or cannot be read."""


class Member(NamedTuple):
    """An agent: its id, which is the same on all hosts, and the ``host:port`` at which others reach it."""

    id: str
    address: str


def parse_members(text: str, where: str) -> dict[str, Member]:
    """Read agents, separated by commas, spaces or lines: ``host:port``, which is the id too, or ``id@host:port``.

    Lines may end with a comment after "#". Raises MembersError naming ``where``.
    """
    found: dict[str, Member] = {}
    for line in text.splitlines():
        for word in line.partition("#")[0].replace(",", " ").split():
            name, at, address = word.rpartition("@")
            host, _, port = address.rpartition(":")
            if not (host and port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536 and is_id(address)):
                raise MembersError(f"{where}: wanted host:port or id@host:port (got {word[:100]!r})")
            if at and not is_id(name):
                raise MembersError(f"{where}: malformed id (got {word[:100]!r})")
            found[name or address] = Member(name or address, address)
    if len(found) > _MOST:
        raise MembersError(f"{where}: too many agents (got {len(found)}, wanted at most {_MOST})")
    return found


class Members:
    """The present list. ``source``: ``static:LIST``, ``file:PATH`` or ``dns:NAME:PORT``; "" has no other agents.

    A source that fails later leaves the list as it is. :meth:`watch` looks at files and names again.
    Raises MembersError.
    """

    def __init__(self, source: str, own_id: str) -> None:
        self._kind, _, self._rest = source.partition(":")
        if source and (self._kind not in ("static", "file", "dns") or not self._rest):
            raise MembersError(f"members: wanted static:LIST, file:PATH or dns:NAME:PORT (got {source[:100]!r})")
        if self._kind == "dns":
            _name_and_port(self._rest)
        self._own = Member(own_id, "")
        self._closing = threading.Event()
        #: All agents by id, this one included. Replaced as a whole.
        self.known: Mapping[str, Member] = {own_id: self._own}
        self._text: str | None = None
        try:
            self.look()
        except MembersError as error:
            if self._kind != "dns":  # a name may have no addresses before the first agent is up
                raise
            logger.warning("%s", error)

    def look(self) -> bool:
        """Read the source. Return True if the list has changed. Raises MembersError."""
        text = self._read()
        if text == self._text:
            return False
        found = parse_members(text, f"members {self._kind}:{self._rest[:200]}")
        found[self._own.id] = self._own
        self._text = text
        changed = found != self.known
        self.known = found
        return changed

    def watch(self) -> None:
        """Look again every few seconds until :meth:`close`, in a thread of its own."""
        if self._kind in ("file", "dns"):
            threading.Thread(target=self._watch, name="obdlab-peer-members", daemon=True).start()

    def close(self) -> None:
        """End :meth:`watch`."""
        self._closing.set()

    def _watch(self) -> None:
        failing = False
        while not self._closing.wait(LOOK_EVERY_S):
            try:
                if self.look():
                    logger.info("%d agents", len(self.known))
                failing = False
            except MembersError as error:
                logger.log(logging.DEBUG if failing else logging.WARNING, "%s: the last list is kept", error)
                failing = True

    def _read(self) -> str:
        if self._kind == "file":
            return _read_file(self._rest)
        if self._kind == "dns":
            return _addresses(self._rest)
        return self._rest


def _read_file(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise MembersError(f"members file:{path}: {os.strerror(error.errno or 0)}") from error
    if len(data) > _MOST_BYTES:
        raise MembersError(f"members file:{path}: longer than {_MOST_BYTES} bytes")
    return data.decode("utf-8", "replace")


def _addresses(place: str) -> str:
    name, port = _name_and_port(place)
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as error:
        raise MembersError(f"members dns:{place}: cannot resolve ({error})") from error
    hosts = sorted({str(each[4][0]).partition("%")[0] for each in found})
    return " ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts)


def _name_and_port(place: str) -> tuple[str, int]:
    name, _, text = place.rpartition(":")
    port = decimal(text)
    if not name or port is None or not 0 < port < 65536:
        raise MembersError(f"members dns:{place[:200]}: wanted dns:NAME:PORT")
    return name, port
