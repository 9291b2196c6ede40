"""Recording the first start of each image on this host by itself, if the configuration allows it.

The image's device records from its opening on, into a file beside the image's configuration, as for a label (see
:mod:`obdlab.snapshotter.tracing`). When the time is over the trace is handed on to be published, and later openings
on this host replay it. Nothing here may keep a container from starting.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.image.config import ImageConfig
from obdlab.snapshotter import overlaybd
from obdlab.snapshotter.errors import FailedPreconditionError
from obdlab.snapshotter.tracing import start_trace
from obdlab.system.pauses import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from obdlab.registry.reference import Reference
    from obdlab.snapshotter.snapshots import Snapshots
    from obdlab.snapshotter.store import Snapshot

logger = logging.getLogger(__name__)

# A server looks for the lock once a second.
_WRITTEN_S = 60.0


@dataclass(frozen=True, slots=True)
class RecordedStart:
    """The trace of a start: a file, the image by its reference, and the digests of its layers, bottom first."""

    path: Path
    reference: Reference
    layers: tuple[str, ...]


class StartRecordings:
    """Records first starts for ``seconds`` each; 0 records none. ``publish`` gets each trace, in a thread."""

    def __init__(self, snapshots: Snapshots, seconds: float) -> None:
        self._snapshots = snapshots
        self._seconds = seconds
        self._ended = threading.Event()
        self.publish: Callable[[RecordedStart], None] = lambda _: None

    @contextmanager
    def recording(self, image: Snapshot) -> Iterator[None]:
        """Have the device that is attached within ``with`` record, if this is the image's first start here.

        The caller holds the image's lock.
        """
        start = self._prepared(image) if self._seconds else None
        try:
            yield
        except BaseException:
            if start is not None:
                start.path.unlink(missing_ok=True)  # the next attempt is the first start
            raise
        if start is not None:
            thread = threading.Thread(target=self._finish, args=(start,), name="record-start", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the process has as many threads as it may have
                logger.warning("%s: the trace of its start is not published: %s", start.reference, error)

    def close(self) -> None:
        """Record no longer: traces that are not complete are not published."""
        self._ended.set()

    def _prepared(self, image: Snapshot) -> RecordedStart | None:
        layout = self._snapshots.layout
        path, config_path = start_trace(layout, image), layout.config(image.id)
        try:
            config = ImageConfig.load(config_path)
            reference = overlaybd.registry_reference(image.labels)
            if path.exists() or reference is None or not _is_unrecorded(config, str(path)):
                return None
            with self._snapshots.store.read() as reader:
                busy = reader.has_containers(image.id)
            if busy or layout.unpacked(image.id).exists() or not self._snapshots.images.release(image.id):
                return None
            path.with_name(path.name + ".lock").unlink(missing_ok=True)
            path.touch(mode=0o600)
            replace(config, record_trace_path=str(path)).save(config_path)
        except (ObdlabError, OSError) as error:
            if not isinstance(error, FailedPreconditionError):  # the image is in use
                logger.warning("image %r: its start is not recorded: %s", image.key, error)
            return None
        return RecordedStart(path, reference, tuple(lower.digest for lower in config.lowers))

    def _finish(self, start: RecordedStart) -> None:
        if self._ended.wait(self._seconds):
            return
        try:
            start.path.with_name(start.path.name + ".lock").unlink(missing_ok=True)
            if not wait_until(start.path.with_name(start.path.name + ".ok").exists, _WRITTEN_S, look_s=0.1):
                logger.warning("%s: the trace of its start was not written", start.reference)
            elif start.path.stat().st_size:
                self.publish(start)
        except (ObdlabError, OSError) as error:
            logger.warning("%s: the trace of its start is not published: %s", start.reference, error)


# An image with a trace or a hot layer was recorded elsewhere. Layers on this host's disk have no digest.
def _is_unrecorded(config: ImageConfig, own: str) -> bool:
    if config.record_trace_path not in ("", own) or config.trace.digest or config.acceleration_layer:
        return False
    return all(lower.digest and not lower.hot for lower in config.lowers)
