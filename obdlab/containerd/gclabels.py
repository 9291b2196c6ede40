"""Labels that lead containerd's garbage collector from an image to its documents, layers and snapshots.

A label may refer to a missing blob, and holds it if it is stored later.
(containerd, docs/garbage-collection.md)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_CONTENT = "containerd.io/gc.ref.content"
_SNAPSHOT = "containerd.io/gc.ref.snapshot"
_SOURCE = "containerd.io/distribution.source"


def of_config(snapshotter: str, top_chain_id: str) -> dict[str, str]:
    """Return the label of a config whose layers are unpacked in ``snapshotter``."""
    return {f"{_SNAPSHOT}.{snapshotter}": top_chain_id}


def of_manifest(config: str, layers: Iterable[str]) -> dict[str, str]:
    """Return the labels of a manifest, from the digests of its config and its layers, bottom first."""
    labels = {f"{_CONTENT}.config": config}
    return labels | {f"{_CONTENT}.l.{number}": digest for number, digest in enumerate(layers)}


def of_index(manifests: Iterable[str]) -> dict[str, str]:
    """Return the labels of an index, from the digests of its manifests."""
    return {f"{_CONTENT}.m.{number}": digest for number, digest in enumerate(manifests)}


def of_source(host: str, repository: str) -> dict[str, str]:
    """Return the label with the registry that has a blob: a push to that registry need not send it."""
    return {f"{_SOURCE}.{host}": repository}
