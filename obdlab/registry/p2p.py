"""A proxy of a peer-to-peer network, through which blobs are read while it is healthy.

There are three kinds. The first takes the target URL after its own prefix (``http://localhost:9731/accelerator``
of dadi-p2proxy). The second is an ordinary HTTP proxy (Dragonfly's dfdaemon: write ``http-proxy://127.0.0.1:4001``).
The third is a mirror that gets the registry's name in a header (dfdaemon's registry mirror); a hosts.toml file
describes it (:mod:`obdlab.registry.mirrors`).
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from obdlab.errors import ObdlabError
from obdlab.registry.reference import is_loopback
from obdlab.registry.standing import Absences, Standing

logger = logging.getLogger(__name__)

#: Headers for obdlab's own agent (:mod:`obdlab.peers.agent`); other proxies ignore them. The blob's URL at its
#: registry, if the request names the storage that the registry redirects to, and the hash tree that checks the blob.
BLOB_HEADER = "X-Obdlab-Blob"
TREE_HEADER = "X-Obdlab-Tree"
NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_CONNECT_S = 0.5
_CHECK_EVERY_S = 5.0
_CHECK_FAILING_EVERY_S = 1.0
_PROXY_SCHEME = "http-proxy"


class P2PAddressError(ObdlabError, code="p2p-address"):
    """The P2P proxy address is malformed."""


class P2PProxy:
    """A P2P proxy and its health. Thread-safe; connects at the first use."""

    def __init__(self, address: str) -> None:
        """Take ``http(s)://host[:port][/prefix]`` or ``http-proxy://host:port``. Raises P2PAddressError."""
        scheme, netloc, self._endpoint = parse_address(address)
        self.name = f"P2P proxy {address}"
        self._prefix = "" if scheme == _PROXY_SCHEME else address.rstrip("/")
        #: "http://host:port" if it is an ordinary HTTP proxy, else "".
        self.http_proxy = f"http://{netloc}" if scheme == _PROXY_SCHEME else ""
        self._standing = Standing(self.name, first_pause_s=1.0)
        self._absent = Absences()
        self._lock = threading.Lock()
        self._alive: bool | None = None
        self._checked = 0.0
        self._checking = False
        self._known = threading.Event()
        if scheme != "https" and not is_loopback(netloc):
            logger.warning("%s: gets tokens of registries over the network without TLS", self.name)

    def url(self, target: str) -> str:
        """Return the URL to request in place of ``target``."""
        return f"{self._prefix}/{target}" if self._prefix else target

    def usable(self, url: str) -> bool:
        """Return True if ``url`` should be read through the proxy. The first call waits, at most half a second."""
        now = time.monotonic()
        with self._lock:
            due = now - self._checked >= (_CHECK_EVERY_S if self._alive else _CHECK_FAILING_EVERY_S)
            begin = due and not self._checking
            self._checking |= begin
            first = begin and self._alive is None
        # In the background also the first time: the resolver that is asked for the proxy's name has no time-out.
        if begin and self._check_in_background() and first:
            self._known.wait(_CONNECT_S)
        return bool(self._alive) and self._standing.usable() and url not in self._absent

    def worked(self) -> None:
        """Note that a read through the proxy succeeded."""
        self._standing.worked()

    def failed(self, cause: object) -> None:
        """Bypass the proxy for a while."""
        self._standing.failed(cause)

    def lacks(self, url: str) -> None:
        """Bypass the proxy for this blob for a while: its data was wrong."""
        self._absent.add(url)

    def _check_in_background(self) -> bool:
        try:
            threading.Thread(target=self._check, name="obdlab-p2p-check", daemon=True).start()
        except RuntimeError:  # no thread available: the next read tries again
            with self._lock:
                self._checking = False
            return False
        return True

    def _check(self) -> None:
        try:
            socket.create_connection(self._endpoint, timeout=_CONNECT_S).close()
            alive, cause = True, ""
        except (OSError, UnicodeError) as error:  # the latter for a name that DNS cannot have
            alive, cause = False, str(error)
        with self._lock:
            before, self._alive = self._alive, alive
            self._checked = time.monotonic()
            self._checking = False
        if alive != (before is not False):
            logger.log(
                logging.INFO if alive else logging.WARNING,
                "%s: %s",
                self.name,
                "can be reached again" if alive else f"cannot be reached, blobs are read without it: {cause}",
            )
        self._known.set()


def parse_address(address: str) -> tuple[str, str, tuple[str, int]]:
    """Return scheme, network location, and the host and port to connect to. Raises P2PAddressError."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
        parts = urlsplit("")
    good = (
        bool(host)
        and port != 0
        and address.isprintable()
        and " " not in address
        and not (parts.query or parts.fragment or "@" in parts.netloc)
        and (parts.scheme in ("http", "https") or (parts.scheme == _PROXY_SCHEME and parts.path in ("", "/")))
    )
    if not good:
        raise P2PAddressError(
            f"P2P address: wanted http(s)://host[:port][/prefix] or http-proxy://host[:port] (got {address[:200]!r})"
        )
    return parts.scheme, parts.netloc, (host, port or (443 if parts.scheme == "https" else 80))
