"""Requests to a registry with authentication and redirects: the base of the client's operations.

Reads go to the registry's mirrors first, and reads of blobs through a P2P proxy, if there are any and they work. If
they fail in any way, the registry itself is asked within the same deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from obdlab.call import UNBOUND, Call
from obdlab.errors import CorruptBlobError
from obdlab.formats.oci import is_digest
from obdlab.registry.answer import from_response
from obdlab.registry.auth import Authenticator
from obdlab.registry.errors import RegistryError
from obdlab.registry.mirrors import Mirrors
from obdlab.registry.p2p import BLOB_HEADER, NO_HEADERS
from obdlab.registry.redirects import origin, redirected
from obdlab.registry.transport import Transport
from obdlab.registry.tries import persist

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.registry.answer import Answer
    from obdlab.registry.credentials import CredentialSource
    from obdlab.registry.mirrors import Mirror
    from obdlab.registry.p2p import P2PProxy
    from obdlab.registry.reference import Repository
    from obdlab.registry.tls import TLSOptions

T = TypeVar("T")

logger = logging.getLogger(__name__)

PULL = "pull"
PUSH = "pull,push"
DELETE = "delete"

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
# Signed storage URLs live for minutes (those of Docker Hub for at least five).
_LOCATION_LIFE_S = 240.0
_MAX_LOCATIONS = 4096
# A mirror or proxy gets at most this much of a read's time, and a quarter of the rest: the registry needs time too.
_HELPER_S = 15.0
_HELPER_SHARE = 0.25


class Session:
    """Authenticated requests. Thread-safe."""

    def __init__(
        self,
        credentials: CredentialSource,
        *,
        request_timeout_s: float,
        deadline_s: float,
        user_agent: str,
        tls: TLSOptions | None = None,
        mirrors: Mirrors | None = None,
        p2p: P2PProxy | None = None,
    ) -> None:
        self.deadline_s = deadline_s
        self._mirrors = mirrors or Mirrors()
        self._p2p = p2p
        self._transport = Transport(silence_s=request_timeout_s, user_agent=user_agent, tls=tls)
        self._auth = Authenticator(credentials, self._transport)
        self._lock = threading.Lock()
        # Redirect targets of blobs: (URL, end of validity).
        self._locations: dict[str, tuple[str, float]] = {}

    def persist(
        self,
        attempt: Callable[[Call], T],
        *,
        blob: str,
        offset: int | None = None,
        call: Call = UNBOUND,
        extra_s: float = 0.0,
        tries: int | None = None,
    ) -> T:
        """Run ``attempt`` with the retries of ``tries.persist``.

        It ends by the deadline of the call, and within that of the session and ``extra_s``.
        """
        call = call.until(time.monotonic() + self.deadline_s + extra_s)
        return persist(attempt, call, blob=blob, offset=offset, tries=tries)

    def request(
        self,
        repository: Repository,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        doing: str,
        call: Call,
        actions: str = PULL,
        body: bytes | Callable[[], IO[bytes]] | None = None,
        own: Mapping[str, str] = NO_HEADERS,
    ) -> Answer:
        """Send a request to the registry, answering one challenge. The caller handles every status but 401.

        Another host (of an upload, for example) gets no Authorization header, and no headers of ``own``.
        """
        if not url.startswith(f"{repository.api_url}/") and origin(url) != origin(repository.api_url):
            return self._send(method, url, headers, body, doing, call)
        send = partial(self._send, method, url, {**headers, **own}, body, doing, call)
        return self._auth.exchange(repository, actions, url, send, doing=doing, call=call)

    def get(
        self,
        repository: Repository,
        path: str,
        headers: Mapping[str, str],
        read: Callable[[Answer], T],
        call: Call,
        *,
        doing: str,
        wanted: tuple[int, ...],
        helped: bool = True,
        bulk: bool = False,
        aside: Mapping[str, str] = NO_HEADERS,
    ) -> T:
        """GET ``<repository>/<path>`` and return ``read(response)`` for an answer with a wanted status.

        ``helped`` asks mirrors first, ``bulk`` the P2P proxy, which alone gets the headers ``aside``. The target of a
        redirect to another host is remembered for a while, and requested directly. Raises RegistryError, and the
        errors of ``read``.
        """
        mirrors = self._mirrors.known.get(repository.host)
        for mirror in (self._mirrors.of(repository) if mirrors is None else mirrors) if helped else ():
            url = mirror.url(repository, path)
            if not self._mirrors.usable(mirror, url) or not (mirror.resolves or _is_pinned(path)):
                continue
            try:
                share, at = _helpers_share(call), mirror.repository(repository)
                answer = self._get(at, url, headers, read, doing, wanted, share, bulk, mirror.headers)
            except (RegistryError, CorruptBlobError) as error:
                if call.broken_off:
                    raise
                self._note_failure(mirror, url, error)
                continue
            self._mirrors.worked(mirror)
            return answer
        url = f"{repository.api_url}/{path}"
        return self._get(repository, url, headers, read, doing, wanted, call, bulk, aside=aside)

    def distrust(self, repository: Repository, path: str) -> str:
        """Use only the registry itself for a while: a mirror, a proxy or a redirect gave wrong data.

        Returns the names of the sources that were in use until now, the likeliest first.
        """
        sources = []
        for mirror in self._mirrors.of(repository):
            mirrored = mirror.url(repository, path)
            if self._mirrors.usable(mirror, mirrored):
                sources.append(f"mirror {mirror.base}")
            self._mirrors.lacks(mirrored)
        url = f"{repository.api_url}/{path}"
        if self._p2p is not None:
            if self._p2p.usable(url):
                sources.append(self._p2p.name)
            self._p2p.lacks(url)
        target = self._location(url) or url
        sources.append(f"storage {urlsplit(target).netloc}" if origin(target) != origin(url) else "the registry")
        self._forget(url)
        return ", or ".join(sources)

    def close(self) -> None:
        """Close idle connections."""
        self._transport.close()

    def _note_failure(self, mirror: Mirror, url: str, error: RegistryError | CorruptBlobError) -> None:
        # An answer that concerns this one blob (404, wrong content) says nothing about the mirror's health.
        if isinstance(error, RegistryError) and (error.temporary or error.status in (None, 401)):
            self._mirrors.failed(mirror, error)
            return
        level = logging.INFO if isinstance(error, RegistryError) and error.status == 404 else logging.WARNING
        logger.log(level, "mirror %s: not asked for this again for a while: %s", mirror.base, error)
        self._mirrors.lacks(url)

    def _get(
        self,
        repository: Repository,
        url: str,
        headers: Mapping[str, str],
        read: Callable[[Answer], T],
        doing: str,
        wanted: tuple[int, ...],
        call: Call,
        bulk: bool,
        own: Mapping[str, str] = NO_HEADERS,
        aside: Mapping[str, str] = NO_HEADERS,
    ) -> T:
        proxy = self._p2p
        if bulk and proxy is not None and proxy.usable(url):
            target, wants = self._resolve(repository, url, doing, call, own)
            try:
                if not proxy.http_proxy:
                    wants = {**wants, **aside, **({} if target == url else {BLOB_HEADER: url})}
                return self._through(proxy, target, {**headers, **wants}, read, doing, wanted, call)
            except RegistryError as error:
                if call.broken_off:
                    raise
                # A refusal of the target (an expired signature or token) is no fault of the proxy.
                if error.temporary or error.status is None:
                    proxy.failed(error)
                self._forget(url)
        try:
            answer = self._open(repository, url, headers, doing, wanted, call, own)
            try:
                return read(answer)
            except BaseException:
                answer.close()
                raise
        except RegistryError:
            if not call.broken_off:
                self._forget(url)
            raise

    def _through(
        self,
        proxy: P2PProxy,
        target: str,
        headers: Mapping[str, str],
        read: Callable[[Answer], T],
        doing: str,
        wanted: tuple[int, ...],
        call: Call,
    ) -> T:
        doing = f"{doing} through {proxy.name}"
        response = self._transport.send(
            "GET", proxy.url(target), headers, doing=doing, call=_helpers_share(call), http_proxy=proxy.http_proxy
        )
        if response.status not in wanted:
            raise from_response(response, doing)
        try:
            answer = read(response)
        except BaseException:
            response.close()
            raise
        proxy.worked()
        return answer

    def _resolve(
        self, repository: Repository, url: str, doing: str, call: Call, own: Mapping[str, str]
    ) -> tuple[str, Mapping[str, str]]:
        # Returns the URL of the content, and its headers: none if the registry redirected to another host. A proxy
        # gets the final URL, as it may handle challenges and redirects in any way.
        target = self._location(url)
        if target is None:
            # Read the first byte, as a proxy's cache might keep the answer to a HEAD for a GET.
            self._open(repository, url, {"Range": "bytes=0-0"}, doing, (200, 206, 416), call, own).close()
            target = self._location(url)
            if target is None:
                self._remember(url, url)
                target = url
        if origin(target) == origin(url):
            authorization = self._auth.header(repository, PULL, call)
            return target, own if authorization is None else {**own, "Authorization": authorization}
        return target, NO_HEADERS

    def _open(
        self,
        repository: Repository,
        url: str,
        headers: Mapping[str, str],
        doing: str,
        wanted: tuple[int, ...],
        call: Call,
        own: Mapping[str, str],
    ) -> Answer:
        known = self._location(url) if url in self._locations else None
        if known is not None and known != url:
            try:
                response = self._transport.send("GET", known, headers, doing=doing, call=call)
            except RegistryError:
                if not call.broken_off:
                    self._forget(url)
                raise
            if response.status in wanted:
                return response
            self._forget(url)
            if response.status >= 500 or response.status == 429:
                raise from_response(response, doing)
            response.close()  # probably an expired signature: ask the registry again
        if url.startswith(f"{repository.api_url}/") and not own:
            send = partial(self._transport.send, "GET", url, headers, doing=doing, call=call)
            response = self._auth.exchange(repository, PULL, url, send, doing=doing, call=call)
        else:
            response = self.request(repository, "GET", url, headers, doing=doing, call=call, own=own)
        if response.status in _REDIRECTS:
            response = self._follow(repository, url, response, headers, doing, call, own)
        if response.status not in wanted:
            self._forget(url)
            raise from_response(response, doing)
        return response

    def _follow(
        self,
        repository: Repository,
        url: str,
        response: Answer,
        headers: Mapping[str, str],
        doing: str,
        call: Call,
        own: Mapping[str, str],
    ) -> Answer:
        target = url
        for _ in range(_MAX_REDIRECTS):
            location = response.headers.get("location", "")
            response.close()
            target = redirected(target, location, doing)
            if origin(target) == origin(url):
                response = self.request(repository, "GET", target, headers, doing=doing, call=call, own=own)
            else:
                # Storage behind a registry signs its URLs; the registry's token must not go there.
                response = self._transport.send("GET", target, headers, doing=doing, call=call)
            if response.status not in _REDIRECTS:
                if origin(target) != origin(url) and response.status < 300:
                    self._remember(url, target)
                return response
        response.close()
        raise RegistryError(f"{doing}: more than {_MAX_REDIRECTS} redirects")

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | Callable[[], IO[bytes]] | None,
        doing: str,
        call: Call,
        authorization: str | None = None,
    ) -> Answer:
        send = partial(
            self._transport.send, method, url, headers, doing=doing, call=call, authorization=authorization
        )
        if callable(body):
            with body() as file:
                return send(body=file)
        return send(body=body)

    def _location(self, url: str) -> str | None:
        target, end = self._locations.get(url, ("", 0.0))
        return target if time.monotonic() < end else None

    def _remember(self, url: str, target: str) -> None:
        now = time.monotonic()
        with self._lock:
            if len(self._locations) >= _MAX_LOCATIONS:
                self._locations = {key: item for key, item in self._locations.items() if item[1] > now}
            if len(self._locations) < _MAX_LOCATIONS:
                self._locations[url] = (target, now + _LOCATION_LIFE_S)

    def _forget(self, url: str) -> None:
        with self._lock:
            self._locations.pop(url, None)


def _helpers_share(call: Call) -> Call:
    # Any failure of a mirror or proxy, silence included, leaves most of the time to the registry.
    now = time.monotonic()
    return call.until(now + call.left_s(_HELPER_S / _HELPER_SHARE) * _HELPER_SHARE)


def _is_pinned(path: str) -> bool:
    # A tag may name another image at a mirror; a digest may not.
    return path.startswith("blobs/") or is_digest(path.rpartition("/")[2])
