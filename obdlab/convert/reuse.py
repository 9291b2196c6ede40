"""Finding finished layers and manifests.

They may be at the destination, in another repository of its host, or left in the work directory by a killed
conversion. The database gives candidates; the destination is asked each time if it has them.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.convert.database import DatabaseError, LayerKey, LayerRecord, stack_digest
from obdlab.convert.storedtrees import tree_files
from obdlab.errors import FormatError
from obdlab.formats import oci

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from obdlab.convert.database import Database
    from obdlab.convert.endpoints.endpoint import ImageDestination
    from obdlab.convert.layer import LayerOptions
    from obdlab.convert.workdir import FinishedLayers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reused:
    """A finished layer: a file of the work directory that is not stored yet, or a blob at the destination."""

    record: LayerRecord
    #: None for a blob at the destination.
    path: Path | None
    #: Description, for people, of the place it was found in.
    where: str


class Reuse:
    """Finds the finished layers of one conversion, and records new ones."""

    def __init__(
        self,
        destination: ImageDestination,
        database: Database | None,
        finished: FinishedLayers,
        options: LayerOptions,
    ) -> None:
        self._destination = destination
        self._database = database
        self._finished = finished
        self._options = options

    def key(self, chain_id: str, parent_chain_id: str, merged: int, below: Sequence[str]) -> LayerKey:
        """Return the key of a layer made of ``merged`` OCI layers; ``below`` are the digests below it."""
        more = {"on": parent_chain_id} if merged > 1 else {}
        return LayerKey(chain_id, self._options.digest(**more), stack_digest(below))

    def find(self, key: LayerKey) -> Reused | None:
        """Return the finished layer, if found. Errors of the destination pass through."""
        return self._at_destination(key) or self._in_work_directory(key)

    def made(self, key: LayerKey, path: Path, record: LayerRecord) -> None:
        """Record a finished layer, before it is stored."""
        self._finished.add(key.name, path, record)

    def stored(self, key: LayerKey, record: LayerRecord) -> None:
        """Record that the destination has the layer."""
        place = self._destination.place
        if self._database is not None and place is not None:
            with _hints():
                self._database.add_layer(place, key, record)

    def _at_destination(self, key: LayerKey) -> Reused | None:
        place = self._destination.place
        if self._database is None or place is None:
            return None
        rows: list[tuple[str, LayerRecord]] = []
        with _hints():
            rows = self._database.find_layer(place, key)
        for repository, record in rows:
            descriptor = oci.Descriptor(oci.OCI_LAYER, record.digest, record.size)
            if self._destination.has(descriptor):
                return Reused(record, None, "was there")
            if repository == place[1]:
                with _hints():
                    self._database.drop_layer(place, key)
            elif self._destination.share(descriptor, repository):
                self.stored(key, record)
                return Reused(record, None, f"shared by {repository}")
        return None

    def _in_work_directory(self, key: LayerKey) -> Reused | None:
        found = self._finished.take(key.name)
        return None if found is None else Reused(found[1], found[0], "finished before")


def known_manifest(
    destination: ImageDestination,
    database: Database | None,
    source_digest: str,
    options: str,
    needed: Sequence[oci.Descriptor] = (),
) -> oci.Manifest | None:
    """Return the manifest of an earlier conversion of the source, if the destination still has all its blobs.

    It must also have those ``needed`` beside them.
    """
    place = destination.place
    if database is None or place is None:
        return None
    digest = None
    with _hints():
        digest = database.find_manifest(place, source_digest, options)
    if digest is None:
        return None
    data = destination.manifest(digest)
    if data is not None:
        try:
            manifest = oci.Manifest.parse(data, destination.name)
            files = tree_files(manifest)
        except FormatError as error:
            logger.warning("%s: %s is no manifest of ours: %s", destination.name, digest, error)
        else:
            whole = manifest.to_bytes() == data
            blobs = (manifest.config, *manifest.layers, *files, *needed)
            if whole and all(destination.has(blob) for blob in blobs):
                return manifest
    with _hints():
        database.drop_manifest(place, source_digest, options)
    return None


def note_manifest(
    destination: ImageDestination, database: Database | None, source_digest: str, options: str, digest: str
) -> None:
    """Record the source's converted manifest."""
    if database is not None and destination.place is not None:
        with _hints():
            database.add_manifest(destination.place, source_digest, options, digest)


@contextmanager
def _hints() -> Iterator[None]:
    # The database could be opened when the conversion began; a later failure only costs time.
    try:
        yield
    except DatabaseError as error:
        logger.warning("%s", error)
