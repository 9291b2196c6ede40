"""Downloads layers into containerd's content store, a few at a time."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from contextlib import closing
from typing import TYPE_CHECKING, Protocol, Self

from obdlab.containerd.content import CHUNK
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence
    from types import TracebackType

    from obdlab.containerd.client import LeasedContainerd
    from obdlab.formats.oci import Descriptor
    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Repository

#: As many as containerd's own clients: more do not use a line better, and registries limit them.
PARALLEL_DOWNLOADS = 3
_GRACE_S = 1.0


class Progress(Protocol):
    """Observer of the download. Called from several threads."""

    def expect(self, size: int) -> None:
        """Report that ``size`` more bytes are about to be fetched."""

    def advance(self, size: int) -> None:
        """Report that ``size`` bytes have been received."""


class LayerFetcher:
    """Fetches layers in the background; after the first failure it fetches no more.

    Use as a context manager: leaving it stops running downloads. It does not wait for a thread that a silent registry
    holds up; that thread ends with its request, and stores nothing.
    """

    def __init__(
        self,
        containerd: LeasedContainerd,
        registry: RegistryClient,
        repository: Repository,
        labels: Mapping[str, str],
        progress: Progress | None,
    ) -> None:
        self._containerd = containerd
        self._registry = registry
        self._repository = repository
        self._labels = labels
        self._progress = progress
        self._queue: queue.SimpleQueue[Descriptor | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._futures: dict[str, Future[None]] = {}
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._fetched_bytes = 0
        self._lock = threading.Lock()

    def start(self, layers: Iterable[Descriptor]) -> None:
        """Begin to fetch these layers, in this order; layers begun before are skipped."""
        for layer in layers:
            if layer.digest in self._futures:
                continue
            self._futures[layer.digest] = Future()
            self._queue.put(layer)
            if len(self._threads) < PARALLEL_DOWNLOADS:
                # Daemons, since a stalled registry must not delay the exit of an interrupted program.
                thread = threading.Thread(target=self._work, name="obdlab-fetch", daemon=True)
                self._threads.append(thread)
                thread.start()

    def bring(self, layers: Sequence[Descriptor]) -> None:
        """Fetch all of these layers into the content store. Raises the error of the first failed download."""
        self.start(layers)
        for layer in layers:
            self.wait(layer)

    @property
    def fetched_bytes(self) -> int:
        """Bytes of all downloaded layers (without those the content store had)."""
        return self._fetched_bytes

    def wait(self, layer: Descriptor) -> None:
        """Wait until the content store has the layer. Raises the error of the first failed download."""
        try:
            self._futures[layer.digest].result()
        except _StoppedError:
            assert self._failure is not None
            raise self._failure from None

    def _work(self) -> None:
        while layer := self._queue.get():
            future = self._futures[layer.digest]
            try:
                self._bring(layer)
            except BaseException as error:
                if not isinstance(error, _StoppedError):
                    with self._lock:
                        self._failure = self._failure or error
                    self._stop.set()
                future.set_exception(error)
            else:
                future.set_result(None)

    def _bring(self, layer: Descriptor) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with closing(self._chunks(layer)) as chunks:
            fetched = self._containerd.content.ingest(layer.digest, layer.size, chunks, self._labels)
        if fetched:
            with self._lock:
                self._fetched_bytes += layer.size

    def _chunks(self, layer: Descriptor) -> Generator[bytes, None, None]:
        if self._progress:
            self._progress.expect(layer.size)
        with self._registry.stream_blob(self._repository, layer.digest, layer.size) as stream:
            while chunk := stream.read(CHUNK):
                if self._stop.is_set():
                    raise _StoppedError
                if self._progress:
                    self._progress.advance(len(chunk))
                yield chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + _GRACE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


class _StoppedError(ObdlabError):
    # Another download failed, or the pull was interrupted.
    pass
