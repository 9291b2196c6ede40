"""The only place that stacks blobs: source, tar window, ZFile, LSMT layer, stack of layers, writable upper."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, overload

from obdlab.blob import WritableBlob, find, unwrapped
from obdlab.cache.cachedblob import CachedBlob
from obdlab.call import Call
from obdlab.errors import ObdlabError
from obdlab.formats.lsmt.index import MAX_LAYERS
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.identity import is_fetched, topmost, with_target
from obdlab.image.metadata import stream_metadata
from obdlab.image.target import open_target
from obdlab.image.view import Disk
from obdlab.layers import zfile
from obdlab.layers.budget import Budget
from obdlab.layers.ends import fetch_ends, fetch_rest_of_end, places
from obdlab.layers.lsmt import LsmtLayer, RepeatedLayer, open_layer
from obdlab.layers.seal import SwitchMark
from obdlab.layers.spancache import SpanCache
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.tarwrap import open_tarwrap
from obdlab.layers.upper import open_upper
from obdlab.layers.warp import WarpLayer
from obdlab.localfile import LocalFile
from obdlab.settings.original import at_launch
from obdlab.settings.settings import VERIFY_OFF, Settings
from obdlab.traces.hotlayer import is_hot, stream_if_begins_hot, stream_if_hot, stream_whole
from obdlab.traces.recording import Recording, RecordingError, wants_recording
from obdlab.traces.replay import TRACES_IGNORED, load_blob, load_file, load_layer, start_replay, trace_beside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Executor

    from obdlab.blob import Around, Blob
    from obdlab.cache.ahead.stream import StreamAhead
    from obdlab.image.remote import RemoteLayers
    from obdlab.layers.lsmt import Kind, Layer
    from obdlab.layers.recorder import Recorder
    from obdlab.layers.writable import Upper

    Configuration = ImageConfig | str | os.PathLike[str]

logger = logging.getLogger(__name__)

_SPILL = "/var/tmp"
#: Opening remote layers mostly waits for round trips, so this many are opened at once.
OPEN_THREADS = 32


class ImageOpenError(ObdlabError, code="image"):
    """An image cannot be opened; names the layer and the cause."""


def open_zfile(path: str | os.PathLike[str]) -> Blob:
    """Open a local ZFile, bare or tar-wrapped, as its uncompressed content.

    Raises SourceError if the file cannot be read, FormatError if it is not a ZFile or damaged.
    """
    file = LocalFile(path)
    try:
        return zfile.open_zfile(open_tarwrap(file))
    except BaseException:
        file.close()
        raise


def open_stack(paths: Sequence[str | os.PathLike[str]]) -> Disk:
    """Open local layers, bottom first, as one block device.

    Each of the 1 to 255 may be a plain LSMT file, a ZFile or tar-wrapped. Raises SourceError or FormatError naming
    the layer.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"open_stack wants a sequence of paths, bottom first (got one: {os.fspath(paths)!r})")
    with ExitStack() as opened:
        budget = Budget()
        layers = [opened.enter_context(_open_local(path, budget)[0]) for path in paths]
        disk = Disk(layers)
        opened.pop_all()
        return disk


def open_warp(
    meta: str | os.PathLike[str], target: str | os.PathLike[str], gzip_index: str | os.PathLike[str] | None = None
) -> Disk:
    """Open the local files of a turboOCI layer as one block device.

    ``meta`` has the metadata of the file system (``ext4.fs.meta``, ``erofs.fs.meta``), ``target`` is the ordinary
    layer that holds the contents of its files, and ``gzip_index`` must be given if that is compressed. The layer of
    an image with several is only a file system together with the layers below it: see :func:`open_image`.

    Raises SourceError if a file cannot be read, FormatError if one is damaged or they do not belong together.
    """
    names = (os.fspath(name) for name in (target, gzip_index or ""))
    lower = LowerConfig(os.fspath(meta), target_file=next(names), gzip_index=next(names))
    with ExitStack() as opened:
        tar = opened.enter_context(open_target(lower, None, unwrapped, SpanCache())[0])
        layer, _ = _open_local(lower.file, Budget(), kind=partial(WarpLayer, tar))
        opened.pop_all()
        return Disk([layer])


class Image(Disk):
    """A read-only image with counters of its block cache."""

    def __init__(self, layers: Sequence[Layer], count: Callable[[], dict[str, int]]) -> None:
        super().__init__(layers)
        self._count = count
        #: Called by close(), last one first, before the layers are closed.
        self.before_close: list[Callable[[], None]] = []
        #: The identity of each layer, bottom first: its digest, or its very file on this machine.
        self.identity: tuple[str, ...] = ()
        #: The cache's name for the registry of the layers that are not local files; '' if all are.
        self.origin = ""
        #: The number of layers that are not on this machine whole and checked (if they have a digest).
        self.unverified: Callable[[], int] = int
        #: True if its device shall graduate when all layers are local and checked.
        self.graduates = False
        #: Not before so much time has passed since it was opened.
        self.graduates_after_s = 0.0
        #: Begins to complete a lazily read image, as the settings say; for the server of its device.
        self.complete: Callable[[], None] = lambda: None

    def statistics(self) -> dict[str, int]:
        """Return the block cache's counters since the image was opened; empty if the image is local."""
        return self._count()

    def close(self) -> None:
        while self.before_close:
            self.before_close.pop()()
        super().close()


class WritableImage(WritableStack):
    """A writable image with counters of its block cache."""

    def __init__(self, lowers: Stack | None, upper: Upper, count: Callable[[], dict[str, int]]) -> None:
        super().__init__(lowers, upper)
        self._count = count
        #: As in :class:`Image`.
        self.before_close: list[Callable[[], None]] = []
        self.complete: Callable[[], None] = lambda: None

    def statistics(self) -> dict[str, int]:
        """As in :class:`Image`."""
        return self._count()

    def close(self) -> None:
        while self.before_close:
            self.before_close.pop()()
        super().close()


@overload
def open_image(
    config: Configuration, settings: Settings | None = None, *, traces: bool = True
) -> Image | WritableImage: ...


@overload
def open_image(
    config: Configuration, settings: Settings | None = None, *, traces: bool = True, around: Around | None
) -> Blob: ...


def open_image(
    config: Configuration, settings: Settings | None = None, *, traces: bool = True, around: Around | None = None
) -> Blob:
    """Open the image that ``config``, or the file ``config.v1.json`` at that path, describes.

    Closing the result closes all of it. Lowers that are not on this machine are read from their registry through the
    block cache. With an active upper the result is writable. Raises ImageOpenError naming the layer that could not be
    opened; nothing stays open then. The configuration's result file, if it names one, gets "success" or
    "failed:<reason>".

    With ``traces``, a trace is recorded or replayed according to configuration and settings. ``around(joint, blob)``
    is called for each place of the image where a wrapper can stand (:data:`obdlab.blob.Joint`), by several threads,
    and returns the blob to use there: ``blob``, or an :class:`obdlab.blob.Wrapper` of it.
    """
    if not isinstance(config, ImageConfig):
        config = ImageConfig.load(config)
    try:
        image = _open(config, at_launch(settings or Settings(), config.download), around or unwrapped, traces=traces)
    except BaseException as error:
        config.report(f"failed:{error}")
        raise
    config.report("success")
    return image


def _open(config: ImageConfig, settings: Settings, around: Around, *, traces: bool) -> Blob:
    lowers = stacked_lowers(config)
    with ExitStack() as opened:
        recording = _begin_recording(config, opened) if traces else None
        if recording is not None:
            settings = replace(settings, download_enabled=False, completion=False, readahead_max=0)
        recorder = recording.recorder if recording is not None else None
        layers, identity, remote = _open_lowers(lowers, config.repo_blob_url, settings, opened, around, recorder)
        count = remote.statistics if remote is not None else dict
        stack = Image(layers, count) if layers else None
        if stack is not None:
            stack.identity = identity
            stack.origin = remote.origin if remote is not None else ""
            stack.unverified = remote.unverified if remote is not None else int
            completes = settings.completion and remote is not None
            stack.graduates = (settings.graduation or completes) and settings.unpacked_disks
            if not settings.graduation:
                stack.graduates_after_s = settings.download_delay_s + settings.download_delay_extra_s
        image: Image | WritableImage
        if config.upper.active:
            upper = opened.enter_context(open_upper(config.upper.data, config.upper.index))
            image = WritableImage(stack, upper, count)
            _forget_switch(lowers)
        elif stack is not None:
            image = stack
        else:
            raise ImageOpenError("image has neither lowers nor an upper (is it a config.v1.json?)")
        if remote is not None:
            image.complete = remote.complete
        blob = around("stack", image)
        if isinstance(image, WritableBlob) and not isinstance(blob, WritableBlob):
            raise TypeError(f"around a writable image: wanted a WritableBlob (got {type(blob).__name__})")
        if traces and stack is not None and not _use_traces(config, settings, stack, remote, recording, image):
            image.before_close += [stream.stop for stream in stream_metadata(stack.layers)]
        opened.pop_all()
        return blob


def _begin_recording(config: ImageConfig, opened: ExitStack) -> Recording | None:
    path = config.record_trace_path
    if path and config.acceleration_layer:
        raise ImageOpenError(f"an image with an acceleration layer cannot be recorded (recordTracePath is {path})")
    if not wants_recording(path):
        return None
    try:
        recording = Recording(path)
    except RecordingError as error:
        logger.warning("%s", error)
        return None
    opened.callback(recording.abandon)
    return recording


def _use_traces(
    config: ImageConfig,
    settings: Settings,
    stack: Stack,
    remote: RemoteLayers | None,
    recording: Recording | None,
    image: Image | WritableImage,
) -> bool:
    # Returns True if reads are recorded, or those of a recorded start are fetched ahead.
    if recording is not None:
        stack.watch(recording.recorder.around)
        recording.watch_lock(partial(stack.watch, None))
        image.before_close.append(recording.finish)
        return True
    if remote is None:
        return False  # there is nothing to fetch
    if is_hot(stack.layers[-1]) and not settings.trace_path:
        return True  # a trace would fetch the same
    try:
        found = _trace_of(config, settings, remote, image)
    except ObdlabError as error:  # an image works without a trace
        TRACES_IGNORED.add()
        logger.warning("trace not replayed: %s", error)
        return False
    if found is None:
        return False
    name, load = found
    prefetch = start_replay(name, load, stack)
    if prefetch is not None:
        image.before_close.append(prefetch.stop)
    return prefetch is not None


# Returns name and loader of the trace to replay.
def _trace_of(
    config: ImageConfig, settings: Settings, remote: RemoteLayers, image: Image | WritableImage
) -> tuple[str, Callable[[], bytes]] | None:
    path = str(settings.trace_path or "") or config.record_trace_path
    if path:
        if os.path.exists(path):
            return path, partial(load_file, path)
        if settings.trace_path:
            TRACES_IGNORED.add()
        logger.log(logging.WARNING if settings.trace_path else logging.INFO, "%s: no such trace", path)
        return None
    if config.trace.digest and config.trace.size:
        blob = remote.open(config.trace.digest, config.trace.size)
        image.before_close.append(blob.close)
        return blob.name, partial(load_blob, blob, config.trace.digest)
    if not config.acceleration_layer or not config.lowers:
        return None
    lower = config.lowers[-1]
    beside = trace_beside(lower.dir)
    if beside is not None:
        return beside, partial(load_file, beside)
    file = lower.local_file()
    if file is not None:
        return file, lambda: load_layer(LocalFile(file))
    if not lower.digest or not lower.size:
        return None
    blob = remote.open(lower.digest, lower.size)
    image.before_close.append(blob.close)
    return blob.name, partial(load_layer, blob, lower.digest)


# A crash after a snapshot's configuration was replaced leaves the mark that makes opening undo the seal.
def _forget_switch(lowers: Sequence[LowerConfig]) -> None:
    file = lowers[-1].local_file() if lowers else None
    if file is None:
        return
    try:
        SwitchMark(file).remove()
    except ObdlabError as error:  # e.g. on a read-only directory: the mark does no harm to a stack
        logger.warning("%s", error)


def stacked_lowers(config: ImageConfig) -> Sequence[LowerConfig]:
    """Return the lowers of the disk, bottom first. Raises ImageOpenError if there are too many."""
    lowers = config.lowers
    if config.acceleration_layer and lowers:
        lowers = lowers[:-1]  # holds a trace, no file system
    if len(lowers) > MAX_LAYERS:
        raise ImageOpenError(f"image has too many lowers (got {len(lowers)}, wanted at most {MAX_LAYERS})")
    return lowers


def _open_lowers(
    lowers: Sequence[LowerConfig],
    repo_blob_url: str,
    settings: Settings,
    opened: ExitStack,
    around: Around,
    recorder: Recorder | None,
) -> tuple[list[LsmtLayer], tuple[str, ...], RemoteLayers | None]:
    # Each layer is entered into `opened` at once: they are opened in parallel, so one may fail after others.
    files = [lower.local_file() for lower in lowers]
    identity = [lower.digest for lower in lowers]
    call = Call(time.monotonic() + settings.open_deadline_s)

    begun: dict[int, tuple[Blob, StreamAhead | None]] = {}
    # Long zstd frames are decoded into the cache's file system, or into that of the usual temporary files.
    # Path.is_dir raises where a directory above may not be entered.
    usable = os.path.isdir(settings.cache_dir) and os.access(settings.cache_dir, os.W_OK)
    budget, spans = Budget(), SpanCache(directory=str(settings.cache_dir) if usable else _SPILL)
    tops = topmost(lowers, files)
    wanted = sorted(set(tops))

    def every(distinct: Iterable[LsmtLayer]) -> list[LsmtLayer]:
        layers = dict(zip(wanted, distinct, strict=True))
        for number, top in enumerate(tops):
            identity[number] = identity[top]
        return [layers[top] if top == number else RepeatedLayer(layers[top]) for number, top in enumerate(tops)]

    def open_one(number: int, remote: RemoteLayers | None = None, ends: Executor | None = None) -> LsmtLayer:
        lower, file = lowers[number], files[number]
        watched = partial(recorder.watched, number) if recorder is not None else None
        stream = None
        try:
            with ExitStack() as unused:
                kind: Kind = LsmtLayer
                if lower.is_turbo:
                    target, of_target = open_target(
                        lower, remote, around, spans, verify=settings.verify != VERIFY_OFF
                    )
                    unused.enter_context(target)
                    kind = partial(WarpLayer, target)
                if file:
                    layer, identity[number] = _open_local(file, budget, watched, around, kind)
                else:
                    layer, stream = _open_remote(
                        lower, remote, ends, watched, begun.get(number), budget, around, kind
                    )
                unused.pop_all()
                if lower.is_turbo:
                    identity[number] = with_target(identity[number], of_target, lower)
        except ObdlabError as error:
            what = file or lower.digest or lower.file or lower.dir or "unnamed"
            raise ImageOpenError(f"cannot open lower {number} of {len(lowers)} ({what}): {error}") from error
        if stream is not None:
            opened.callback(stream.stop)
        return opened.enter_context(layer)

    if not any(map(is_fetched, lowers, files)):
        return every([open_one(number) for number in wanted]), tuple(identity[top] for top in tops), None
    from obdlab.image.remote import RemoteLayers  # HTTP and TLS: a third of all imports, not needed for local images

    with (
        closing(RemoteLayers(repo_blob_url, settings, around, call)) as remote,
        ThreadPoolExecutor(min(OPEN_THREADS, len(wanted)), "open-lower") as threads,
        ThreadPoolExecutor(min(OPEN_THREADS, len(wanted)), "open-end") as ends,
    ):
        begun = _begin_hot(lowers, files, remote, wanted) if recorder is None else {}
        here = _to_open_here(lowers, files, remote, wanted, begun)
        opening = {number: threads.submit(open_one, number, remote, ends) for number in wanted if number not in here}
        opening |= {number: _done_here(open_one, number, remote) for number in here}
        layers = every([opening[number].result() for number in wanted])
        remote.opened()
        return layers, tuple(identity[top] for top in tops), remote


# A start waits for the hot layer, so its request goes first, before others use the processor and the link. Errors are
# ignored: the layer is opened again later, which reports them.
def _begin_hot(
    lowers: Sequence[LowerConfig], files: Sequence[str | None], remote: RemoteLayers, wanted: Sequence[int]
) -> dict[int, tuple[Blob, StreamAhead | None]]:
    begun = {}
    for number, lower in ((number, lowers[number]) for number in wanted):
        if lower.hot and lower.digest and not files[number]:
            with suppress(ObdlabError):
                blob = remote.open_layer(lower)
                begun[number] = (blob, stream_whole(blob))
    return begun


# Threads cost more than opening a layer that is there: as a file, or its ends in the cache since the pull. Adds the
# blobs of the latter to ``begun``.
def _to_open_here(
    lowers: Sequence[LowerConfig],
    files: Sequence[str | None],
    remote: RemoteLayers,
    wanted: Sequence[int],
    begun: dict[int, tuple[Blob, StreamAhead | None]],
) -> list[int]:
    found = []
    for number in wanted:
        lower = lowers[number]
        if lower.is_turbo:
            continue
        if files[number]:
            found.append(number)
        elif lower.digest and lower.size:
            with suppress(ObdlabError):  # as above
                begun[number] = begun.get(number) or (remote.open_layer(lower), None)
                if _has_ends(begun[number][0], remote.cache_unit):
                    found.append(number)
    return found


def _has_ends(blob: Blob, unit: int) -> bool:
    cached = find(blob, CachedBlob)
    beginning, end = places(blob, unit)
    return (
        cached is not None
        and cached.size == blob.size
        and cached.has(0, beginning)
        and (end == blob.size or cached.has(end, blob.size))
    )


def _done_here(open_one: Callable[..., LsmtLayer], *arguments: object) -> Future[LsmtLayer]:
    done: Future[LsmtLayer] = Future()
    try:
        done.set_result(open_one(*arguments))
    except Exception as error:
        done.set_exception(error)
    return done


# Returns the layer, and an identity that no other file has, not even a later one in its place.
def _open_local(
    path: str | os.PathLike[str],
    budget: Budget,
    watched: Callable[[Blob], Blob] | None = None,
    around: Around = unwrapped,
    kind: Kind = LsmtLayer,
) -> tuple[LsmtLayer, str]:
    file = LocalFile(path)
    try:
        return open_layer(around("origin", file), watched, budget, around, kind), file.identity()
    except BaseException:
        file.close()
        raise


def _open_remote(
    lower: LowerConfig,
    remote: RemoteLayers | None,
    ends: Executor | None,
    watched: Callable[[Blob], Blob] | None,
    begun: tuple[Blob, StreamAhead | None] | None,
    budget: Budget,
    around: Around,
    kind: Kind,
) -> tuple[LsmtLayer, StreamAhead | None]:
    # Also returns the stream that fetches all of a hot layer ahead, unless reads are being recorded.
    if remote is None or not lower.digest:
        places = ", ".join(filter(None, (lower.file, lower.dir))) or "no file or dir"
        raise ImageOpenError(f"no layer there ({places}), and no digest to fetch it by")
    blob, stream = begun or (remote.open_layer(lower), None)
    try:
        beginning, end = fetch_ends(blob, remote.cache_unit, ends)
        if watched is None and stream is None:
            stream = stream_if_begins_hot(blob, beginning)
        if end is not None:
            fetch_rest_of_end(blob)
        layer = open_layer(blob, watched, budget, around, kind)
        if end is not None:
            end.result()  # fails if the blob is too short, even in a part that opening did not use
        return layer, stream or (stream_if_hot(layer) if watched is None else None)
    except BaseException:
        if stream is not None:
            stream.stop()
        blob.close()
        raise
