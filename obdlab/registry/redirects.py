"""Checks of redirects: the allowed targets, and the credentials for them: only those of the very host."""

from __future__ import annotations

from urllib.parse import urljoin, urlsplit

from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import METADATA, literal_address

_PORTS = {"http": 80, "https": 443}


def redirected(url: str, location: str, doing: str) -> str:
    """Return the target of a redirect of ``url``.

    Raises RegistryError if it is malformed, goes from TLS to plain HTTP, or from elsewhere to a local address.
    """
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        usable = bool(location) and parts.scheme in ("http", "https") and bool(parts.hostname)
        usable = usable and target.isprintable() and not set(" \\") & set(target) and "@" not in parts.netloc
        usable = usable and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise RegistryError(f"{doing}: redirect without a usable Location")
    if url.startswith("https:") and parts.scheme != "https":
        raise RegistryError(f"{doing}: redirect from TLS to plain HTTP refused")
    check_not_local(url, target, doing)
    return target


def check_not_local(url: str, target: str, doing: str) -> None:
    """Raise RegistryError if ``url``, on another machine, redirects to one that only this machine can reach.

    Names are not resolved: the server behind a name has a certificate for it, or the user chose plain HTTP.
    """
    host = urlsplit(target).hostname or ""
    if _is_local(host) and not _is_local(urlsplit(url).hostname or ""):
        raise RegistryError(f"{doing}: redirect to an address of this machine refused (got {host[:80]!r})")


def origin(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of a URL: credentials for one origin must not go to another."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme)


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = literal_address(host)
    if address is None:
        return False
    return (
        address.is_loopback
        or address.is_link_local
        or address.is_unspecified
        or address.is_multicast
        or address in METADATA
    )
