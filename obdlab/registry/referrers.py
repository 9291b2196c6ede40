"""Manifests that refer to another one (signatures, converted images): the referrers API, and tags in its place.

Source: OCI distribution specification 1.1, "Listing Referrers" and "Referrers Tag Schema". At a registry without the
API, the index under the tag ``sha256-<hex>`` is the list; a client that pushes a manifest with a subject updates it.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

from obdlab.call import Call
from obdlab.errors import FormatError
from obdlab.formats.oci import MAX_MANIFEST_SIZE, OCI_INDEX, Descriptor, Index, check_digest, digest_of, is_digest
from obdlab.registry.answer import read_small
from obdlab.registry.errors import RegistryError
from obdlab.registry.redirects import redirected
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Collection

    from obdlab.registry.answer import Answer
    from obdlab.registry.reference import Repository
    from obdlab.registry.session import Session

_MOST_PAGES = 64
# Of all pages: all entries of a list are kept at the same time.
_MOST_BYTES = 4 * MAX_MANIFEST_SIZE
_TRIES = 5
_NEXT = re.compile(r'<([^<>]{1,4096})>\s*;\s*rel="?next"?', re.ASCII)
_NO_API = (400, 404, 405, 501)


class Manifest(Protocol):
    """A fetched manifest."""

    @property
    def data(self) -> bytes: ...


class Manifests(Protocol):
    """The manifests of a registry's repositories (:class:`obdlab.registry.client.RegistryClient`)."""

    def get_manifest(self, ref: Reference, accept: Collection[str] = ..., *, helped: bool = True) -> Manifest: ...

    def put_manifest(self, ref: Reference, media_type: str, data: bytes) -> str: ...


def list_referrers(
    session: Session, client: Manifests, repository: Repository, digest: str, artifact_type: str | None
) -> tuple[Descriptor, ...]:
    """Return the descriptors of the manifests whose subject is ``digest``. Raises RegistryError or FormatError."""
    check_digest(digest, str(repository))
    try:
        found = _from_api(session, repository, digest, artifact_type)
    except RegistryError as error:
        if error.status not in _NO_API:
            raise
        found = _from_tag(client, repository, digest).manifests
    # Registries may leave the filtering to the client.
    return tuple(each for each in found if artifact_type in (None, each.extra.get("artifactType")))


def subject_of(data: bytes) -> str | None:
    """Return the digest of the subject of a manifest or index, or None."""
    try:
        subject = json.loads(data).get("subject")
        return subject["digest"] if subject is not None and is_digest(subject["digest"]) else None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def add_to_tag(client: Manifests, repository: Repository, subject: str, media_type: str, data: bytes) -> None:
    """Add a manifest to the index of referrers of ``subject``, at a registry without the referrers API.

    Two clients that do so at the same time may lose one entry: the registry cannot prevent it. Raises RegistryError.
    """
    entry = _descriptor(media_type, data)
    index = _from_tag(client, repository, subject)
    others = tuple(each for each in index.manifests if each.digest != entry.digest)
    if len(others) != len(index.manifests):
        return
    changed = replace(index, manifests=(*others, entry))
    client.put_manifest(_tagged(repository, subject), OCI_INDEX, changed.to_bytes())


def drop_from_tag(client: Manifests, repository: Repository, subject: str, digest: str) -> bool:
    """Undo :func:`add_to_tag`. Return True if there was an entry. Raises RegistryError."""
    index = _from_tag(client, repository, subject)
    others = tuple(each for each in index.manifests if each.digest != digest)
    if len(others) == len(index.manifests):
        return False
    client.put_manifest(_tagged(repository, subject), OCI_INDEX, replace(index, manifests=others).to_bytes())
    return True


def _from_api(
    session: Session, repository: Repository, digest: str, artifact_type: str | None
) -> tuple[Descriptor, ...]:
    doing = "listing referrers"
    path = f"referrers/{digest}" + (f"?artifactType={quote(artifact_type, safe='')}" if artifact_type else "")
    found: tuple[Descriptor, ...] = ()
    size = 0
    whole = Call(time.monotonic() + session.deadline_s)
    for _ in range(_MOST_PAGES):

        def read(response: Answer) -> tuple[bytes, str]:
            kind = response.headers.get("content-type", "").partition(";")[0].strip()
            if kind != OCI_INDEX:
                # Some registries answer unknown paths with an HTML page.
                raise RegistryError(f"{doing}: not an index (got {kind[:80]!r})", status=404)
            return read_small(response, MAX_MANIFEST_SIZE, doing), response.headers.get("link", "")

        def attempt(call: Call, path: str = path) -> tuple[bytes, str]:
            return session.get(
                repository, path, {"Accept": OCI_INDEX}, read, doing=doing, wanted=(200,), call=call, helped=False
            )

        data, link = session.persist(attempt, blob=f"{repository}@{digest}", call=whole, tries=_TRIES)
        size += len(data)
        if size > _MOST_BYTES:
            raise RegistryError(f"{doing}: list longer than {_MOST_BYTES} bytes", blob=f"{repository}@{digest}")
        found += Index.parse(data, f"{repository}: referrers of {digest}").manifests
        match = _NEXT.search(link)
        if match is None:
            return found
        path = _next_path(repository, path, match[1], doing)
    raise RegistryError(f"{doing}: more than {_MOST_PAGES} pages", blob=f"{repository}@{digest}")


def _next_path(repository: Repository, path: str, link: str, doing: str) -> str:
    target = redirected(f"{repository.api_url}/{path}", link, doing)
    if not target.startswith(f"{repository.api_url}/referrers/"):
        raise RegistryError(f"{doing}: next page elsewhere (got host {urlsplit(target).netloc[:80]!r})")
    return target.removeprefix(f"{repository.api_url}/")


def _from_tag(client: Manifests, repository: Repository, digest: str) -> Index:
    try:
        fetched = client.get_manifest(_tagged(repository, digest), (OCI_INDEX,), helped=False)
    except RegistryError as error:
        if error.status == 404:
            return Index(())
        raise
    return Index.parse(fetched.data, f"{repository}:{_tag(digest)}")


def _tagged(repository: Repository, digest: str) -> Reference:
    return Reference(repository.host, repository.name, _tag(digest), None)


def _tag(digest: str) -> str:
    return digest.replace(":", "-")


def _descriptor(media_type: str, data: bytes) -> Descriptor:
    # An image has no artifact type; its config's type stands for it.
    document: dict[str, Any] = json.loads(data)
    config = document.get("config")
    kind = document.get("artifactType") or (config.get("mediaType") if isinstance(config, dict) else None)
    annotations = document.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise FormatError("annotations of a manifest", got=type(annotations).__name__, wanted="an object")
    extra = {"artifactType": kind} if isinstance(kind, str) and kind else {}
    return Descriptor(media_type, digest_of(data), len(data), annotations, extra=extra)
