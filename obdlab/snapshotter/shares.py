"""Shares of registries: calls that wait for a registry which does not answer leave room for all other calls."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from obdlab.errors import ObdlabError, SourceError
from obdlab.image.config import ImageConfig

if TYPE_CHECKING:
    from collections.abc import Container, Iterator
    from pathlib import Path


class Bounds(NamedTuple):
    """How many places there are, and for which registries."""

    #: All places, for registries with a success.
    most: int
    #: Those of them that registries without a success so far have together.
    unproven: int
    #: Those of ``unproven`` that are only ever the first place of a registry. So that many silent registries can
    #: hold a place and more, and each further one still gets its first place at once.
    firsts: int
    #: A registry may take as many places as one part in so many of those that are free to it.
    part: int


#: Attaches that are with the device host at a time; the host takes 128 requests (``server.host.MAX_REQUESTS``), and
#: the others stay free for requests that are no attaches. A new registry alone gets 10: more would not be faster, as
#: each takes some 50 ms of a processor.
ATTACHES = Bounds(most=112, unproven=96, firsts=56, part=3)
#: Calls that wait for registries: attaches, and calls behind these. The others of the service's workers stay free for
#: calls that need no registry. A new registry alone gets 112, as many as a node has pods.
CALLS = Bounds(most=512, unproven=400, firsts=64, part=2)
_MOST_NAMES = 1024


class BusyRegistryError(SourceError):
    """Too many calls wait for this registry already. The client may try again."""


def registry_of(config: Path) -> str:
    """Return host and port of the registry that an image's configuration names; '' if none, or if unreadable."""
    try:
        return urlsplit(ImageConfig.load(config).repo_blob_url).netloc
    except (ObdlabError, ValueError):  # is reported by the attach
        return ""


class _Places:
    """Places of ``bounds``, counted by registry. Registries that are not in ``proven`` have a part of them together.

    A registry may take a part of the free places, and one in any case. So silent registries, which keep all that they
    get, leave some to each further name. With a fixed share for each, as many names as there are shares would take
    all. The first place of a registry without a success comes from a reserve: it goes to nothing else, so it takes
    as many silent names as the reserve has places, and some more, until a further name has to wait for them.
    """

    def __init__(self, bounds: Bounds, proven: Container[str]) -> None:
        self._bounds = bounds
        self._proven = proven
        self._taken: Counter[str] = Counter()

    def of(self, registry: str) -> int:
        """Return the number of places that the registry has taken."""
        return self._taken[registry]

    @property
    def taken(self) -> int:
        """The number of places that all registries have taken."""
        return self._taken.total()

    def has_room(self, registry: str) -> bool:
        """Return True if the registry may take another place."""
        taken = self._taken[registry]
        if registry in self._proven:
            free = self._bounds.most - self.taken
            return free > 0 and taken < max(1, free // self._bounds.part)
        unproven = [count for name, count in self._taken.items() if count and name not in self._proven]
        free = min(self._bounds.most - self.taken, self._bounds.unproven - sum(unproven))
        if free <= 0 or not taken:
            return free > 0
        free -= max(0, self._bounds.firsts - len(unproven))
        return taken < free // self._bounds.part

    def take(self, registry: str) -> None:
        """Take a place."""
        self._taken[registry] += 1

    def give_back(self, registry: str) -> None:
        """Give a place back."""
        self._taken[registry] -= 1
        if not self._taken[registry]:
            del self._taken[registry]


class Shares:
    """Counts calls and attaches by registry. Thread-safe."""

    def __init__(self, calls: Bounds = CALLS, attaches: Bounds = ATTACHES) -> None:
        # Registries with a successful attach, the latest last. Failures change nothing: else a client could have the
        # images of a good registry wait with those of silent ones by asking it for images that it does not have.
        self._proven: dict[str, None] = {}
        self._calls = _Places(calls, self._proven)
        self._attaches = _Places(attaches, self._proven)
        self._changed = threading.Condition()

    @contextmanager
    def call(self, registry: str) -> Iterator[None]:
        """Count a call that may wait for the registry, for the block. Raises BusyRegistryError beyond the share."""
        with self._changed:
            if not self._calls.has_room(registry):
                raise BusyRegistryError(
                    f"registry {registry}: {self._calls.of(registry)} calls wait for it already, "
                    f"{self._calls.taken} for all registries; try again"
                )
            self._calls.take(registry)
        try:
            yield
        finally:
            with self._changed:
                self._calls.give_back(registry)

    @contextmanager
    def attach(self, registry: str, patience_s: float) -> Iterator[None]:
        """Wait for one of the registry's attaches, for the block. Raises BusyRegistryError after ``patience_s``."""
        deadline = time.monotonic() + patience_s
        with self._changed:
            while not self._attaches.has_room(registry):
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise BusyRegistryError(
                        f"registry {registry}: {self._attaches.of(registry)} attaches have waited for it for "
                        f"{patience_s:g} s, {self._attaches.taken} for all registries"
                    )
            self._attaches.take(registry)
        try:
            yield
            with self._changed:
                self._prove(registry)
        finally:
            with self._changed:
                self._attaches.give_back(registry)
                self._changed.notify_all()

    def _prove(self, registry: str) -> None:
        self._proven.pop(registry, None)
        if len(self._proven) >= _MOST_NAMES:
            del self._proven[next(iter(self._proven))]
        self._proven[registry] = None
