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
    from collections.abc import Iterator
    from pathlib import Path

#: Attaches of images of one registry that are with the device host at a time; the host takes 128 requests
#: (``server.host.MAX_REQUESTS``). More would not be faster where each takes some 50 ms of a processor.
MOST_ATTACHES = 16
#: Calls that wait for one registry at a time, attaches and calls behind these; more than a node has pods by default.
MOST_CALLS = 256
#: Calls that wait for any registry. The others of the service's workers stay free for calls that need none.
MOST_CALLS_TOGETHER = 448


class BusyRegistryError(SourceError):
    """Too many calls wait for this registry already. The client may try again."""


def registry_of(config: Path) -> str:
    """Return host and port of the registry that an image's configuration names; '' if none, or if unreadable."""
    try:
        return urlsplit(ImageConfig.load(config).repo_blob_url).netloc
    except (ObdlabError, ValueError):  # is reported by the attach
        return ""


class Shares:
    """Counts calls and attaches by registry. Thread-safe."""

    def __init__(
        self, calls: int = MOST_CALLS, calls_together: int = MOST_CALLS_TOGETHER, attaches: int = MOST_ATTACHES
    ) -> None:
        self._most_calls = calls
        self._most_together = calls_together
        self._most_attaches = attaches
        self._calls: Counter[str] = Counter()
        self._attaches: Counter[str] = Counter()
        self._changed = threading.Condition()

    @contextmanager
    def call(self, registry: str) -> Iterator[None]:
        """Count a call that may wait for the registry, for the block. Raises BusyRegistryError beyond the share."""
        with self._changed:
            if self._calls[registry] >= self._most_calls or self._calls.total() >= self._most_together:
                raise BusyRegistryError(
                    f"registry {registry}: {self._calls[registry]} calls wait for it already, "
                    f"{self._calls.total()} for all registries; try again"
                )
            self._calls[registry] += 1
        try:
            yield
        finally:
            self._end(self._calls, registry)

    @contextmanager
    def attach(self, registry: str, patience_s: float) -> Iterator[None]:
        """Wait for one of the registry's attaches, for the block. Raises BusyRegistryError after ``patience_s``."""
        deadline = time.monotonic() + patience_s
        with self._changed:
            while self._attaches[registry] >= self._most_attaches:
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise BusyRegistryError(
                        f"registry {registry}: {self._most_attaches} attaches have waited for it for {patience_s:g} s"
                    )
            self._attaches[registry] += 1
        try:
            yield
        finally:
            self._end(self._attaches, registry)

    def _end(self, counts: Counter[str], registry: str) -> None:
        with self._changed:
            counts[registry] -= 1
            if not counts[registry]:
                del counts[registry]
            self._changed.notify_all()
