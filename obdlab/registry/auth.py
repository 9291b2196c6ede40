"""Authentication at a registry: WWW-Authenticate challenges and bearer tokens.

Sources: RFC 9110 section 11 (challenges), RFC 7617 (Basic), the docker registry token specification. Passwords and
tokens appear in no message, log or ``repr``.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlencode, urlsplit

from obdlab.registry.answer import from_response, read_small
from obdlab.registry.errors import RegistryError
from obdlab.registry.redirects import check_not_local

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from urllib.parse import SplitResult

    from obdlab.call import Call
    from obdlab.registry.answer import Answer
    from obdlab.registry.credentials import CredentialSource, Pair
    from obdlab.registry.reference import Repository
    from obdlab.registry.transport import Transport

logger = logging.getLogger(__name__)

_MAX_TOKEN_ANSWER = 256 << 10
_MAX_CHALLENGE = 8192
# Life of a token if its server does not say (docker registry token specification). A token with almost no life is
# used until it is refused, instead of asking for another one at each request.
_DEFAULT_EXPIRY_S = 60.0
_SHORTEST_EXPIRY_S = 0.1
_LONGEST_EXPIRY_S = 86400.0
# A token is renewed this share of its life before its end, so that it does not expire on its way.
_EXPIRY_MARGIN = 0.1
# Pause before the next attempt to renew a token that is still valid.
_RENEW_AGAIN_S = 1.0
# Other requests wait this long for the first one; a slow one must not hold them up for longer.
_FIRST_WAIT_S = 2.0
_LONGEST_WAIT_S = 600.0
# A client of a peer agent may name any number of repositories.
_MOST_GRANTS = 1024
_WRONG_PASSWORD = "registry refuses the credentials"
# Answers of token servers that refuse user or password.
_REFUSALS = (400, 401, 403)
_NOT_FIRST = nullcontext()


class Send(Protocol):
    """Sends a request, with an Authorization header if there is one."""

    def __call__(self, *, authorization: str | None) -> Answer:
        """Return the answer."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate header; the scheme and parameter names are lower case."""

    scheme: str
    parameters: Mapping[str, str]


_PARAMETER = re.compile(r'\s*([\w!#$%&\'*+.^`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))\s*', re.ASCII)
_SCHEME = re.compile(r"\s*([\w!#$%&'*+.^`|~-]+)(?:\s+|\s*,|\s*$)", re.ASCII)
_TOKEN68 = re.compile(r"\s*[\w.~+/-]+=+\s*(?:,|$)", re.ASCII)


def parse_challenges(header: str) -> list[Challenge]:
    """Parse a WWW-Authenticate header as far as it is well formed; the rest is left out. Never raises."""
    challenges: list[Challenge] = []
    text = header[:_MAX_CHALLENGE]
    position = 0
    while position < len(text):
        scheme = _SCHEME.match(text, position)
        if scheme is None:
            break
        position = scheme.end()
        parameters: dict[str, str] = {}
        if (token := _TOKEN68.match(text, position)) is not None:  # "Negotiate abc==" has no parameters
            position = token.end()
            challenges.append(Challenge(scheme[1].lower(), {}))
            continue
        while (match := _PARAMETER.match(text, position)) is not None:
            quoted, bare = match[2], match[3]
            value = bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            parameters.setdefault(match[1].lower(), value)
            position = match.end()
            if text[position : position + 1] != ",":
                break
            position += 1
        challenges.append(Challenge(scheme[1].lower(), parameters))
        if text[position : position + 1] == ",":
            position += 1
    return challenges


@dataclass(slots=True)
class _Grant:
    # State of one repository and set of actions: the Authorization header in use, and its origin.
    lock: threading.Lock = field(default_factory=threading.Lock)
    first: threading.Lock = field(default_factory=threading.Lock)
    #: True once an answer of the registry has shown if it wants a header.
    settled: bool = False
    header: str | None = field(default=None, repr=False)
    pair: Pair | None = field(default=None, repr=False)
    challenges: Sequence[str] = ()
    renew: float = 0.0
    expires: float = 0.0
    trouble: str = ""


class Authenticator:
    """Answers challenges and keeps the tokens, per registry, repository and actions ("pull", "pull,push")."""

    def __init__(self, credentials: CredentialSource, transport: Transport) -> None:
        self._credentials = credentials
        self._transport = transport
        self._lock = threading.Lock()
        # The one used last stands at the end.
        self._grants: OrderedDict[tuple[str, str, str], _Grant] = OrderedDict()

    def exchange(
        self,
        repository: Repository,
        actions: str,
        url: str,
        send: Send,
        *,
        doing: str,
        call: Call,
    ) -> Answer:
        """Return the answer to a request of ``url``. The caller handles every status but 401.

        ``send`` sends the request with a given Authorization header: a second time if the first was refused, a third
        time if the second header came from another thread (two threads refused at once count as one). If a challenge
        is likely, the first of many requests goes ahead alone, and the others share its token. Raises RegistryError,
        permanent unless the token server failed temporarily.
        """
        grant = self._grant(repository, actions)
        with _NOT_FIRST if grant.settled else self._first_contact(grant, repository, call):
            header = grant.header
            if header is not None:
                header = self._header(grant, repository, actions, url, call)
            response = send(authorization=header)
            if response.status != 401:
                grant.settled = True
                return response
            header, shared = self._answer(grant, repository, actions, url, response, header, call)
        response = send(authorization=header)
        if response.status == 401 and shared:
            header, _ = self._answer(grant, repository, actions, url, response, header, call)
            response = send(authorization=header)
        if response.status == 401:
            error = from_response(response, doing)
            if header.startswith("Basic "):
                error = RegistryError(_WRONG_PASSWORD, status=401)
            raise _told(error, grant.trouble)
        return response

    def header(self, repository: Repository, actions: str, call: Call) -> str | None:
        """Return the current Authorization header, or None if it is missing or has expired."""
        return self._header(self._grant(repository, actions), repository, actions, repository.blobs_url, call)

    def _grant(self, repository: Repository, actions: str) -> _Grant:
        key = (repository.api_host, repository.name, actions)
        with self._lock:
            grant = self._grants.get(key)
            if grant is None:
                grant = self._grants[key] = _Grant()
                if len(self._grants) > _MOST_GRANTS:
                    self._grants.popitem(last=False)
            else:
                self._grants.move_to_end(key)
            return grant

    @contextmanager
    def _first_contact(self, grant: _Grant, repository: Repository, call: Call) -> Iterator[None]:
        # At an open registry, waiting for the first request would only cost a round trip.
        if repository.plain_http and not self._credentials.likely(repository):
            yield
            return
        alone = grant.first.acquire(timeout=call.left_s(_FIRST_WAIT_S))
        if not alone and call.left_s(_FIRST_WAIT_S) <= 0:
            raise RegistryError("no token within the deadline", temporary=True)
        if alone and grant.settled:
            grant.first.release()
            alone = False
        try:
            yield
        finally:
            if alone:
                grant.first.release()

    def _header(self, grant: _Grant, repository: Repository, actions: str, url: str, call: Call) -> str | None:
        now = time.monotonic()
        if grant.header is None or now < grant.renew:
            return grant.header
        # One thread renews early, while the others use the old header; once it has expired they wait.
        expired = now >= grant.expires
        if not grant.lock.acquire(timeout=call.left_s(_LONGEST_WAIT_S) if expired else 0):
            return None if expired else grant.header
        try:
            if time.monotonic() >= grant.renew:
                self._renew(grant, repository, actions, url, call)
            return grant.header
        finally:
            grant.lock.release()

    def _renew(self, grant: _Grant, repository: Repository, actions: str, url: str, call: Call) -> None:
        try:
            self._negotiate(grant, repository, actions, url, grant.challenges, None, call)
        except RegistryError as error:
            now = time.monotonic()
            if now >= grant.expires:
                grant.header = None  # the registry's next challenge reports the cause
            else:
                grant.renew = min(grant.expires, now + _RENEW_AGAIN_S)
                logger.info("%s: token not renewed yet: %s", repository, error)

    def _answer(
        self,
        grant: _Grant,
        repository: Repository,
        actions: str,
        url: str,
        response: Answer,
        refused: str | None,
        call: Call,
    ) -> tuple[str, bool]:
        # Returns a new header after this response refused the one in use (or a request without). Threads refused at
        # the same time share it: the second value is True if another thread got it.
        challenges = response.challenges
        response.close()
        with _within_deadline(grant.lock, call):
            if grant.header is not None and grant.header != refused and time.monotonic() < grant.expires:
                return grant.header, True
            refused_pair = grant.pair if refused is not None and refused.startswith("Basic ") else None
            grant.header = None
            header = self._negotiate(grant, repository, actions, url, challenges, refused_pair, call)
            grant.settled = True
            if header == refused and refused_pair is not None:
                grant.header = None
                raise _told(RegistryError(_WRONG_PASSWORD, status=401), grant.trouble)
            return header, False

    def _negotiate(
        self,
        grant: _Grant,
        repository: Repository,
        actions: str,
        url: str,
        challenges: Sequence[str],
        refused: Pair | None,
        call: Call,
    ) -> str:
        found = self._credentials.look_up(repository, url, refused, call)
        offered = [challenge for text in challenges for challenge in parse_challenges(text)]
        life_s = float("inf")
        bearer = next((each for each in offered if each.scheme == "bearer" and each.parameters.get("realm")), None)
        if bearer is not None:
            try:
                header, life_s = self._fetch_token(repository, actions, bearer.parameters, found.pair, call)
            except RegistryError as error:
                found, before = self._credentials.look_up(repository, url, found.pair or ("", ""), call), found
                if error.status not in _REFUSALS or found.pair in (None, before.pair):
                    raise _told(error, found.trouble) from error
                header, life_s = self._fetch_token(repository, actions, bearer.parameters, found.pair, call)
        elif any(challenge.scheme == "basic" for challenge in offered):
            if found.pair is None:
                what = "registry wants a user and password, and none are configured"
                raise _told(RegistryError(what, status=401), found.trouble)
            header = _basic(found.pair)
        else:
            schemes = sorted({challenge.scheme for challenge in offered}) or "no challenge"
            raise RegistryError(f"registry answered 401 without a usable challenge (got {schemes})", status=401)
        now = time.monotonic()
        grant.renew, grant.expires = now + life_s * (1 - _EXPIRY_MARGIN), now + life_s
        grant.header, grant.pair, grant.challenges, grant.trouble = header, found.pair, challenges, found.trouble
        return header

    def _fetch_token(
        self, repository: Repository, actions: str, parameters: Mapping[str, str], pair: Pair | None, call: Call
    ) -> tuple[str, float]:
        realm = parameters["realm"]
        parts = _split_realm(realm)
        if parts.scheme != "https" and not repository.plain_http:
            raise RegistryError("token server without TLS for a registry with TLS", status=401)
        check_not_local(repository.api_url, realm, "asking for a token")
        query = {"service": parameters["service"]} if "service" in parameters else {}
        query["scope"] = parameters.get("scope") or f"repository:{repository.name}:{actions}"
        url = f"{realm}{'&' if parts.query else '?'}{urlencode(query)}"
        doing = f"asking {parts.hostname} for a token"
        headers = {"Authorization": _basic(pair)} if pair else {}
        response = self._transport.send("GET", url, headers, doing=doing, call=call)
        if response.status != 200:
            raise from_response(response, doing)
        return _read_token(read_small(response, _MAX_TOKEN_ANSWER, doing), doing)


def _told(error: RegistryError, trouble: str) -> RegistryError:
    # A refusal must report why there are no (other) credentials.
    if not trouble:
        return error
    return RegistryError(f"{error.what}; {trouble}", temporary=error.temporary, status=error.status)


@contextmanager
def _within_deadline(lock: threading.Lock, call: Call) -> Iterator[None]:
    # Another thread may wait for a silent token server, with a later deadline than this thread's.
    if not lock.acquire(timeout=call.left_s(_LONGEST_WAIT_S)):
        raise RegistryError("no token within the deadline", temporary=True)
    try:
        yield
    finally:
        lock.release()


def _read_token(text: bytes, doing: str) -> tuple[str, float]:
    try:
        document = json.loads(text)
        token = document.get("token") or document.get("access_token")
        life_s = document.get("expires_in")
    except (ValueError, AttributeError, RecursionError):
        token, life_s = None, None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable() or not token:
        raise RegistryError(f"{doing}: answer holds no token", status=401)
    if (
        not isinstance(life_s, int | float)
        or isinstance(life_s, bool)
        or not (_SHORTEST_EXPIRY_S <= life_s <= _LONGEST_EXPIRY_S)
    ):
        life_s = _DEFAULT_EXPIRY_S
    return f"Bearer {token}", float(life_s)


def _split_realm(realm: str) -> SplitResult:
    try:
        parts = urlsplit(realm)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.fragment
    except ValueError:
        usable = False
    # URL parsers differ on these characters; one of them could send the password to another host.
    if not usable or not realm.isprintable() or set(" \\@") & set(realm):
        raise RegistryError("challenge with a malformed realm", status=401)
    return parts


def _basic(pair: Pair) -> str:
    return "Basic " + base64.b64encode(f"{pair[0]}:{pair[1]}".encode()).decode("ascii")
