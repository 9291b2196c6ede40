"""Describing layer files and verifying that they can be read."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.lsmt.index import merge
from obdlab.formats.lsmt.layout import HEADER_SPACE, MAGIC, SECTOR, Flags, Header, is_lsmt
from obdlab.formats.zfile import Algorithm
from obdlab.formats.zfile.layout import is_zfile
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.tarwrap import open_tarwrap, read_window
from obdlab.layers.zfile import ZFileReader
from obdlab.layers.zfile_reader import read_trailer
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Blob

_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class TarFacts:
    """Place of the content in its tar, in bytes."""

    content_offset: int
    content_size: int


@dataclass(frozen=True, slots=True)
class ZFileFacts:
    """A compressed file. Sizes in bytes; ``ratio`` is stored size by original size."""

    algorithm: str
    block_size: int
    blocks: int
    original_size: int
    stored_size: int
    ratio: float
    block_crcs: bool
    header_digest: bool
    header_overwritten: bool
    index_offset: int
    index_crc: str


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """An LSMT file. Sizes in bytes; fields that only a sealed layer has are None for others.

    ``mapped_size`` is stored as data, ``zeroed_size`` is stored as zeros (both hide the layers below).
    """

    kind: str
    virtual_size: int
    uuid: str
    parent_uuid: str
    user_tag: str
    header_flags: int
    trailer_flags: int | None = None
    index_offset: int | None = None
    index_records: int | None = None
    segments: int | None = None
    mapped_size: int | None = None
    zeroed_size: int | None = None


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One file from the outside in: an optional tar, an optional ZFile, an optional LSMT layer."""

    path: str
    size: int
    tar: TarFacts | None
    zfile: ZFileFacts | None
    layer: LayerFacts | None


@dataclass(frozen=True, slots=True)
class StackFacts:
    """Layers seen as one disk. ``visible_sizes`` are the visible bytes of each layer, bottom first."""

    layers: int
    virtual_size: int
    segments: int
    visible_sizes: tuple[int, ...]
    broken_parent_links: tuple[int, ...]


def describe(path: str | os.PathLike[str]) -> FileFacts:
    """Describe a local file. Raises SourceError if it cannot be read, FormatError if its format is unknown."""
    with LocalFile(path) as file:
        window = read_window(file)
        content = open_tarwrap(file)
        zfile = None
        if is_zfile(content.read_at(0, min(512, content.size)), blob=file.name):
            reader = ZFileReader(content)
            zfile = _zfile_facts(reader, content.size)
            content = reader
        layer = _layer_facts(content)
        if zfile is None and layer is None:
            raise FormatError("neither a ZFile nor an LSMT file", blob=file.name, offset=0)
        return FileFacts(
            path=file.name,
            size=file.size,
            tar=None if window is None else TarFacts(*window),
            zfile=zfile,
            layer=layer,
        )


def describe_stack(paths: Sequence[str | os.PathLike[str]]) -> StackFacts:
    """Describe sealed layers, bottom first, as a stack. Raises as opening them does."""
    with ExitStack() as opened:
        layers = [LsmtLayer(opened.enter_context(_content(path))) for path in paths]
    merged = merge([layer.index for layer in layers]).segments()
    held = merged.length_sectors * ~merged.zeroed * SECTOR
    top = len(layers) - 1
    return StackFacts(
        layers=len(layers),
        virtual_size=next((layer.virtual_size for layer in reversed(layers) if layer.virtual_size), 0),
        segments=len(merged),
        visible_sizes=tuple(int(held[merged.tag == top - number].sum()) for number in range(len(layers))),
        broken_parent_links=tuple(
            number for number in range(1, len(layers)) if layers[number].parent_uuid != layers[number - 1].uuid
        ),
    )


def verify(path: str | os.PathLike[str]) -> Iterator[int]:
    """Read a whole file, checking every checksum in it. Yields the bytes read in each step.

    They add up to :func:`content_size`. Raises CorruptBlobError or another FormatError at the first damage.
    """
    with _content(path) as content:
        for offset in range(0, content.size, _STEP):
            length = min(_STEP, content.size - offset)
            content.read_at(offset, length)
            yield length
        if content.size >= HEADER_SPACE and is_lsmt(content.read_at(0, SECTOR)):
            _layer_facts(content)


def content_size(path: str | os.PathLike[str]) -> int:
    """Return the number of bytes that :func:`verify` reads: the decompressed content of a ZFile, else the file."""
    with _content(path) as content:
        return content.size


@contextmanager
def _content(path: str | os.PathLike[str]) -> Iterator[Blob]:
    with LocalFile(path) as file:
        content = open_tarwrap(file)
        if is_zfile(content.read_at(0, min(512, content.size)), blob=file.name):
            reader = ZFileReader(content)
            check_zfile_trailer(reader)
            content = reader
        yield content


def check_zfile_trailer(reader: ZFileReader) -> None:
    """Raise CorruptBlobError unless trailer and header agree.

    Readers need no trailer if the header was rewritten at the end, so opening does not read it.
    """
    content = reader.below
    trailer, header = read_trailer(content), reader.header
    for field in ("index_offset", "index_size", "original_size", "block_size", "algorithm", "verify"):
        if getattr(trailer, field) != getattr(header, field):
            raise CorruptBlobError(
                f"trailer of the ZFile contradicts its header in {field}",
                blob=reader.name,
                offset=content.size - 512,
                got=getattr(trailer, field),
                wanted=getattr(header, field),
            )


def _zfile_facts(reader: ZFileReader, stored_size: int) -> ZFileFacts:
    header = reader.header
    return ZFileFacts(
        algorithm=Algorithm(header.algorithm).label,
        block_size=header.block_size,
        blocks=header.index_size,
        original_size=header.original_size,
        stored_size=stored_size,
        ratio=round(stored_size / header.original_size, 4) if header.original_size else 1.0,
        block_crcs=header.verify,
        header_digest=header.has_digest,
        header_overwritten=header.is_overwritten,
        index_offset=header.index_offset,
        index_crc=f"{header.index_crc:#010x}",
    )


def _layer_facts(content: Blob) -> LayerFacts | None:
    start = content.read_at(0, min(HEADER_SPACE, content.size))
    if not is_lsmt(start):
        return None
    header = Header.from_bytes(start, blob=content.name)
    end = content.read_at(max(0, content.size - HEADER_SPACE), min(HEADER_SPACE, content.size))
    sealed = header.flags & Flags.SEALED or (content.size > HEADER_SPACE and end.startswith(MAGIC))
    facts = LayerFacts(
        kind="index of a writable layer",
        virtual_size=header.virtual_size,
        uuid=header.uuid,
        parent_uuid=header.parent_uuid,
        user_tag=header.user_tag.rstrip(b"\0").decode(errors="replace"),
        header_flags=int(header.flags),
    )
    if not header.flags & Flags.DATA:
        return facts
    if not sealed:
        how = "sparse" if header.flags & Flags.SPARSE else "append-only"
        return replace(facts, kind=f"writable layer, {how}")
    layer = LsmtLayer(content)
    segments = layer.index.segments()
    return replace(
        facts,
        kind="layer sealed in place" if layer.sealed_in_place else "committed layer",
        virtual_size=layer.virtual_size,
        uuid=layer.uuid,
        parent_uuid=layer.parent_uuid,
        user_tag=layer.user_tag.rstrip("\0"),
        trailer_flags=int(layer.trailer.flags),
        index_offset=layer.trailer.index_offset,
        index_records=layer.trailer.index_size,
        segments=len(segments),
        mapped_size=int(segments.length_sectors[~segments.zeroed].sum()) * SECTOR,
        zeroed_size=int(segments.length_sectors[segments.zeroed].sum()) * SECTOR,
    )
