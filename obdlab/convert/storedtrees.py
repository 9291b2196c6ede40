"""Hash trees of an image's layers at its destination: stored beside the layers, and named in the manifest.

The file of a tree is a blob that only an annotation names, which registries would delete some day. So an artifact
that refers to the image lists the files as its layers; readers do not need it.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from obdlab.convert.database import DatabaseError
from obdlab.errors import FormatError, SourceError
from obdlab.formats import oci
from obdlab.formats.hashtree import Shape, TreeMaker, TreeReference
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from obdlab.blob import Blob
    from obdlab.convert.database import Database
    from obdlab.convert.endpoints.endpoint import ImageDestination
    from obdlab.formats.hashtree import HashTree

logger = logging.getLogger(__name__)

#: Type of the artifact whose subject is an image and whose layers are the files of the image's hash trees, and of
#: these.
HASH_TREE_ARTIFACT = "application/vnd.obdlab.hash-tree.v1"
_PIECE = 1 << 20


class StoredTrees:
    """Makes and finds the trees of layers at a destination. Thread-safe."""

    def __init__(self, destination: ImageDestination, database: Database | None) -> None:
        self._destination = destination
        self._database = database

    def of_file(self, layer: oci.Descriptor, path: Path) -> str:
        """Store the tree of a layer's blob in a file; return the text for the layer's annotation.

        Raises FormatError if the file is not that blob, SourceError if it cannot be read or stored.
        """
        with LocalFile(path) as blob:
            return self._of_blob(layer, blob)

    def of_stored(self, layer: oci.Descriptor) -> str:
        """Return the annotation's text for a layer that the destination has.

        It is that of the layer's annotation or of the database, if the destination has the tree's file. Otherwise the
        layer is read. Raises as :meth:`of_file` does.
        """
        text = layer.annotations.get(oci.HASH_TREE, "")
        known = text if text and is_stored(self._destination, layer) else self._known(layer)
        if known:
            return known
        with closing(self._destination.open_blob(layer)) as blob:
            return self._of_blob(layer, blob)

    def store(self, layer: oci.Descriptor, tree: HashTree) -> str:
        """Store a layer's tree; return the text for the layer's annotation. Raises SourceError."""
        text = str(tree.reference)
        if tree.file:
            self._destination.put_bytes(
                oci.Descriptor(HASH_TREE_ARTIFACT, tree.reference.file, len(tree.file)), tree.file
            )
        place = self._destination.place
        if self._database is not None and place is not None:
            try:
                self._database.add_tree(place, layer.digest, text)
            except DatabaseError as error:  # a hint
                logger.warning("%s", error)
        return text

    def _of_blob(self, layer: oci.Descriptor, blob: Blob) -> str:
        maker = TreeMaker()
        for start in range(0, blob.size, _PIECE):
            maker.update(blob.read_at(start, min(_PIECE, blob.size - start)))
        return self.store(layer, maker.finish(layer.digest, blob=blob.name))

    def _known(self, layer: oci.Descriptor) -> str:
        place = self._destination.place
        if self._database is None or place is None:
            return ""
        try:
            text = self._database.find_tree(place, layer.digest)
            file = _file_of(layer, text) if text else None
        except (DatabaseError, FormatError) as error:
            logger.warning("%s", error)
            return ""
        return text if text and (file is None or self._destination.has(file)) else ""


def tree_files(manifest: oci.Manifest) -> tuple[oci.Descriptor, ...]:
    """Return the files that the annotations of a manifest's layers name, each once.

    Raises FormatError for a malformed annotation.
    """
    return tuple({file.digest: file for file in _files(manifest)}.values())


def trees_like(destination: ImageDestination, image: oci.Manifest) -> StoredTrees | None:
    """Return the trees for layers that are made from those of ``image``.

    The sums of turboOCI layers count as trees. None if the image has no trees, or if readers would not find them at
    the destination.
    """
    has_trees = any(oci.HASH_TREE in layer.annotations or oci.TAR_SUMS in layer.annotations for layer in image.layers)
    return StoredTrees(destination, None) if has_trees and destination.keeps_trees else None


def with_trees(layers: Iterable[oci.Descriptor], trees: StoredTrees | None) -> tuple[oci.Descriptor, ...]:
    """Return the layers, which the destination has, with annotations for their trees there, or without.

    The small blobs of turboOCI layers get none. Raises as :meth:`StoredTrees.of_stored`.
    """
    made = []
    for layer in layers:
        annotations = {key: value for key, value in layer.annotations.items() if key != oci.HASH_TREE}
        if trees is not None and layer.turbo_target is None:
            annotations[oci.HASH_TREE] = trees.of_stored(layer)
        made.append(replace(layer, annotations=annotations))
    return tuple(made)


def is_stored(destination: ImageDestination, layer: oci.Descriptor) -> bool:
    """Return True if a layer's annotation names a tree whose file the destination has. Copies may lack it."""
    try:
        file = _file_of(layer, layer.annotations.get(oci.HASH_TREE, ""))
    except FormatError:
        return False
    return file is None or destination.has(file)


def _files(manifest: oci.Manifest) -> Iterator[oci.Descriptor]:
    for layer in manifest.layers:
        text = layer.annotations.get(oci.HASH_TREE)
        file = _file_of(layer, text) if text else None
        if file is not None:
            yield file


def _file_of(layer: oci.Descriptor, text: str) -> oci.Descriptor | None:
    tree = TreeReference.parse(text, f"hash tree of layer {layer.digest}")
    size = Shape(layer.size).file_size if layer.size else 0
    return oci.Descriptor(HASH_TREE_ARTIFACT, tree.file, size) if size else None


def hold_trees(destination: ImageDestination, image: oci.Descriptor, manifest: oci.Manifest) -> None:
    """Store the artifact that keeps the trees' files of an image, if there are any.

    A registry that refuses artifacts is logged: the image works without. Raises SourceError if the registry fails.
    """
    files = tree_files(manifest)
    if not files:
        return
    config = oci.Descriptor(oci.EMPTY_TYPE, oci.digest_of(oci.EMPTY), len(oci.EMPTY))
    destination.put_bytes(config, oci.EMPTY)
    artifact = oci.Manifest(
        config=config,
        layers=files,
        artifact_type=HASH_TREE_ARTIFACT,
        subject=oci.Descriptor(image.media_type, image.digest, image.size),
    )
    data = artifact.to_bytes()
    stored = oci.Descriptor(oci.OCI_MANIFEST, oci.digest_of(data), len(data))
    try:
        destination.put_manifest(stored, data, tagged=False)
    except SourceError as error:
        if error.temporary:
            raise
        logger.warning("%s: may lose the hash trees some day, as nothing refers to them: %s", destination.name, error)
