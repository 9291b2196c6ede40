"""Mirrors of registries, asked before the registry. Read from containerd's hosts.toml files.

Source: containerd's "Registry Configuration" (``certs.d/<host>/hosts.toml``). A mirror gets the credentials that are
configured for its own host, never those of its registry.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlsplit

from obdlab.errors import ObdlabError
from obdlab.registry.reference import Repository
from obdlab.registry.standing import Absences, Standing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

_MAX_FILE = 1 << 20
# obdlab.registry.tls reads the last three.
_KNOWN_KEYS = {"capabilities", "header", "override_path", "ca", "client", "skip_verify"}
_KNOWN_CAPABILITIES = {"pull", "resolve", "push"}


class HostsError(ObdlabError, code="hosts"):
    """A hosts.toml file or a mirror's URL is malformed."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """A mirror. ``base`` is its API's URL including "/v2"; ``resolves``: it is also asked for the digest of a tag."""

    base: str
    resolves: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str, *, resolves: bool = True, headers: Mapping[str, str] | None = None) -> Self:
        """Read ``http(s)://host[:port][/path]``; appends "/v2". Raises HostsError."""
        return cls(f"{_checked(url)}/v2", resolves, headers or {})

    @property
    def host(self) -> str:
        """Host and port: the key of its credentials."""
        return urlsplit(self.base).netloc

    def repository(self, repository: Repository) -> Repository:
        """Return the repository at the mirror, for authentication."""
        return Repository(self.host, repository.name, plain_http=self.base.startswith("http:"))

    def url(self, repository: Repository, path: str) -> str:
        """Return the URL of ``<repository>/<path>``; ``ns`` names the registry to a mirror of several registries."""
        return f"{self.base}/{repository.name}/{path}?ns={quote(repository.host, safe='')}"


class Mirrors:
    """The mirrors of each registry, in the order in which they are asked. Thread-safe.

    ``table`` has them by registry host (as in references). For other hosts files in ``hosts_dir``, if given, are read
    when the host is first used: ``<host>/hosts.toml``, ``<host>_<port>_/hosts.toml``, else ``_default/hosts.toml``.
    """

    def __init__(self, table: Mapping[str, Sequence[Mirror]] | None = None, hosts_dir: Path | None = None) -> None:
        #: The mirrors of the hosts that were asked for.
        self.known = {host: tuple(mirrors) for host, mirrors in (table or {}).items()}
        self._hosts_dir = hosts_dir
        self._lock = threading.Lock()
        self._standings: dict[str, Standing] = {}
        self._absent = Absences()

    def of(self, repository: Repository) -> tuple[Mirror, ...]:
        """Return the mirrors of the repository's registry. Raises HostsError if its hosts.toml is damaged."""
        host = repository.host
        with self._lock:
            if host not in self.known:
                self.known[host] = _read_hosts(self._hosts_dir, host) if self._hosts_dir is not None else ()
            return self.known[host]

    def usable(self, mirror: Mirror, url: str) -> bool:
        """Return True if ``mirror`` may be asked for ``url`` at present."""
        return self._standing(mirror).usable() and url not in self._absent

    def worked(self, mirror: Mirror) -> None:
        """Note that ``mirror`` answered."""
        self._standing(mirror).worked()

    def failed(self, mirror: Mirror, cause: object) -> None:
        """Pass ``mirror`` over for a while."""
        self._standing(mirror).failed(cause)

    def lacks(self, url: str) -> None:
        """Skip ``url``, of a mirror, for a while."""
        self._absent.add(url)

    def _standing(self, mirror: Mirror) -> Standing:
        with self._lock:
            return self._standings.setdefault(mirror.base, Standing(f"mirror {mirror.base}"))


def parse_hosts(text: bytes, name: str) -> tuple[Mirror, ...]:
    """Read a hosts.toml file. Raises HostsError naming ``name``."""
    import tomllib  # most hosts have no such file

    try:
        document = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise HostsError(f"{name}: not TOML: {error}") from error
    hosts = document.get("host", {})
    if not isinstance(hosts, dict):
        raise HostsError(f'{name}: wanted [host."https://..."] tables')
    mirrors = [_mirror(url, entry, name) for url, entry in hosts.items()]
    return tuple(mirror for mirror in mirrors if mirror is not None)


def _mirror(url: str, entry: Any, name: str) -> Mirror | None:
    where = f"{name}: host {url[:200]!r}"
    if not isinstance(entry, dict):
        raise HostsError(f"{where}: wanted a table")
    capabilities = entry.get("capabilities", ["pull", "resolve"])
    if not isinstance(capabilities, list) or not all(isinstance(item, str) for item in capabilities):
        raise HostsError(f"{where}: capabilities: wanted a list of {sorted(_KNOWN_CAPABILITIES)}")
    unused = sorted(set(entry) - _KNOWN_KEYS)
    if unused:
        logger.warning("%s: not used: %s", where, ", ".join(unused))
    if "pull" not in capabilities:
        return None
    if "://" not in url:
        url = f"https://{url}"
    base = _checked(url, where) + ("" if entry.get("override_path") is True else "/v2")
    return Mirror(base, "resolve" in capabilities, _headers(entry.get("header", {}), where))


def _headers(table: Any, where: str) -> dict[str, str]:
    if not isinstance(table, dict):
        raise HostsError(f"{where}: header: wanted a table")
    headers = {}
    for key, value in table.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) and item.isprintable() for item in values) or not key.isprintable():
            raise HostsError(f"{where}: header {key[:80]!r}: wanted a text or a list of texts")
        headers[key] = ", ".join(values)
    return headers


def _checked(url: str, where: str = "mirror") -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or "@" in parts.netloc or not url.isprintable() or " " in url:
        raise HostsError(f"{where}: wanted http(s)://host[:port][/path] (got {url[:200]!r})")
    return url.rstrip("/")


def _read_hosts(directory: Path, host: str) -> tuple[Mirror, ...]:
    name, colon, port = host.rpartition(":")
    candidates = [host, f"{name}_{port}_" if colon else "", "_default"]
    for candidate in filter(None, candidates):
        path = directory / candidate / "hosts.toml"
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_FILE + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise HostsError(f"{path}: cannot be read: {error.strerror}") from error
        if len(text) > _MAX_FILE:
            raise HostsError(f"{path}: larger than {_MAX_FILE} bytes")
        return parse_hosts(text, str(path))
    return ()
