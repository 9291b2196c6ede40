"""Shares of registries: calls that wait for a registry which does not answer leave room for all other calls."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from obdlab.errors import ObdlabError, SourceError
from obdlab.image.config import ImageConfig

if TYPE_CHECKING:
    from collections.abc import Container, Iterator
    from pathlib import Path

#: Attaches that are with the device host at a time; the host takes 128 requests (``server.host.MAX_REQUESTS``), and
#: the others stay free for requests that are no attaches. The second number: those of registries without a success so
#: far.
MOST_ATTACHES, MOST_UNPROVEN_ATTACHES = 112, 80
#: Calls that wait for registries: attaches, and calls behind these. The others of the service's workers stay free for
#: calls that need no registry.
MOST_CALLS, MOST_UNPROVEN_CALLS = 448, 336
#: A registry may take as many places as one part in so many of the free ones. A new registry alone gets 16 attaches
#: (more would not be faster, as each takes some 50 ms of a processor) and 112 calls, as many as a node has pods.
_ATTACHES_PART = 4
_CALLS_PART = 2
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
    """``most`` places, counted by registry; registries that are not in ``proven`` have ``unproven`` of them together.

    A registry may take a part of the free places, and one in any case. So silent registries, which keep all that they
    get, leave some to each further name: eight of them take 65 of 80 places. With a fixed share for each, as many
    names as there are shares would take all.
    """

    def __init__(self, most: int, unproven: int, part: int, proven: Container[str]) -> None:
        self._most = most
        self._unproven = unproven
        self._part = part
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
        free = self._most - self.taken
        if registry not in self._proven:
            unproven = sum(count for name, count in self._taken.items() if name not in self._proven)
            free = min(free, self._unproven - unproven)
        return free > 0 and self._taken[registry] < max(1, free // self._part)

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

    def __init__(
        self,
        calls: tuple[int, int] = (MOST_CALLS, MOST_UNPROVEN_CALLS),
        attaches: tuple[int, int] = (MOST_ATTACHES, MOST_UNPROVEN_ATTACHES),
    ) -> None:
        # Registries with a successful attach, the latest last. Failures change nothing: else a client could have the
        # images of a good registry wait with those of silent ones by asking it for images that it does not have.
        self._proven: dict[str, None] = {}
        self._calls = _Places(*calls, _CALLS_PART, self._proven)
        self._attaches = _Places(*attaches, _ATTACHES_PART, self._proven)
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
