"""Requests to a registry with authentication and redirects; what the client's operations are made of."""

from __future__ import annotations

import threading
import time
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.parse import urljoin, urlsplit

from obdlab.registry.auth import Authenticator, Credentials
from obdlab.registry.deadline import deadline_of_thread
from obdlab.registry.failures import RegistryError, discard, from_response, persist
from obdlab.registry.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import urllib3

    from obdlab.registry.reference import Repository

T = TypeVar("T")

PULL = "pull"
PUSH = "pull,push"

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
# Signed storage URLs live for minutes (those of Docker Hub for at least five).
_LOCATION_LIFE_S = 240.0
_MAX_LOCATIONS = 4096


class Session:
    """Authenticated requests. Thread-safe."""

    def __init__(
        self, credentials: Credentials, *, request_timeout_s: float, deadline_s: float, user_agent: str
    ) -> None:
        self.deadline_s = deadline_s
        self._transport = Transport(silence_s=request_timeout_s, user_agent=user_agent)
        self._auth = Authenticator(credentials, self._transport)
        self._lock = threading.Lock()
        # Where a registry has sent us for a blob: (URL, end of validity).
        self._locations: dict[str, tuple[str, float]] = {}

    def persist(
        self,
        attempt: Callable[[], T],
        *,
        blob: str,
        offset: int | None = None,
        deadline: float | None = None,
        tries: int | None = None,
    ) -> T:
        """Run ``attempt`` under the deadline, as often as ``failures.persist`` sees fit."""
        if deadline is None:
            deadline = time.monotonic() + self.deadline_s
        with deadline_of_thread(deadline):
            return persist(attempt, deadline=deadline, blob=blob, offset=offset, tries=tries)

    def request(
        self,
        repository: Repository,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        doing: str,
        actions: str = PULL,
        body: bytes | Callable[[], IO[bytes]] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request to the registry, answering one challenge. Any status but 401 is the caller's.

        Another host (that of an upload, say) gets no Authorization.
        """
        if _origin(url) != _origin(repository.api_url):
            return self._send(method, url, headers, None, body, doing)
        authorization = self._auth.header(repository, actions)
        response = self._send(method, url, headers, authorization, body, doing)
        if response.status != 401:
            return response
        challenges = response.headers.getlist("WWW-Authenticate")
        discard(response)
        authorization = self._auth.answer(repository, actions, challenges, refused=authorization)
        response = self._send(method, url, headers, authorization, body, doing)
        if response.status == 401:
            raise from_response(response, doing)
        return response

    def get(
        self, repository: Repository, path: str, headers: Mapping[str, str], *, doing: str, wanted: tuple[int, ...]
    ) -> urllib3.BaseHTTPResponse:
        """GET ``<repository>/<path>`` through redirects. Raises RegistryError unless the status is a wanted one.

        Where a redirect to another host led is remembered for a while, and asked directly.
        """
        url = f"{repository.api_url}/{path}"
        known = self._location(url)
        if known is not None:
            try:
                response = self._send("GET", known, headers, None, None, doing)
            except RegistryError:
                self._forget(url)
                raise
            if response.status in wanted:
                return response
            self._forget(url)
            if response.status >= 500 or response.status == 429:
                raise from_response(response, doing)
            discard(response)  # most likely the signature has expired: ask the registry again
        response = self.request(repository, "GET", url, headers, doing=doing)
        if response.status in _REDIRECTS:
            response = self._follow(repository, url, response, headers, doing)
        if response.status not in wanted:
            self._forget(url)
            raise from_response(response, doing)
        return response

    def forget_location(self, repository: Repository, path: str) -> None:
        """Ask the registry itself next time: what its redirect led to did not work out."""
        self._forget(f"{repository.api_url}/{path}")

    def close(self) -> None:
        """Close idle connections."""
        self._transport.close()

    def _follow(
        self,
        repository: Repository,
        url: str,
        response: urllib3.BaseHTTPResponse,
        headers: Mapping[str, str],
        doing: str,
    ) -> urllib3.BaseHTTPResponse:
        origin = _origin(url)
        target = url
        for _ in range(_MAX_REDIRECTS):
            location = response.headers.get("Location", "")
            discard(response)
            target = redirected(target, location, doing)
            if _origin(target) == origin:
                response = self.request(repository, "GET", target, headers, doing=doing)
            else:
                # Storage behind a registry signs its URLs; our token is none of its business.
                response = self._send("GET", target, headers, None, None, doing)
            if response.status not in _REDIRECTS:
                if _origin(target) != origin and response.status < 300:
                    self._remember(url, target)
                return response
        discard(response)
        raise RegistryError(f"{doing}: more than {_MAX_REDIRECTS} redirects")

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        authorization: str | None,
        body: bytes | Callable[[], IO[bytes]] | None,
        doing: str,
    ) -> urllib3.BaseHTTPResponse:
        if authorization is not None:
            headers = {**headers, "Authorization": authorization}
        if callable(body):
            with body() as file:
                return self._transport.send(method, url, headers, doing=doing, body=file)
        return self._transport.send(method, url, headers, doing=doing, body=body)

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


def redirected(url: str, location: str, doing: str) -> str:
    """Return where a redirect of ``url`` leads. Raises RegistryError if nowhere, or from TLS to plain HTTP."""
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        usable = bool(location) and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise RegistryError(f"{doing}: redirect without a usable Location")
    if url.startswith("https:") and parts.scheme != "https":
        raise RegistryError(f"{doing}: redirect from TLS to plain HTTP refused")
    return target


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
