"""The parts of a request to an agent: which blob, of which registry, with which hash tree, and by which way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from obdlab.errors import FormatError
from obdlab.formats.hashtree import TreeReference
from obdlab.formats.oci import is_digest
from obdlab.registry.p2p import BLOB_HEADER, TREE_HEADER
from obdlab.registry.reference import Repository, canonical_host, is_loopback

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

#: The agents that a request has passed, separated by commas. A request without it comes from a reader.
HOPS_HEADER = "X-Obdlab-Hops"
#: A request that has passed more agents is refused, as one that goes round in a circle.
MOST_HOPS = 32

_ID = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9.:_\[\]-]{0,254}", re.ASCII)
# Digests in the paths of registries and of the storage behind them (docker distribution's layout).
_IN_PATH = re.compile(r"sha256(?::|/[0-9a-f]{2}/)([0-9a-f]{64})(?![0-9a-f])", re.ASCII)
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


class RefusedError(Exception):
    """The agent answers a request with this status and message, and does nothing else."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Asked:
    """A blob that a request names. ``hops`` are the ids of the agents that it has passed."""

    repository: Repository
    digest: str
    tree: TreeReference | None = None
    hops: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """The blob's URL at its registry."""
        return f"{self.repository.blobs_url}/{self.digest}"


@dataclass(frozen=True, slots=True)
class Rules:
    """The requests that an agent accepts: the first part of their paths, and their registries.

    Without the list of registries, any client could make the agent send requests to any address: it would be an open
    proxy, also into the network behind it.
    """

    prefix: str
    registries: Collection[str]
    plain_http: Collection[str] = frozenset()

    def parse(self, target: str, headers: Mapping[str, str], own_id: str) -> Asked:
        """Return the blob of ``/<prefix>/<URL>`` or ``/v2/<name>/blobs/<digest>?ns=<registry>``.

        Raises RefusedError: 400 for a URL that is no blob's or whose digest is another one, 403 for a registry that
        is not listed, 404 for another path, 508 if the request has passed this agent already.
        """
        repository, digest = self._blob(target, headers.get(BLOB_HEADER, ""))
        if not {repository.host, repository.api_host} & set(self.registries):
            raise RefusedError(
                HTTPStatus.FORBIDDEN, f"{repository.host} is not a registry of this agent (option --registry)"
            )
        if repository.plain_http and not is_plain(repository.host, self.plain_http):
            raise RefusedError(
                HTTPStatus.FORBIDDEN, f"{repository.host} is not a registry without TLS (--plain-http)"
            )
        hops = tuple(each.strip() for each in headers.get(HOPS_HEADER, "").split(",") if each.strip())
        if not all(map(is_id, hops)):
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{HOPS_HEADER}: malformed")
        if own_id in hops or len(hops) > MOST_HOPS:
            raise RefusedError(HTTPStatus.LOOP_DETECTED, "the request has been here")
        text = headers.get(TREE_HEADER, "")
        try:
            tree = TreeReference.parse(text, TREE_HEADER) if text else None
        except FormatError as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error
        return Asked(repository, digest, tree, hops)

    def _blob(self, target: str, named: str) -> tuple[Repository, str]:
        if target.startswith("/v2/"):
            return self._mirrored(target)
        beginning = f"/{self.prefix}/"
        if not target.startswith(beginning):
            raise RefusedError(HTTPStatus.NOT_FOUND, f"only {beginning}<URL of a blob> is served")
        url = target.removeprefix(beginning)
        if not named:
            return _parsed(url)
        # The reader was redirected: the URL is a storage's, which may be signed, and the header has the registry's.
        repository, digest = _parsed(named)
        try:
            found = _IN_PATH.findall(urlsplit(url).path)
        except ValueError:
            found = [""]
        if any(f"sha256:{each}" != digest for each in found):
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"the URL is of another blob than {BLOB_HEADER}")
        return repository, digest

    def _mirrored(self, target: str) -> tuple[Repository, str]:
        parts = urlsplit(target)
        hosts = parse_qs(parts.query).get("ns", [])
        if len(hosts) != 1 or "/blobs/" not in parts.path:
            raise RefusedError(HTTPStatus.NOT_FOUND, "only blobs of a registry (?ns=) are served")
        host = hosts[0]
        plain = is_plain(host, self.plain_http)
        return _parsed(f"{'http' if plain else 'https'}://{canonical_host(host)}{parts.path}")


def is_plain(host: str, plain_http: Collection[str]) -> bool:
    """Return True if a registry is asked without TLS: a loopback one, or a listed one."""
    return is_loopback(host) or bool({host, host.rpartition(":")[0]} & set(plain_http))


def is_id(text: str) -> bool:
    """Return True if ``text`` may be an agent's id: an address, or a name without commas and spaces."""
    return _ID.fullmatch(text) is not None


def _parsed(url: str) -> tuple[Repository, str]:
    digest = url.rpartition("/")[2]
    if not is_digest(digest):
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the URL does not end with a blob's digest")
    try:
        return Repository.from_blob_url(url), digest
    except FormatError as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error


def parse_range(text: str, size: int) -> tuple[int, int]:
    """Return begin and end (exclusive) of a Range header's one range. Raises RefusedError (416)."""
    match = _RANGE.fullmatch(text)
    first, last = (match[1], match[2]) if match else ("", "")
    if first:
        begin, end = int(first), min(int(last) + 1, size) if last else size
    else:
        begin, end = max(0, size - int(last or 0)), size
    if not (first or last) or begin >= end:
        raise RefusedError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"not one range of {size} bytes")
    return begin, end
