"""Gzip files of many kinds, with their content."""

from __future__ import annotations

import io
import random
import zlib

from isal import isal_zlib

from obdlab.blob import MemoryBlob
from obdlab.formats.gzipindex import SPAN
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.gzipwriter import GzipIndexWriter
from obdlab.layers.spancache import SpanCache


def content(size: int, seed: int = 1) -> bytes:
    """Bytes like those of a layer: noise, text, runs of one byte, and repetitions from far before."""
    source = random.Random(seed)
    data = bytearray()
    words = [source.randbytes(source.randrange(2, 9)) for _ in range(300)]
    while len(data) < size:
        length = source.randrange(1, 60_000)
        match source.randrange(5):
            case 0:
                data += source.randbytes(length)
            case 1:
                data += b" ".join(source.choices(words, k=length // 6))
            case 2:
                data += bytes([source.randrange(256)]) * length
            case 3 if len(data) > 40_000:
                begin = len(data) - source.randrange(20_000, 32_768)
                data += data[begin : begin + length]
            case _:
                data += source.choice(words) * (length // 9)
    return bytes(data[:size])


def member(data: bytes, *, level: int = 6, strategy: int = 0, flush: int = 0, library: str = "zlib") -> bytes:
    """A gzip member; with ``flush``, the compressor is flushed about every so many bytes."""
    if library == "isal":
        packer = isal_zlib.compressobj(min(level, 3), wbits=31)
    else:
        packer = zlib.compressobj(level, wbits=31, strategy=strategy)
    out = []
    step = flush or len(data) or 1
    for at in range(0, len(data), step):
        out.append(packer.compress(data[at : at + step]))
        if flush:
            out.append(packer.flush(zlib.Z_FULL_FLUSH if at // step % 3 == 2 else zlib.Z_SYNC_FLUSH))
    out.append(packer.flush())
    return b"".join(out)


def one_block(data: bytes) -> bytes:
    """A member of one deflate block, of the fixed codes and literals alone. For bytes below 144."""
    codes = data.translate(bytes(int(f"{(0x30 + byte) & 0xFF:08b}"[::-1], 2) for byte in range(256)))
    block = int.from_bytes(codes, "little") << 3 | 0b011  # the last block, of type 1; code 256 is seven zeros
    stored = block.to_bytes((3 + 8 * len(data) + 7 + 7) // 8, "little")
    trailer = zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return b"\x1f\x8b\x08" + bytes(7) + stored + trailer


def index_of(gz: bytes, *, span: int = SPAN, several: bool = False) -> tuple[bytes, bytes]:
    """The index of a gzip file, and the content that was found while it was made."""
    sink = io.BytesIO()
    writer = GzipIndexWriter(sink, blob="layer.tar.gz", span=span, several=several)
    found = b"".join(writer.decompressed(io.BytesIO(gz)))
    return sink.getvalue(), found


def target_of(gz: bytes, index: bytes, spans: SpanCache | None = None) -> GzipTarget:
    """The target of a gzip file and its index, both in memory."""
    return GzipTarget(MemoryBlob(gz, "layer.tar.gz"), MemoryBlob(index, "gzip.meta"), spans=spans)
