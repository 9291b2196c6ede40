"""Recording a container's reads of its image, or fetching the reads of a trace ahead, by the labels of a snapshot.

The path goes into the image's configuration before its device is attached. The device's server then works as
``obdlab.traces.recording`` describes: it records into an empty file (``<path>.lock`` exists meanwhile, ``<path>.ok``
once the trace is written) and replays any other.

(overlaybd snapshotter, labels ``record-trace`` and ``record-trace-path``.)
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from obdlab.image.config import ImageConfig
from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError
from obdlab.snapshotter.hostpaths import allowed_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from obdlab.snapshotter.layout import Layout
    from obdlab.snapshotter.snapshots import Snapshots
    from obdlab.snapshotter.store import Snapshot

logger = logging.getLogger(__name__)

LABEL_RECORD = "containerd.io/snapshot/overlaybd/record-trace"
LABEL_RECORD_PATH = "containerd.io/snapshot/overlaybd/record-trace-path"


def trace_path(labels: Mapping[str, str], roots: Sequence[Path]) -> str:
    """Return the path of the trace that a container's labels name, or ''.

    Raises InvalidArgumentError if the file is missing or not below one of ``roots``.
    """
    text = labels.get(LABEL_RECORD_PATH, "")
    if labels.get(LABEL_RECORD) != "yes" or not text:
        return ""
    path = allowed_path(text, roots, LABEL_RECORD_PATH, "traceRoots")
    if not path.is_file():
        raise InvalidArgumentError(
            f"label {LABEL_RECORD_PATH}: no such file (got {text!r}, wanted the absolute path of an empty one)"
        )
    return str(path)


def start_trace(layout: Layout, image: Snapshot) -> Path:
    """Return the path of the trace of an image's first start on this host, if that is recorded by itself."""
    return layout.block(image.id) / "start.trace"


def use_trace(snapshots: Snapshots, image: Snapshot, labels: Mapping[str, str]) -> None:
    """Make the image's device, before its first container, record or replay the trace that ``labels`` name.

    Without such labels, the path of an earlier container is cleared, but not that of the image's first start.
    The caller holds the image's lock. Raises
    FailedPreconditionError if the reads of the container could not all be recorded.
    """
    path = trace_path(labels, snapshots.options.trace_roots)
    config_path = snapshots.layout.config(image.id)
    config = ImageConfig.load(config_path)
    own = str(start_trace(snapshots.layout, image))
    if not path and config.record_trace_path == own:
        return
    if config.record_trace_path == path:
        if not path or not _is_empty(path):
            return
    elif config.acceleration_layer:
        logger.warning("image %r: has an acceleration layer, which goes before the trace %s", image.key, path)
        return
    if path and snapshots.layout.unpacked(image.id).exists():
        raise FailedPreconditionError(f"image {image.key!r} has no device here, no reads can be recorded or fetched")
    with snapshots.store.read() as reader:
        busy = reader.has_containers(image.id)
    try:
        idle = not busy and snapshots.images.release(image.id)
    except FailedPreconditionError:
        idle = False
    if idle:
        replace(config, record_trace_path=path).save(config_path)
    elif path and _is_empty(path):
        raise FailedPreconditionError(
            f"image {image.key!r} is in use: a recording into {path} would miss what is cached already "
            "(wanted no other container on it)"
        )
    elif path:
        logger.warning("image %r is in use: the trace %s is not replayed", image.key, path)


def _is_empty(path: str) -> bool:
    try:
        return os.stat(path).st_size == 0
    except OSError:
        return False
