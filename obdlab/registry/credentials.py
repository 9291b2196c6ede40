"""Users and passwords for registries: docker's config.json, its helper programs, and credential services.

Sources: docker's config.json ("auths", "credHelpers", "credsStore"), its credential helper protocol, and overlaybd's
credentialConfig (``GET <address>?remote_url=<URL>``). Passwords appear in no message, log or ``repr``.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import re
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from obdlab.call import UNBOUND
from obdlab.errors import ObdlabError
from obdlab.observe.redact import redacted
from obdlab.registry.answer import read_small
from obdlab.registry.errors import RegistryError
from obdlab.registry.reference import canonical_host

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from obdlab.call import Call
    from obdlab.registry.reference import Repository
    from obdlab.registry.transport import Transport

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

_MAX_CONFIG = 1 << 20
_MAX_ANSWER = 256 << 10
#: A file is checked for changes whenever a registry asks for credentials, and otherwise at most this often.
_LOOK_S = 1.0
# How long an answer of a service or helper is valid: they give out short-lived passwords.
_ANSWER_LIFE_S = 30.0
_LONGEST_WAIT_S = 600.0
# A failed source is not asked again for this long, however many requests come.
_FAILURE_LIFE_S = 1.0
_MOST_ANSWERS = 1024
_HELPER_TIMEOUT_S = 10.0
_HELPER_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Message of helpers that have no credentials (docker credential helper protocol).
_NOT_FOUND = "credentials not found in native keychain"
# Docker Hub's key in "credHelpers", and its name for helpers.
_HUB_SERVER = "https://index.docker.io/v1/"


class CredentialsError(ObdlabError, code="credentials"):
    """Credentials cannot be read, or are malformed."""


class Found(NamedTuple):
    """The answer of a source: user and password, or None; ``trouble`` is an error of the source, or ''."""

    pair: Pair | None
    trouble: str = ""

    def __repr__(self) -> str:
        return f"Found({'a pair' if self.pair else 'none'}, trouble={self.trouble!r})"


_NOTHING = Found(None)


class CredentialSource(Protocol):
    """A source of credentials. Thread-safe."""

    def look_up(self, repository: Repository, url: str, refused: Pair | None = None, call: Call = UNBOUND) -> Found:
        """Return credentials for a request of ``url``, by the deadline of the call. If ``refused`` were just refused,
        look again.

        Never raises: a registry may allow anonymous access, and if it does not, ``trouble`` is reported with its
        refusal.
        """

    def likely(self, repository: Repository) -> bool:
        """Return True if there may be credentials for the repository, without I/O to a service or helper."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """User names and passwords by registry host, or by host and the beginning of a repository name."""

    _entries: Mapping[str, Pair] = field(default_factory=dict, repr=False)
    #: Helper programs ("ecr-login" for docker-credential-ecr-login) by host; "" is for all other hosts.
    helpers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | str | None) -> Self:
        """Read a docker config.json; ``None`` means no credentials. Raises CredentialsError."""
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
        document = _object(text, name)
        auths = document.get("auths", {})
        if not isinstance(auths, dict):
            raise CredentialsError(f'{name}: wanted an object with "auths", an object too')
        found = {}
        for key, entry in auths.items():
            pair = _pair(entry)
            if pair is not None:
                found[_auths_key(key)] = pair
        return cls(found, _helpers(document))

    def find(self, host: str, repository: str) -> Pair | None:
        """Return (user, password) of the longest key that is ``host`` or ``host/beginning/of/repository``."""
        parts = [canonical_host(host), *repository.split("/")]
        for length in range(len(parts), 0, -1):
            pair = self._entries.get("/".join(parts[:length]))
            if pair is not None:
                return pair
        return None

    def look_up(self, repository: Repository, url: str, refused: Pair | None = None, call: Call = UNBOUND) -> Found:
        """Return the credentials that :meth:`find` returns for the repository."""
        return Found(self.find(repository.host, repository.name))

    def likely(self, repository: Repository) -> bool:
        """Return True if there is an entry, or a helper program to ask."""
        return self.find(repository.host, repository.name) is not None or bool(_helper_of(self, repository.host))


class CredentialsFile:
    """A docker config.json that is read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Never raises: a missing file matters only when a registry asks for credentials."""
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._looked = float("-inf")
        self._credentials = Credentials()
        self._trouble = ""
        self._helpers = _Remembered(_ask_helper)

    def __repr__(self) -> str:
        return f"CredentialsFile({str(self._path)!r})"

    def look_up(self, repository: Repository, url: str, refused: Pair | None = None, call: Call = UNBOUND) -> Found:
        """Return the file's entry for the repository, or the answer of the helper program that it names."""
        credentials, trouble = self._current(look=True, anew=refused is not None)
        pair = credentials.find(repository.host, repository.name)
        if pair is None and (helper := _helper_of(credentials, repository.host)):
            return self._helpers.get((helper, repository.host), refused, call)
        return Found(pair, trouble)

    def likely(self, repository: Repository) -> bool:
        """Return True if the file has an entry for the repository, or names a helper program."""
        return self._current()[0].likely(repository)

    def _current(self, *, look: bool = False, anew: bool = False) -> tuple[Credentials, str]:
        with self._lock:
            now = time.monotonic()
            if look or now - self._looked >= _LOOK_S:
                self._looked = now
                self._read_if_changed(anew=anew)
            return self._credentials, self._trouble

    def _read_if_changed(self, *, anew: bool) -> None:
        try:
            state = os.stat(self._path)
            seen = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        except OSError:
            seen = None  # reading it reports the error
        if seen is not None and seen == self._seen and not anew:
            return
        try:
            self._credentials, self._seen, self._trouble = Credentials.load(self._path), seen, ""
        except CredentialsError as error:
            # The last good entries stay in use: the file may be half written, or missing for a moment.
            if str(error) != self._trouble:
                logger.warning("%s; going on with what was known before, if anything", error)
            self._seen, self._trouble = None, str(error)


class CredentialsService:
    """A service for credentials, asked by HTTP, TLS or over a unix socket, as overlaybd does."""

    def __init__(self, address: str, transport: Transport, *, timeout_s: float) -> None:
        """``address`` is a URL; the transport has the certificates or the socket for it."""
        self._address = address
        self._transport = transport
        self._timeout_s = timeout_s
        self._answers = _Remembered(self._ask)

    def __repr__(self) -> str:
        return f"CredentialsService({redacted(self._address)!r})"

    def look_up(self, repository: Repository, url: str, refused: Pair | None = None, call: Call = UNBOUND) -> Found:
        """Ask the service, unless its answer for this repository is younger than 30 s and was not refused."""
        return self._answers.get((repository.host, repository.name), refused, call, url)

    def likely(self, repository: Repository) -> bool:
        """Return True: a configured service means that registries want credentials."""
        return True

    def _ask(self, key: tuple[str, ...], call: Call, url: str) -> Found:
        host, name = key
        doing = f"asking {redacted(self._address)} for credentials"
        # Not URL-encoded, as existing services expect; only characters that would end the query are.
        asked = url.replace("&", "%26").replace("#", "%23")
        separator = "&" if "?" in self._address else "?"
        try:
            call = call.until(time.monotonic() + self._timeout_s)
            text = self._fetch(f"{self._address}{separator}remote_url={asked}", doing, call)
            return Found(_service_credentials(text, doing).find(host, name))
        except ObdlabError as error:
            logger.warning("%s; going on without", error)
            return Found(None, str(error))

    def _fetch(self, url: str, doing: str, call: Call) -> bytes:
        response = self._transport.send("GET", url, {"Accept": "application/json"}, doing=doing, call=call)
        if response.status != 200:
            response.close()
            # The body may quote a secret.
            raise RegistryError(f"{doing}: answered {response.status}", status=response.status)
        return read_small(response, _MAX_ANSWER, doing)


@dataclass(slots=True)
class _Answer:
    lock: threading.Lock = field(default_factory=threading.Lock)
    found: Found = _NOTHING
    ends: float = float("-inf")


class _Remembered:
    # Cached answers of a slow source by key: one query at a time, valid for a while, dropped after a refusal.
    def __init__(self, ask: Callable[..., Found]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._answers: dict[tuple[str, ...], _Answer] = {}

    def get(self, key: tuple[str, ...], refused: Pair | None, call: Call, *rest: str) -> Found:
        with self._lock:
            if len(self._answers) >= _MOST_ANSWERS:
                self._answers.clear()
            answer = self._answers.setdefault(key, _Answer())
        if not answer.lock.acquire(timeout=call.left_s(_LONGEST_WAIT_S)):
            return Found(None, "no credentials within the deadline")
        try:
            good = time.monotonic() < answer.ends and (refused is None or answer.found.pair != refused)
            if not good:
                answer.found = self._ask(key, call, *rest)
                life_s = _FAILURE_LIFE_S if answer.found.trouble else _ANSWER_LIFE_S
                answer.ends = time.monotonic() + life_s
            return answer.found
        finally:
            answer.lock.release()


def _service_credentials(text: bytes, doing: str) -> Credentials:
    # {"traceId": ..., "success": true, "data": {"auths": {...}}}
    document = _object(text, doing)
    if document.get("success") is not True:
        raise CredentialsError(f"{doing}: the answer says no success")
    return Credentials.parse(json.dumps(document.get("data")).encode(), doing)


def _ask_helper(key: tuple[str, ...], call: Call) -> Found:
    import shutil

    helper, host = key
    program = shutil.which(f"docker-credential-{helper}")
    name = f"docker-credential-{helper}"
    if program is None:
        return Found(None, f"{name}: no such program, though the credentials file names it")
    server = _HUB_SERVER if host == "docker.io" else host
    try:
        done = subprocess.run(
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=max(0.1, call.left_s(_HELPER_TIMEOUT_S)),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found(None, f"{name}: {'no answer in time' if not isinstance(error, OSError) else error.strerror}")
    if done.returncode != 0:
        nothing = _NOT_FOUND in (done.stdout + done.stderr).decode(errors="replace")
        return Found(None, "" if nothing else f"{name}: failed with status {done.returncode}")
    return _helper_answer(done.stdout, name)


def _helper_answer(text: bytes, name: str) -> Found:
    try:
        document = _object(text, name)
    except CredentialsError as error:
        return Found(None, str(error))
    pair = _as_pair(document.get("Username"), document.get("Secret"))
    if pair is None:
        return Found(None, f"{name}: answer without Username and Secret")
    if pair[0] == "<token>":
        return Found(None, f"{name}: gives an identity token, which is not supported")
    return Found(pair)


def _helper_of(credentials: Credentials, host: str) -> str:
    return credentials.helpers.get(host) or credentials.helpers.get("", "")


def _helpers(document: Mapping[str, object]) -> dict[str, str]:
    table = document.get("credHelpers")
    named = {**(table if isinstance(table, dict) else {}), "": document.get("credsStore")}
    return {
        _auths_key(host) if host else "": helper
        for host, helper in named.items()
        if isinstance(helper, str) and _HELPER_NAME.fullmatch(helper)
    }


def _object(text: bytes, name: str) -> dict[str, object]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise CredentialsError(f"{name}: not JSON") from None  # the parser's message may quote a password
    if not isinstance(document, dict):
        raise CredentialsError(f"{name}: not a JSON object")
    return document


def _pair(entry: object) -> Pair | None:
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
    return _as_pair(entry.get("username"), entry.get("password"))


def _as_pair(user: object, password: object) -> Pair | None:
    if not isinstance(user, str) or not isinstance(password, str) or not user:
        return None
    try:
        f"{user}{password}".encode()
    except UnicodeError:  # JSON can spell lone surrogates
        return None
    return user, password


def _auths_key(key: str) -> str:
    # Keys are "host", "host/path" or, older, URLs: "https://index.docker.io/v1/".
    bare = re.sub(r"^https?://", "", key).rstrip("/")
    host, slash, path = bare.partition("/")
    if path in ("v1", "v2"):
        slash, path = "", ""
    return f"{canonical_host(host)}{slash}{path}"
