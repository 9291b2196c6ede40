"""The registry operations of obdlab: manifests, blobs, byte ranges of blobs (OCI distribution 1.1)."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from obdlab.call import UNBOUND, Call
from obdlab.errors import CorruptBlobError
from obdlab.formats.oci import INDEX_TYPES, MANIFEST_TYPES, MAX_MANIFEST_SIZE, check_digest, digest_of
from obdlab.registry import answer, referrers, signatures, tries
from obdlab.registry.answer import from_response
from obdlab.registry.blobstream import BlobStream
from obdlab.registry.credentials import Credentials
from obdlab.registry.errors import RegistryError
from obdlab.registry.link import LEAST_NOTED, Link
from obdlab.registry.p2p import NO_HEADERS
from obdlab.registry.rangestream import RangeStream
from obdlab.registry.redirects import redirected
from obdlab.registry.reference import Reference, Repository
from obdlab.registry.session import DELETE, PUSH, Session
from obdlab.registry.upload import CHUNK, SLOWEST_UPLOAD, BlobSink

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from obdlab.formats.oci import Descriptor
    from obdlab.registry.answer import Answer
    from obdlab.registry.credentials import CredentialSource
    from obdlab.registry.mirrors import Mirrors
    from obdlab.registry.p2p import P2PProxy
    from obdlab.registry.tls import TLSOptions

MANIFEST_ACCEPT = (*MANIFEST_TYPES, *INDEX_TYPES)

# Reads for a running container go on until their deadline; a command at a terminal has to report failure sooner.
_TRIES = 5
# This many tries of a read must keep a least pace. After them the link itself is taken to be slow.
_PACED_TRIES = 3
# Statuses of registries that do not delete, or not for every user with push rights.
_REFUSED = (400, 401, 403, 405, 501)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A manifest or index as stored in the registry; ``digest`` has been checked against ``data``."""

    media_type: str
    digest: str
    data: bytes


class RegistryClient:
    """Talks to any number of registries over kept connections. Thread-safe; connects at the first use.

    ``plain_http_hosts`` are hosts ("host" or "host:port") without TLS, besides loopback ones. ``request_timeout_s``
    bounds a connect and each silence, ``deadline_s`` a whole operation with its retries (uploads get more time by
    their size, streams for each MiB). ``mirrors`` are asked before their registry for all reads, the ``p2p`` proxy
    for ranges of blobs. Of the latter, a share of at most ``hedge_share`` is requested twice, when the first answer
    lags. :meth:`require_signature` accepts the ``signature_keys``. Operations raise RegistryError (a SourceError),
    which names registry, repository, digest and offset, and CorruptBlobError for content that does not match its
    digest.
    """

    def __init__(
        self,
        credentials: CredentialSource | None = None,
        *,
        plain_http_hosts: Collection[str] = frozenset(),
        request_timeout_s: float = 30.0,
        deadline_s: float = 120.0,
        user_agent: str = "obdlab",
        tls: TLSOptions | None = None,
        mirrors: Mirrors | None = None,
        p2p: P2PProxy | None = None,
        hedge_share: float = tries.SHARE,
        signature_keys: Sequence[Path] = (),
    ) -> None:
        self._signature_keys = signature_keys
        self._plain_http_hosts = frozenset(plain_http_hosts)
        self._session = Session(
            credentials or Credentials(),
            request_timeout_s=request_timeout_s,
            deadline_s=deadline_s,
            user_agent=user_agent,
            tls=tls,
            mirrors=mirrors,
            p2p=p2p,
        )
        self._hedges = tries.Hedges(hedge_share)
        self._links: dict[str, Link] = {}

    @property
    def deadline_s(self) -> float:
        """The time that an operation may take, retries included."""
        return self._session.deadline_s

    def repository(self, ref: Reference) -> Repository:
        """Return the repository of ``ref``, with its scheme: plain HTTP for loopback and listed hosts, else HTTPS."""
        repository = ref.repo
        listed = bool({repository.host, repository.host.rpartition(":")[0]} & self._plain_http_hosts)
        return Repository(repository.host, repository.name, plain_http=repository.plain_http or listed)

    def get_manifest(
        self, ref: Reference, accept: Collection[str] = MANIFEST_ACCEPT, *, helped: bool = True
    ) -> Fetched:
        """Fetch the manifest or index that ``ref`` names, at most 4 MiB, and check its digest.

        ``helped=False`` asks the registry itself, not its mirrors.
        """
        repository = self.repository(ref)
        doing = "fetching manifest"

        def read(response: Answer) -> Fetched:
            media_type = response.headers.get("content-type", "").partition(";")[0].strip()
            promised = response.headers.get("docker-content-digest", "")
            data = answer.read_small(response, MAX_MANIFEST_SIZE, doing)
            digest = digest_of(data)
            for wanted in (ref.digest, promised if promised.startswith("sha256:") else None):
                if wanted is not None and wanted != digest:
                    raise CorruptBlobError("wrong content", blob=str(ref), got=digest, wanted=wanted)
            return Fetched(media_type, digest, data)

        def attempt(call: Call) -> Fetched:
            headers = {"Accept": ", ".join(accept)}
            return self._session.get(
                repository,
                f"manifests/{ref.target}",
                headers,
                read,
                doing=doing,
                wanted=(200,),
                call=call,
                helped=helped,
            )

        return self._session.persist(attempt, blob=str(ref), tries=_TRIES)

    def require_signature(self, reference: Reference, *digests: str) -> None:
        """Return if one of the client's keys signed one of an image's documents, or at once if it has no keys.

        Raises as :func:`obdlab.registry.signatures.check_signed`.
        """
        if self._signature_keys:
            signatures.check_signed(self, reference, digests, self._signature_keys)

    def put_manifest(self, ref: Reference, media_type: str, data: bytes) -> str:
        """Store a manifest or index under the tag (or digest) of ``ref``, and return its digest.

        A manifest with a subject is listed by :meth:`referrers` afterwards, also at registries without that API.
        """
        repository = self.repository(ref)
        digest = digest_of(data)
        if ref.digest not in (None, digest):
            raise CorruptBlobError("manifest to store is another", blob=str(ref), got=digest, wanted=ref.digest)
        doing = "storing manifest"

        def attempt(call: Call) -> bool:
            response = self._session.request(
                repository,
                "PUT",
                f"{repository.api_url}/manifests/{ref.target}",
                {"Content-Type": media_type},
                doing=doing,
                call=call,
                actions=PUSH,
                body=data,
            )
            entered = "oci-subject" in response.headers
            _expect(response, (201,), doing)
            return entered

        entered = self._session.persist(attempt, blob=str(ref), tries=_TRIES)
        subject = referrers.subject_of(data)
        if subject is not None and not entered:
            referrers.add_to_tag(self, repository, subject, media_type, data)
        return digest

    def referrers(
        self, repository: Repository, digest: str, artifact_type: str | None = None
    ) -> tuple[Descriptor, ...]:
        """Return the manifests whose subject is ``digest``, of one artifact type or all."""
        return referrers.list_referrers(self._session, self, repository, digest, artifact_type)

    def remove_referrer(self, repository: Repository, subject: str, digest: str) -> None:
        """Delete a manifest whose subject is ``subject``, so that :meth:`referrers` does not list it any more.

        If the list of referrers is a tag, the manifest is removed from that, which suffices if the registry cannot
        delete.
        """
        unlisted = referrers.drop_from_tag(self, repository, subject, digest)
        doing = "deleting manifest"

        def attempt(call: Call) -> None:
            url = f"{repository.api_url}/manifests/{digest}"
            response = self._session.request(repository, "DELETE", url, {}, doing=doing, call=call, actions=DELETE)
            _expect(response, (202, 404), doing)

        try:
            self._session.persist(attempt, blob=_name(repository, digest), tries=_TRIES)
        except RegistryError as error:
            if not (unlisted and error.status in _REFUSED):
                raise

    def blob_size(self, repository: Repository, digest: str, call: Call = UNBOUND) -> int:
        """Return a blob's size. Uses a range request, which all registries and storages answer alike."""
        name = _name(repository, digest)
        doing = "asking for blob size"

        def read(response: Answer) -> int:
            return answer.total_size(response, doing)

        def attempt(call: Call) -> int:
            headers = {"Range": "bytes=0-0"}
            return self._session.get(
                repository, f"blobs/{digest}", headers, read, doing=doing, wanted=(200, 206, 416), call=call
            )

        return self._session.persist(attempt, blob=name, call=call, tries=_TRIES)

    def read_range(
        self,
        repository: Repository,
        digest: str,
        offset: int,
        length: int,
        call: Call = UNBOUND,
        *,
        size: int | None = None,
        name: str = "",
        aside: Mapping[str, str] = NO_HEADERS,
    ) -> bytes:
        """Return exactly ``length`` bytes of a blob from ``offset``, by the deadline of the call, else the client's.

        ``name`` is that of the blob in errors, if the caller has it; a P2P proxy gets the headers ``aside`` as well.
        Raises RegistryError, also if the registry says that the blob is not of ``size`` bytes.
        """
        name = name or _name(repository, digest)
        if length == 0:
            return b""
        doing = "reading blob"
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        read = partial(answer.read_range, offset=offset, length=length, doing=doing, size=size)
        get = partial(
            self._session.get,
            repository,
            f"blobs/{digest}",
            headers,
            doing=doing,
            wanted=(200, 206),
            bulk=True,
            aside=aside,
        )
        request: Callable[[Call], bytes] = partial(get, read)
        if length >= LEAST_NOTED:
            link = self.link(repository)

            def noted(terms: Call) -> bytes:
                began = time.monotonic()

                def timed(response: Answer) -> bytes:
                    answered, before = time.monotonic(), link.begin_body()
                    try:
                        data = read(response)
                    finally:
                        after = link.end_body()
                    link.note(answered - began, length, time.monotonic() - answered, (before + after) / 2)
                    return data

                return get(timed, terms)

            request = noted
        attempt = request
        if length <= tries.LARGEST:  # ranges of about the same size take about as long
            attempt = partial(self._hedges.run, (repository.api_host, length.bit_length()), request)
        if call.deadline is None:
            call = call.until(time.monotonic() + self.deadline_s)
        return tries.persist(attempt, call, blob=name, offset=offset, halving=True, paced=_PACED_TRIES)

    def link(self, repository: Repository) -> Link:
        """Return the measurements of the link to the repository's registry."""
        link = self._links.get(repository.api_host)
        return self._links.setdefault(repository.api_host, Link()) if link is None else link

    def open_range(
        self,
        repository: Repository,
        digest: str,
        offset: int,
        length: int,
        call: Call = UNBOUND,
        *,
        size: int | None = None,
        aside: Mapping[str, str] = NO_HEADERS,
    ) -> RangeStream:
        """Request a byte range of a blob once, for reading it as it arrives. Nothing is retried.

        Raises RegistryError as :meth:`read_range` does.
        """
        name = _name(repository, digest)

        def request(terms: Call) -> RangeStream:
            return self._session.get(
                repository,
                f"blobs/{digest}",
                {"Range": f"bytes={offset}-{offset + length - 1}"},
                lambda response: RangeStream(response, name=name, offset=offset, length=length, size=size),
                doing="streaming blob",
                wanted=(200, 206),
                call=terms,
                bulk=True,
                aside=aside,
            )

        return self._session.persist(request, blob=name, offset=offset, call=call, tries=1)

    def distrust(self, repository: Repository, digest: str) -> str:
        """Read this blob from the registry itself for a while: bytes from elsewhere failed their checksum.

        Returns the names of the sources that were in use until now.
        """
        return self._session.distrust(repository, f"blobs/{digest}")

    def read_blob(self, repository: Repository, digest: str, size: int, max_size: int) -> bytes:
        """Return a whole small blob (an image config) of a known size, its digest checked."""
        if size > max_size:
            name = _name(repository, digest)
            raise RegistryError(f"blob too large (got {size} bytes, wanted at most {max_size})", blob=name)
        with self.stream_blob(repository, digest, size) as stream:
            return stream.readall()

    def stream_blob(self, repository: Repository, digest: str, size: int) -> BlobStream:
        """Return a file-like stream of the blob, for a ``with`` block; size and digest are checked at its end."""
        doing = "reading blob"

        opened = False

        def open_at(position: int, call: Call) -> Answer:
            nonlocal opened
            first, opened = not opened, True
            return self._session.get(
                repository,
                f"blobs/{digest}",
                {"Range": f"bytes={position}-{size - 1}"} if position else {},
                lambda response: response,
                doing=doing,
                wanted=(200, 206) if position else (200,),
                call=call,
                helped=first,  # a mirror that breaks off in the middle is not used for the rest
            )

        return BlobStream(
            open_at,
            name=_name(repository, digest),
            digest=digest,
            size=size,
            deadline_s=self._session.deadline_s,
        )

    def push_blob(
        self,
        repository: Repository,
        digest: str,
        size: int,
        open_file: Callable[[], IO[bytes]],
        mount_from: Repository | None = None,
    ) -> bool:
        """Make the repository hold a blob; return False if it had it already.

        ``open_file`` returns the content from its start, each time it is called (again after a failed try). The
        registry is first asked to mount the blob from ``mount_from``, another one of its repositories.
        """
        name = _name(repository, digest)
        doing = "pushing blob"

        def attempt(call: Call) -> bool:
            if self._head_blob(repository, digest, call):
                return False
            location = self._start_upload(repository, digest, mount_from, doing, call)
            if location is None:
                return True
            url = f"{location}{'&' if '?' in location else '?'}digest={quote(digest, safe='')}"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            response = self._session.request(
                repository, "PUT", url, headers, doing=doing, call=call, actions=PUSH, body=open_file
            )
            _expect(response, (201,), doing)
            return True

        return self._session.persist(attempt, blob=name, extra_s=size / SLOWEST_UPLOAD, tries=_TRIES)

    def has_blob(self, repository: Repository, digest: str) -> bool:
        """Return True if the registry itself reports that the repository holds the blob now."""
        name = _name(repository, digest)
        return self._session.persist(lambda call: self._head_blob(repository, digest, call), blob=name, tries=_TRIES)

    def mount_blob(self, repository: Repository, digest: str, other: str) -> bool:
        """Make the repository share a blob that ``other``, a repository of the same registry, holds.

        Returns False if the registry refuses: ``other`` has no such blob, or the user may not read it.
        """
        name = _name(repository, digest)
        doing = "mounting blob"
        source = Repository(repository.host, other, plain_http=repository.plain_http)

        def attempt(call: Call) -> bool:
            if self._head_blob(repository, digest, call):
                return True
            try:
                location = self._start_upload(repository, digest, source, doing, call)
            except RegistryError as error:
                if error.status in (401, 403, 404, 405):
                    return False
                raise
            if location is None:
                return True
            # The registry began an upload instead. If it ignores the DELETE, the upload expires by itself.
            with suppress(RegistryError):
                self._session.request(
                    repository, "DELETE", location, {}, doing=doing, call=call, actions=PUSH
                ).close()
            return False

        return self._session.persist(attempt, blob=name, tries=_TRIES)

    def push_stream(self, repository: Repository, *, chunk: int = CHUNK) -> BlobSink:
        """Return a sink that uploads a blob in chunks while it is written, before its digest and size are known.

        ``chunk`` is in bytes, at most 1 GiB.
        """
        return BlobSink(self._session, repository, chunk=chunk)

    def close(self) -> None:
        """Close idle connections. The client stays usable."""
        self._session.close()

    def _head_blob(self, repository: Repository, digest: str, call: Call) -> bool:
        doing = "looking for blob"
        url = f"{repository.blobs_url}/{digest}"
        response = self._session.request(repository, "HEAD", url, {}, doing=doing, call=call)
        if response.status == 404:
            response.close()
            return False
        # A redirect leads to the storage that has the blob.
        _expect(response, (200, 301, 302, 303, 307, 308), doing)
        return True

    def _start_upload(
        self, repository: Repository, digest: str, mount_from: Repository | None, doing: str, call: Call
    ) -> str | None:
        # Returns the upload's URL, or None if the registry mounted the other repository's copy.
        url = f"{repository.blobs_url}/uploads/"
        if mount_from is not None and mount_from.api_host == repository.api_host:
            url += f"?mount={quote(digest, safe='')}&from={quote(mount_from.name, safe='')}"
        response = self._session.request(
            repository, "POST", url, {"Content-Length": "0"}, doing=doing, call=call, actions=PUSH
        )
        location = response.headers.get("location", "")
        _expect(response, (201, 202), doing)
        return None if response.status == 201 else redirected(url, location, doing)


def _expect(response: Answer, wanted: tuple[int, ...], doing: str) -> None:
    if response.status not in wanted:
        raise from_response(response, doing)
    response.close()


@lru_cache(1024)
def _name(repository: Repository, digest: str) -> str:
    return f"{repository}@{check_digest(digest, str(repository))}"
