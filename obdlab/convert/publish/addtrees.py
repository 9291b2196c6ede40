"""Hash trees for an image in a registry: the layers stay as they are, and a new manifest names the trees."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.registryimages import RegistryDestination, RegistrySource
from obdlab.convert.progress import Silent
from obdlab.convert.storedtrees import StoredTrees, hold_trees, is_stored
from obdlab.errors import FormatError
from obdlab.formats import oci
from obdlab.formats.hashtree import TreeMaker
from obdlab.image.from_manifest import TRACE_ARTIFACT, check_native

if TYPE_CHECKING:
    from obdlab.convert.progress import Progress
    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Reference

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Protected:
    """The image with trees: the digest of its manifest or index, and how many layers got a tree now."""

    digest: str
    made: int


def add_trees(
    client: RegistryClient, reference: Reference, target: Reference, progress: Progress | None = None
) -> Protected:
    """Give each layer of the overlaybd image ``reference`` a hash tree, and store the manifest as ``target``.

    Both are in one repository. Of an index, all overlaybd images get trees, and an index is stored. Layers are read
    once, and not stored again; layers that have a tree are left out. Traces that refer to the image refer to the new
    manifest, too. Raises FormatError if the image is not an overlaybd one or ``target`` is elsewhere, and as reading
    and storing do.
    """
    if client.repository(reference) != client.repository(target):
        raise FormatError("image cannot get hash trees elsewhere", blob=str(target), wanted=f"{reference.repo}:TAG")
    work = _Protection(client, reference, target, progress or Silent())
    root, document = work.source.root()
    if root is None:
        raise FormatError("image has no manifest", blob=str(reference))
    if isinstance(document, oci.Manifest):
        return Protected(work.protect(root, document, tagged=True).digest, work.made)
    entries = tuple(map(work.protect_entry, document.manifests))
    if not work.images:
        raise _not_overlaybd(reference)
    data = replace(document, manifests=entries).to_bytes()
    stored = oci.Descriptor(document.media_type, oci.digest_of(data), len(data))
    work.destination.put_manifest(stored, data)
    return Protected(stored.digest, work.made)


class _Protection:
    def __init__(self, client: RegistryClient, reference: Reference, target: Reference, progress: Progress) -> None:
        self.source = RegistrySource(reference, client)
        self.destination = RegistryDestination(target, client)
        self.made = 0
        self.images = 0
        self._client = client
        self._reference = reference
        self._repository = client.repository(reference)
        self._trees = StoredTrees(self.destination, None)
        self._progress = progress
        # An image may list a layer several times, and an index's images share layers.
        self._known: dict[str, str] = {}

    def protect_entry(self, entry: oci.Descriptor) -> oci.Descriptor:
        document = oci.parse_manifest(self.source.read(entry), f"{self._reference}@{entry.digest}")
        if not isinstance(document, oci.Manifest) or not document.is_overlaybd:
            return entry
        stored = self.protect(entry, document, tagged=False)
        return replace(entry, digest=stored.digest, size=stored.size)

    def protect(self, descriptor: oci.Descriptor, manifest: oci.Manifest, *, tagged: bool) -> oci.Descriptor:
        if not manifest.is_overlaybd:
            raise _not_overlaybd(self._reference)
        self.images += 1
        layers = tuple(self._with_tree(number, layer) for number, layer in enumerate(manifest.layers))
        protected = replace(manifest, layers=layers)
        data = protected.to_bytes()
        stored = oci.Descriptor(manifest.media_type, oci.digest_of(data), len(data))
        if tagged or stored.digest != descriptor.digest:
            self.destination.put_manifest(stored, data, tagged=tagged)
        hold_trees(self.destination, stored, protected)
        if stored.digest != descriptor.digest:
            self._move_traces(descriptor.digest, stored)
        return stored

    def _with_tree(self, number: int, layer: oci.Descriptor) -> oci.Descriptor:
        check_native(layer, str(self._reference))
        text = layer.annotations.get(oci.HASH_TREE, "")
        if not text or not is_stored(self.destination, layer):
            text = self._known.get(layer.digest) or self._make(number, layer)
        self._known[layer.digest] = text
        return replace(layer, annotations={**layer.annotations, oci.HASH_TREE: text})

    def _make(self, number: int, layer: oci.Descriptor) -> str:
        maker = TreeMaker()
        with ExitStack() as ended:
            task = ended.enter_context(self._progress.task(f"layer {number}: read", layer.size))
            stream = ended.enter_context(self._client.stream_blob(self._repository, layer.digest, layer.size))
            while piece := stream.read(_PIECE):
                maker.update(piece)
                task.advance(len(piece))
        self.made += 1
        return self._trees.store(layer, maker.finish(layer.digest, blob=f"{self._reference} layer {number}"))

    def _move_traces(self, old: str, image: oci.Descriptor) -> None:
        subject = oci.Descriptor(image.media_type, image.digest, image.size)
        for found in self._client.referrers(self._repository, old, TRACE_ARTIFACT):
            reference = self._reference.with_digest(found.digest)
            artifact = oci.Manifest.parse(self._client.get_manifest(reference).data, str(reference))
            data = replace(artifact, subject=subject).to_bytes()
            stored = self._reference.with_digest(oci.digest_of(data))
            self._client.put_manifest(stored, artifact.media_type, data)


def _not_overlaybd(reference: Reference) -> FormatError:
    return FormatError("not an overlaybd image; convert it first", blob=str(reference))
