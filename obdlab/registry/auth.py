"""Who we are to a registry: credentials, WWW-Authenticate challenges and bearer tokens.

Sources: RFC 9110 section 11 (challenges), RFC 7617 (Basic), the docker registry token specification, docker's
config.json. Passwords and tokens appear in no message, log or ``repr``.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlencode, urlsplit

from obdlab.errors import ObdlabError
from obdlab.registry.deadline import thread_deadline
from obdlab.registry.failures import TRANSPORT_ERRORS, RegistryError, discard, from_exception, from_response
from obdlab.registry.reference import canonical_host

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from urllib.parse import SplitResult

    from obdlab.registry.reference import Repository
    from obdlab.registry.transport import Transport

_MAX_CONFIG = 1 << 20
_MAX_TOKEN_ANSWER = 256 << 10
_MAX_CHALLENGE = 8192
# What a token is worth if its server does not say (docker registry token specification).
_DEFAULT_EXPIRY_S = 60.0
_LONGEST_EXPIRY_S = 86400.0
# A token is renewed this part of its life before its end, so that none expires on its way.
_EXPIRY_MARGIN = 0.1


class CredentialsError(ObdlabError):
    """A credentials file is not what docker's config.json is."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """User names and passwords by registry host, or by host and the beginning of a repository name."""

    _entries: Mapping[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: Path | str | None) -> Self:
        """Read a docker config.json; ``None`` gives no credentials. Raises CredentialsError."""
        if path is None:
            return cls()
        try:
            with Path(path).open("rb") as file:
                text = file.read(_MAX_CONFIG + 1)
        except OSError as error:
            raise CredentialsError(f"{path}: cannot read credentials: {error.strerror}") from error
        if len(text) > _MAX_CONFIG:
            raise CredentialsError(f"{path}: credentials file larger than {_MAX_CONFIG} bytes")
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: bytes, name: str = "credentials") -> Self:
        """Read the content of a docker config.json. Raises CredentialsError."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise CredentialsError(f"{name}: not JSON") from None  # the parser's message may quote a password
        auths = document.get("auths", {}) if isinstance(document, dict) else None
        if not isinstance(auths, dict):
            raise CredentialsError(f'{name}: wanted an object with "auths", an object too')
        found = {}
        for key, entry in auths.items():
            pair = _pair(entry)
            if pair is not None:
                found[_auths_key(key)] = pair
        return cls(found)

    def find(self, host: str, repository: str) -> tuple[str, str] | None:
        """Return (user, password) of the longest key that is ``host`` or ``host/beginning/of/repository``."""
        parts = [canonical_host(host), *repository.split("/")]
        for length in range(len(parts), 0, -1):
            pair = self._entries.get("/".join(parts[:length]))
            if pair is not None:
                return pair
        return None


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate header; the scheme and parameter names are lower case."""

    scheme: str
    parameters: Mapping[str, str]


_PARAMETER = re.compile(r'\s*([\w!#$%&\'*+.^`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))\s*', re.ASCII)
_SCHEME = re.compile(r"\s*([\w!#$%&'*+.^`|~-]+)(?:\s+|\s*,|\s*$)", re.ASCII)
_TOKEN68 = re.compile(r"\s*[\w.~+/-]+=+\s*(?:,|$)", re.ASCII)


def parse_challenges(header: str) -> list[Challenge]:
    """Read a WWW-Authenticate header as far as it is well formed; the rest is left out. Never raises."""
    challenges: list[Challenge] = []
    text = header[:_MAX_CHALLENGE]
    position = 0
    while position < len(text):
        scheme = _SCHEME.match(text, position)
        if scheme is None:
            break
        position = scheme.end()
        parameters: dict[str, str] = {}
        if (token := _TOKEN68.match(text, position)) is not None:  # "Negotiate abc==": nothing for us in it
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
    # The Authorization header in use for one repository and set of actions.
    lock: threading.Lock = field(default_factory=threading.Lock)
    header: str | None = field(default=None, repr=False)
    expires: float = 0.0


class Authenticator:
    """Answers challenges and remembers the answers, per registry, repository and actions ("pull", "pull,push")."""

    def __init__(self, credentials: Credentials, transport: Transport) -> None:
        self._credentials = credentials
        self._transport = transport
        self._lock = threading.Lock()
        self._grants: dict[tuple[str, str, str], _Grant] = {}

    def header(self, repository: Repository, actions: str) -> str | None:
        """Return the Authorization header to send, or None if nothing is known (yet) or it has expired."""
        grant = self._grant(repository, actions)
        return grant.header if time.monotonic() < grant.expires else None

    def answer(self, repository: Repository, actions: str, challenges: Sequence[str], refused: str | None) -> str:
        """Return a new header after one (or none, None) was refused with 401 and these challenges.

        Threads refused at the same time share one new token. Raises RegistryError, permanent unless the token
        server failed for a while.
        """
        grant = self._grant(repository, actions)
        with _within_deadline(grant.lock):
            if grant.header is not None and grant.header != refused and time.monotonic() < grant.expires:
                return grant.header  # another thread was faster
            grant.header = None
            header, life_s = self._negotiate(repository, actions, challenges)
            if header == refused and life_s is None:
                raise RegistryError("registry refuses the credentials", status=401)
            life_s = float("inf") if life_s is None else life_s
            grant.expires = time.monotonic() + life_s * (1 - _EXPIRY_MARGIN)
            grant.header = header
            return header

    def _grant(self, repository: Repository, actions: str) -> _Grant:
        key = (repository.api_host, repository.name, actions)
        with self._lock:
            return self._grants.setdefault(key, _Grant())

    def _negotiate(self, repository: Repository, actions: str, challenges: Sequence[str]) -> tuple[str, float | None]:
        # Returns the header and how long it is good for (None: for ever).
        pair = self._credentials.find(repository.host, repository.name)
        offered = [challenge for text in challenges for challenge in parse_challenges(text)]
        for challenge in offered:
            if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
                return self._fetch_token(repository, actions, challenge.parameters, pair)
        if any(challenge.scheme == "basic" for challenge in offered):
            if pair is None:
                raise RegistryError("registry wants a user and password, and none are configured", status=401)
            return _basic(pair), None
        schemes = sorted({challenge.scheme for challenge in offered}) or "no challenge"
        raise RegistryError(f"registry answered 401 without a usable challenge (got {schemes})", status=401)

    def _fetch_token(
        self, repository: Repository, actions: str, parameters: Mapping[str, str], pair: tuple[str, str] | None
    ) -> tuple[str, float]:
        realm = parameters["realm"]
        parts = _split_realm(realm)
        if parts.scheme != "https" and not repository.plain_http:
            raise RegistryError("token server without TLS for a registry with TLS", status=401)
        query = {"service": parameters["service"]} if "service" in parameters else {}
        query["scope"] = parameters.get("scope") or f"repository:{repository.name}:{actions}"
        url = f"{realm}{'&' if parts.query else '?'}{urlencode(query)}"
        doing = f"asking {parts.hostname} for a token"
        response = self._transport.send("GET", url, {"Authorization": _basic(pair)} if pair else {}, doing=doing)
        if response.status != 200:
            raise from_response(response, doing)
        try:
            text = response.read(_MAX_TOKEN_ANSWER + 1)
        except TRANSPORT_ERRORS as error:
            raise from_exception(error, doing) from error
        finally:
            discard(response)
        return _read_token(text, doing)


@contextmanager
def _within_deadline(lock: threading.Lock) -> Iterator[None]:
    # Another thread may be asking a token server that does not answer, and have more time than we.
    deadline = thread_deadline()
    if not lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
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
    if not isinstance(life_s, int | float) or isinstance(life_s, bool) or not 0 < life_s <= _LONGEST_EXPIRY_S:
        life_s = _DEFAULT_EXPIRY_S
    return f"Bearer {token}", float(life_s)


def _split_realm(realm: str) -> SplitResult:
    try:
        parts = urlsplit(realm)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.fragment
    except ValueError:
        usable = False
    if not usable or not realm.isprintable():
        raise RegistryError("challenge with a malformed realm", status=401)
    return parts


def _basic(pair: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(f"{pair[0]}:{pair[1]}".encode()).decode("ascii")


def _pair(entry: object) -> tuple[str, str] | None:
    # "auth" wins over the two plain fields; an entry without a usable pair is skipped, as docker does.
    if not isinstance(entry, dict):
        return None
    auth = entry.get("auth")
    if isinstance(auth, str) and auth:
        try:
            user, colon, password = base64.b64decode(auth).decode().partition(":")
        except (binascii.Error, ValueError):
            return None
        return (user, password.rstrip("\0")) if colon else None
    name, secret = entry.get("username"), entry.get("password")
    return (name, secret) if isinstance(name, str) and isinstance(secret, str) and name else None


def _auths_key(key: str) -> str:
    # Keys are "host", "host/path" or, older, URLs: "https://index.docker.io/v1/".
    bare = re.sub(r"^https?://", "", key).rstrip("/")
    host, slash, path = bare.partition("/")
    if path in ("v1", "v2"):
        slash, path = "", ""
    return f"{canonical_host(host)}{slash}{path}"
