"""Labels that lead containerd's garbage collector from an image to its documents, layers and snapshots.

A label may refer to a missing blob, and holds it if it is stored later.
(containerd, docs/garbage-collection.md)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.formats.oci import is_digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from obdlab.formats.oci import Manifest

_CONTENT = "containerd.io/gc.ref.content"
_SNAPSHOT = "containerd.io/gc.ref.snapshot"
_SOURCE = "containerd.io/distribution.source"


def of_config(snapshotter: str, top_chain_id: str) -> dict[str, str]:
    """Return the label of a config whose layers are unpacked in ``snapshotter``."""
    return {f"{_SNAPSHOT}.{snapshotter}": top_chain_id}


def of_manifest(manifest: Manifest) -> dict[str, str]:
    """Return the labels of a manifest: config, layers, and the ordinary layers that turboOCI layers need."""
    labels = {f"{_CONTENT}.config": manifest.config.digest}
    for number, layer in enumerate(manifest.layers):
        labels[f"{_CONTENT}.l.{number}"] = layer.digest
        if layer.turbo_target is not None and is_digest(layer.turbo_target):
            labels[f"{_CONTENT}.t.{number}"] = layer.turbo_target
    return labels


def of_index(manifests: Iterable[str]) -> dict[str, str]:
    """Return the labels of an index, from the digests of its manifests."""
    return {f"{_CONTENT}.m.{number}": digest for number, digest in enumerate(manifests)}


def of_source(host: str, repository: str) -> dict[str, str]:
    """Return the label with the registry that has a blob: a push to that registry need not send it."""
    return {f"{_SOURCE}.{host}": repository}
