"""Opening the argument of a tool: a layer of any kind, or a disk given by layers or a configuration."""

from __future__ import annotations

from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from obdlab.errors import FormatError
from obdlab.formats.lsmt.layout import HEADER_SPACE, MAGIC, STRUCT_SIZE, Flags, Header, is_lsmt
from obdlab.layers.lsmt import open_layer
from obdlab.layers.upper import open_upper
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from obdlab.image.open import Image
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.stack import Stack
    from obdlab.settings.settings import Settings


def open_any_layer(path: str | os.PathLike[str], index_path: str | os.PathLike[str] = "") -> Layer:
    """Open a layer file for reading: sealed (plain, compressed, in a tar) or writable.

    A writable layer in append mode needs its ``index_path``; without it FormatError. Raises as opening either does.
    """
    file = LocalFile(path)
    try:
        header = _writable_header(file)
        if header is None:
            return open_layer(file)
    except BaseException:
        file.close()
        raise
    file.close()
    if not header.flags & Flags.SPARSE and not index_path:
        raise FormatError(
            "a writable layer in append mode is two files, and its index file is missing", blob=file.name
        )
    return open_upper(path, index_path, read_only=True)


@contextmanager
def open_disk(paths: Sequence[str | os.PathLike[str]], settings: Callable[[], Settings]) -> Iterator[Stack]:
    """Open layers, bottom first, or the image of one ``config.v1.json``, as one disk for reading.

    Lowers in a registry are read through the block cache, by the ``settings``, which are asked for only then; a
    writable layer is the top of the disk.
    """
    # Late imports: commands that open one layer, and are run once for each, do without registries and traces.
    from obdlab.image.config import ImageConfig, UpperConfig
    from obdlab.layers.stack import Stack

    with ExitStack() as opened:
        if len(paths) != 1 or not _is_json(paths[0]):
            yield Stack([opened.enter_context(closing(open_any_layer(path))) for path in paths])
            return
        config = ImageConfig.load(paths[0])
        layers: list[Layer] = []
        files = [lower.local_file() for lower in config.lowers]
        whole = not (config.acceleration_layer or any(lower.is_turbo for lower in config.lowers))
        if files and whole and all(files):
            layers += [opened.enter_context(closing(open_any_layer(file))) for file in files if file]
        elif config.lowers or not config.upper.active:
            from obdlab.image.open import open_image

            # Only a device's start writes the result file.
            below = replace(config, upper=UpperConfig(), result_file="")
            lowers = cast("Image", open_image(below, settings(), traces=False))
            layers += lowers.layers
            opened.enter_context(lowers)
        if config.upper.active:
            upper = open_any_layer(config.upper.data, config.upper.index)
            layers.append(opened.enter_context(closing(upper)))
        yield Stack(layers)


def _writable_header(file: LocalFile) -> Header | None:
    start = file.read_at(0, min(STRUCT_SIZE, file.size))
    if not is_lsmt(start):
        return None
    header = Header.from_bytes(start, blob=file.name)
    if header.flags & Flags.SEALED or not header.flags & Flags.DATA:
        return None
    end = file.read_at(max(0, file.size - HEADER_SPACE), min(len(MAGIC), file.size))
    return None if file.size > HEADER_SPACE and end == MAGIC else header


def _is_json(path: str | os.PathLike[str]) -> bool:
    with LocalFile(path) as file:
        return file.read_at(0, min(64, file.size)).lstrip().startswith(b"{")
