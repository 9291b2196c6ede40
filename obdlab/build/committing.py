"""Sealed layers become blobs, and go to the destination, while further steps run."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.closing import Closing
from obdlab.convert.endpoints.layout import digest_of_file
from obdlab.convert.layer import begin_compressing
from obdlab.errors import SourceError
from obdlab.layerfiles.writing import Packing, write_packed
from obdlab.layers.commit import commit
from obdlab.layers.lsmt import open_layer
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.build.layerstore import LayerBlob, LayerStore

_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the image that is being built: the file that devices read, and the blob that it becomes."""

    path: Path
    blob: Future[LayerBlob]


class Committer(Closing):
    """Packs sealed layers in one process, in the order of their sealing, then has each stored by ``store``.

    ``store`` runs in a thread and gets only the layers whose ``publish`` was set.
    """

    def __init__(self, kept: LayerStore, packing: Packing, store: Callable[[LayerBlob], None]) -> None:
        self._kept = kept
        self._packing = packing
        self._store = store
        spawn = multiprocessing.get_context("spawn")  # forking a process with threads may hang
        self._packers = ProcessPoolExecutor(1, spawn, initializer=begin_compressing)
        self._threads = ThreadPoolExecutor(1, "build-commit")
        self._storing = ThreadPoolExecutor(1, "build-store")
        self._stored: list[Future[None]] = []
        #: Seconds of packing, and of storing, so far.
        self.pack_s = 0.0
        self.store_s = 0.0

    def start(self) -> None:
        """Start the process now, as layers will come."""
        self._packers.submit(os.getpid)

    def add(self, sealed: Path, key: str, below: Path | str, *, publish: bool) -> Layer:
        """Have a sealed layer packed, kept under ``key`` and stored. Does not wait.

        ``below`` is the file of the layer below it, or that layer's UUID.
        """
        return Layer(sealed, self._threads.submit(self._pack, sealed, key, below, publish))

    def add_finished(self, blob: LayerBlob, *, publish: bool) -> Layer:
        """Have a layer of an earlier build stored. Does not wait."""
        done: Future[LayerBlob] = Future()
        done.set_result(blob)
        if publish:
            self._stored.append(self._storing.submit(self._timed_store, blob))
        return Layer(blob.path, done)

    def wait(self) -> None:
        """Wait until all layers are packed and stored. Raises the first error."""
        self._threads.submit(lambda: None).result()
        for stored in self._stored:
            stored.result()

    def close(self) -> None:
        """Give up waiting layers, and end the process."""
        for executor in (self._threads, self._storing, self._packers):
            executor.shutdown(cancel_futures=True)

    def _pack(self, sealed: Path, key: str, below: Path | str, publish: bool) -> LayerBlob:
        began = time.monotonic()
        target = self._kept.new_path(sealed.name)
        try:
            digest = self._packers.submit(pack, sealed, target, self._packing, below).result()
            blob = self._kept.add(key, target, digest)
        except BrokenProcessPool as error:
            raise SourceError(
                "the process that packs layers was killed, or could not start", blob=str(sealed)
            ) from error
        finally:
            target.unlink(missing_ok=True)
        self.pack_s += time.monotonic() - began
        if publish:
            self._stored.append(self._storing.submit(self._timed_store, blob))
        return blob

    def _timed_store(self, blob: LayerBlob) -> None:
        began = time.monotonic()
        self._store(blob)
        self.store_s += time.monotonic() - began


def pack(sealed: Path, target: Path, packing: Packing, below: Path | str) -> str:
    """Write a sealed layer as a compact, compressed blob to a new file; return its digest. Raises SourceError."""
    try:
        parent = below if isinstance(below, str) else _uuid_of(below)
        with LocalFile(sealed) as file, open_layer(file) as layer, target.open("xb", buffering=_BUFFER) as output:
            write_packed(
                output,
                packing,
                lambda sink: commit(layer, sink, uuid=layer.uuid, parent_uuid=parent),
                name=str(sealed),
            )
        return digest_of_file(target)
    except OSError as error:
        raise SourceError(f"cannot pack the layer: {error.strerror or error}", blob=str(sealed)) from error


def _uuid_of(path: Path) -> str:
    with LocalFile(path) as file, open_layer(file) as layer:
        return layer.uuid
