"""Conversion of a list of images, one after another and several at once; a failed image does not stop the others.

A process of its own converts each image (:mod:`obdlab.convert.batch.job`), on this host or on a worker of Dask
(:mod:`obdlab.convert.batch.pool`). Each outcome is stored on disk at once (:mod:`obdlab.convert.batch.state`), so
that a stopped or killed run can continue.
"""

from __future__ import annotations

import heapq
import queue
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from obdlab.convert.batch.job import Job, Outcome, Pair
from obdlab.errors import FormatError, SourceError
from obdlab.registry.reference import Reference
from obdlab.system.pauses import backoff_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from obdlab.convert.batch.pool import Pool
    from obdlab.convert.batch.state import BatchState

#: Seconds before the next try after a temporary failure, doubled each time.
FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 300.0
_LOOK_S = 0.5
_MOST_LIST = 16 << 20
_LAYOUTS = ("oci:", "oci-archive:", "docker-archive:", "containerd:")


class Watcher(Protocol):
    """Observer of a run. Called from the thread that runs it."""

    def finished(self, pair: Pair, outcome: Outcome) -> None:
        """Note that an image was converted, or has failed for good."""

    def postponed(self, pair: Pair, outcome: Outcome, pause_s: float) -> None:
        """Note that an image failed for a reason that may pass; it will be tried again."""


def read_list(path: Path, template: str = "") -> list[Pair]:
    """Read a list: a source and a destination per line, separated by blanks; ``#`` begins a comment.

    ``template`` is the destination of a line with a source only; {registry}, {repository}, {name} (the last part of
    the repository) and {tag} in it stand for the source's. Raises FormatError (naming the line) or SourceError.
    """
    try:
        if path.stat().st_size > _MOST_LIST:
            raise FormatError("list is too long", blob=str(path), got=path.stat().st_size, wanted=_MOST_LIST)
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SourceError(f"cannot read the list: {error.strerror}", blob=str(path)) from error
    except UnicodeDecodeError as error:
        raise FormatError("list is not UTF-8", blob=str(path), offset=error.start) from error
    found: dict[str, int] = {}
    pairs = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) > 2 or (len(words) == 1 and not template):
            wanted = "source and destination" if not template else "source, or source and destination"
            raise FormatError("line does not make sense", blob=where, got=f"{len(words)} words", wanted=wanted)
        destination = words[1] if len(words) == 2 else filled(template, words[0], where)
        if destination in found:
            raise FormatError(f"destination is that of line {found[destination]} too", blob=where, got=destination)
        found[destination] = number
        pairs.append(Pair(words[0], destination))
    if not pairs:
        raise FormatError("list names no image", blob=str(path))
    return pairs


def filled(template: str, source: str, where: str) -> str:
    """Return the destination from ``template`` for a source in a registry. Raises FormatError."""
    if source.startswith(_LAYOUTS):
        raise FormatError("destination must be given: only images in registries have a name", blob=where, got=source)
    reference = Reference.parse(source.removeprefix("docker://"))
    if not reference.tag and "{tag}" in template:
        raise FormatError("source has no tag for the destination", blob=where, got=source)
    parts = {
        "registry": reference.host,
        "repository": reference.repository,
        "name": reference.repository.rpartition("/")[2],
        "tag": reference.tag or "",
    }
    try:
        return template.format_map(parts)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        wanted = ", ".join(f"{{{name}}}" for name in parts)
        raise FormatError("destination cannot be filled in", blob=where, got=template, wanted=wanted) from error


class Run:
    """Conversion of one list. Images that wait for their next try do not delay others."""

    def __init__(
        self, pairs: Iterable[Pair], state: BatchState, pool: Pool, job: Callable[[Pair], Job], watcher: Watcher
    ) -> None:
        self._state = state
        self._pool = pool
        self._job = job
        self._watcher = watcher
        self._waiting = deque(pairs)
        self._later: list[tuple[float, int, Pair]] = []
        self._running: dict[Pair, int] = {}
        self._tries: dict[Pair, int] = {}
        self._done: queue.SimpleQueue[tuple[Pair, Outcome]] = queue.SimpleQueue()

    def work_off(self, *, tries: int = 3, first_pause_s: float = FIRST_PAUSE_S) -> None:
        """Return when no image is left to try, each at most ``tries`` times.

        Interrupts and errors of the pool pass through; the caller must stop the pool then.
        """
        while self._waiting or self._later or self._running:
            self._start()
            try:
                pair, outcome = self._done.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            del self._running[pair]
            self._finish(pair, outcome, tries, first_pause_s)

    def _start(self) -> None:
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            self._waiting.append(heapq.heappop(self._later)[2])
        while self._waiting and len(self._running) < self._pool.slots():
            pair = self._waiting.popleft()
            self._tries[pair] = self._running[pair] = self._tries.get(pair, 0) + 1
            self._pool.submit(self._job(pair), self._reporter(pair))

    def _reporter(self, pair: Pair) -> Callable[[Outcome], None]:
        return lambda outcome: self._done.put((pair, outcome))

    def _finish(self, pair: Pair, outcome: Outcome, tries: int, first_pause_s: float) -> None:
        tried = self._tries[pair]
        self._state.store(pair, outcome, tried)
        if outcome.error and outcome.temporary and tried < tries:
            pause = backoff_s(tried - 1, first_pause_s, _LONGEST_PAUSE_S)
            heapq.heappush(self._later, (time.monotonic() + pause, id(pair), pair))
            self._watcher.postponed(pair, outcome, pause)
        else:
            self._watcher.finished(pair, outcome)
