"""Whether this host may have a blob, as the registry says: asked once, and believed for a while."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from obdlab.call import Call
from obdlab.registry.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Repository
    from obdlab.registry.transport import Transport

_GRANTED_S = 600.0
_REFUSED_S = 30.0
_MOST = 4096
#: Time for one question, with the wait for another one about the same blob.
_ASK_S = 10.0
_REFUSALS = (401, 403, 404)
_DOING = "asking whether the blob may be read"


class Known(NamedTuple):
    """A blob's size, and True if it may be read without credentials."""

    size: int
    public: bool


class Rights:
    """Asks registries with this host's own credentials, and without any. Thread-safe.

    Both clients must reach the registry itself: mirrors and proxies know nothing about rights.
    """

    def __init__(self, anonymous: RegistryClient, own: RegistryClient, transport: Transport) -> None:
        self._anonymous, self._own, self._transport = anonymous, own, transport
        self._lock = threading.Lock()
        self._known: OrderedDict[object, tuple[float, Known | RegistryError | bool]] = OrderedDict()
        self._asking: dict[object, threading.Lock] = {}

    def of(self, repository: Repository, digest: str) -> Known:
        """Return what the registry says of the blob. Raises RegistryError, also while a refusal is remembered."""
        key = (repository, digest)
        with self._turn(key) as call:
            found = self._recall(key)
            if found is None:
                try:
                    found = self._ask(repository, digest, call)
                except RegistryError as error:
                    if error.temporary:
                        raise
                    found = error
                self._remember(key, found, _REFUSED_S if isinstance(found, RegistryError) else _GRANTED_S)
        if isinstance(found, Known):
            return found
        raise found if isinstance(found, RegistryError) else TypeError(found)

    def admits(self, repository: Repository, digest: str, authorization: str) -> bool:
        """Return True if the registry gives the blob to the bearer of this Authorization header.

        Raises RegistryError if the registry cannot be asked.
        """
        token = hashlib.sha256(authorization.encode("latin-1", "replace")).digest()
        key = (repository, digest, token)
        with self._turn(key) as call:
            found = self._recall(key)
            if found is None:
                answer = self._transport.send(
                    "GET",
                    f"{repository.blobs_url}/{digest}",
                    {"Range": "bytes=0-0"},
                    doing=_DOING,
                    call=call,
                    authorization=authorization,
                )
                answer.close()
                if answer.status >= 500 or answer.status == 429:
                    raise RegistryError(f"{_DOING}: registry answered {answer.status}", temporary=True)
                found = answer.status < 400
                self._remember(key, found, _GRANTED_S if found else _REFUSED_S)
        return found is True

    def _ask(self, repository: Repository, digest: str, call: Call) -> Known:
        try:
            return Known(self._anonymous.blob_size(repository, digest, call), public=True)
        except RegistryError as error:
            if error.temporary or (error.status not in _REFUSALS and error.status is not None):
                raise
        return Known(self._own.blob_size(repository, digest, call), public=False)

    # One question at a time for each key; others wait for its answer. Waiting and asking have one deadline: behind a
    # silent registry, the last of many askers would wait for the time-outs of all before it.
    @contextmanager
    def _turn(self, key: object) -> Iterator[Call]:
        call = Call(time.monotonic() + _ASK_S)
        with self._lock:
            if len(self._asking) > _MOST:
                self._asking = {each: lock for each, lock in self._asking.items() if lock.locked()}
            lock = self._asking.setdefault(key, threading.Lock())
        if not lock.acquire(timeout=call.left_s(_ASK_S)):
            raise RegistryError(f"{_DOING}: no answer in time", temporary=True, timed_out=True)
        try:
            yield call
        finally:
            lock.release()

    def _recall(self, key: object) -> Known | RegistryError | bool | None:
        with self._lock:
            until, found = self._known.get(key, (0.0, None))
        return found if time.monotonic() < until else None

    def _remember(self, key: object, found: Known | RegistryError | bool, seconds: float) -> None:
        with self._lock:
            self._known[key] = (time.monotonic() + seconds, found)
            self._known.move_to_end(key)
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
