"""Image references and the repositories they name (the grammar of docker's reference package)."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from obdlab.errors import FormatError
from obdlab.formats.oci import check_digest, is_digest

DEFAULT_HOST = "docker.io"
#: Cloud metadata services, besides link-local addresses; they give out the machine's own credentials.
METADATA = frozenset({ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")})
# Docker Hub's API has another host than its references.
_API_HOSTS = {"docker.io": "registry-1.docker.io"}
_HOST_ALIASES = {"index.docker.io": "docker.io", "registry-1.docker.io": "docker.io"}

_MAX_NAME = 255
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::(?P<port>[0-9]{{1,5}}))?", re.ASCII)
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository on a registry. ``host`` is as in references ("docker.io"), with its port if it has one."""

    host: str
    name: str
    plain_http: bool = False
    #: The host that serves the API.
    api_host: str = field(init=False, repr=False, compare=False)
    #: ``scheme://host/v2/name``, without a slash at the end.
    api_url: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once, as every request needs them.
        host = _API_HOSTS.get(self.host, self.host)
        object.__setattr__(self, "api_host", host)
        scheme = "http" if self.plain_http else "https"
        object.__setattr__(self, "api_url", f"{scheme}://{host}/v2/{self.name}")

    def __str__(self) -> str:
        return f"{self.host}/{self.name}"

    @property
    def blobs_url(self) -> str:
        """``scheme://host/v2/name/blobs``: the URL of a blob without its digest (overlaybd's repoBlobUrl)."""
        return f"{self.api_url}/blobs"

    @property
    def cache_name(self) -> str:
        """The cache's name for the origin of its blobs: the registry, over TLS or not."""
        return self.api_host.lower() + ("+http" if self.plain_http else "")

    @classmethod
    def from_blob_url(cls, url: str) -> Self:
        """Parse ``scheme://host/v2/name/blobs``, optionally with a digest at the end. Raises FormatError."""
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        path = parts.path.strip("/").split("/")
        if path and is_digest(path[-1]):
            path.pop()
        name = "/".join(path[1:-1])
        well_formed = (
            parts.scheme in ("http", "https")
            and not parts.query
            and not parts.fragment
            and len(path) >= 3
            and (path[0], path[-1]) == ("v2", "blobs")
            and _is_host(parts.netloc)
            and _is_name(name)
        )
        if not well_formed:
            raise FormatError("not a blob URL", got=repr(url[:200]), wanted="http(s)://host/v2/<name>/blobs")
        return cls(_HOST_ALIASES.get(parts.netloc, parts.netloc), name, plain_http=parts.scheme == "http")


@dataclass(frozen=True, slots=True)
class Reference:
    """An image: a repository and a tag or a digest (with both, the digest decides)."""

    host: str
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``[host/]name[:tag][@digest]``; without tag and digest the tag is "latest".

        Docker's defaults apply: "redis" is docker.io/library/redis. Raises FormatError.
        """
        rest, at, digest = text.partition("@")
        if at:
            check_digest(digest, f"reference {text[:200]!r}")
        tag: str | None = None
        colon = rest.rfind(":")
        if colon > rest.rfind("/"):  # a colon before a slash belongs to a port
            rest, tag = rest[:colon], rest[colon + 1 :]
            if _TAG.fullmatch(tag) is None:
                raise FormatError("malformed tag", blob=f"reference {text[:200]!r}", got=repr(tag[:200]))
        host, name = _split_host(rest)
        if not _is_host(host) or not _is_name(name):
            raise FormatError(
                "malformed image reference", got=repr(text[:200]), wanted="[host/]name[:tag][@sha256:...], lower case"
            )
        if tag is None and not at:
            tag = "latest"
        return cls(host, name, tag, digest or None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"

    @property
    def repo(self) -> Repository:
        """The repository, over plain HTTP for a loopback host (RegistryClient.repository knows configured ones)."""
        return Repository(self.host, self.repository, plain_http=is_loopback(self.host))

    @property
    def target(self) -> str:
        """The last part of a manifest's URL: the digest, else the tag."""
        return self.digest or self.tag or "latest"

    def with_digest(self, digest: str) -> Reference:
        """Return the same image pinned to ``digest``."""
        return Reference(self.host, self.repository, self.tag, check_digest(digest))


def is_loopback(host: str) -> bool:
    """Return True if ``host[:port]`` is "localhost" or a literal loopback address."""
    address = literal_address(_bare(host))
    return _bare(host) == "localhost" or (address is not None and address.is_loopback)


def is_metadata(host: str) -> bool:
    """Return True if ``host[:port]`` is a literal address at which clouds answer with the machine's credentials."""
    address = literal_address(_bare(host))
    return address is not None and (address.is_link_local or address in METADATA)


def literal_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host without a port spells, in any form that programs accept, or None.

    An IPv4 address inside an IPv6 one is returned as IPv4.
    """
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(host))  # "127.1", "0x7f000001"
        except (OSError, UnicodeError):
            return None
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.sixtofour or address
    return address


def _bare(host: str) -> str:
    return host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def canonical_host(host: str) -> str:
    """Return the name that references use for ``host`` (docker.io has several)."""
    return _HOST_ALIASES.get(host, host)


def _split_host(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    # As in docker, a first component without dot, port or capital letter is part of the name.
    if slash and (first == "localhost" or any(c in first for c in ".:[") or first != first.lower()):
        return canonical_host(first), rest if canonical_host(
            first
        ) != DEFAULT_HOST or "/" in rest else f"library/{rest}"
    return DEFAULT_HOST, text if slash else f"library/{text}"


def _is_host(host: str) -> bool:
    match = _HOST.fullmatch(host) if len(host) <= _MAX_NAME else None
    return match is not None and 0 < int(match["port"] or 1) < 65536


def _is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None
