"""Layers that defeat the original, as the programs that write such layers make them, and its reader to see that."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
import struct
import subprocess
import tarfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zstandard

from obdlab.formats.gzipindex import HEADER_SIZE, ONE_MEMBER, IndexHeader, parse_table, parse_window
from obdlab.formats.gzipmember import begin_inside_byte
from tests.convert.layouts import member, tar_bytes
from tests.layers.gzip_samples import one_block

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GZIP, ZSTD = "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.v1.tar+zstd"


def content_tar() -> bytes:
    """A tar of three spans, with text, noise and zeros; all bytes are below 144 (see ``one_block``)."""
    source = random.Random(3)
    noise = bytes(byte % 144 for byte in source.randbytes(900_000))
    text = b"".join(b"line %d of a text\n" % number for number in range(60_000))
    files = [member("noise", noise), member("text", text), member("zeros", bytes(400_000))]
    files.append(member("stargz.index.json", b'{"version": 1, "entries": []}'))
    return tar_bytes(files, tar_format=tarfile.USTAR_FORMAT)


def joined(tar: bytes) -> bytes:
    """Two gzip files behind one another."""
    return gzip.compress(tar[:1_000_000], mtime=0) + gzip.compress(tar[1_000_000:], mtime=0)


def bgzip(tar: bytes) -> bytes:
    """Blocks of 65,280 bytes, each a member with its length in an extra field, and the empty one at the end."""

    def block(data: bytes) -> bytes:
        packer = zlib.compressobj(6, wbits=-15)
        packed = packer.compress(data) + packer.flush()
        extra = b"BC" + struct.pack("<HH", 2, len(packed) + 25)
        head = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + struct.pack("<H", len(extra)) + extra
        return head + packed + struct.pack("<II", zlib.crc32(data), len(data))

    return b"".join(block(tar[at : at + 65_280]) for at in range(0, len(tar), 65_280)) + block(b"")


def estargz(tar: bytes) -> bytes:
    """A member for each header and each 256 KiB of a file, the table of contents last, and an empty one behind it."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as read:
        places = {place for info in read.getmembers() for place in (info.offset, info.offset_data)}
    ends = sorted({*places, *range(min(places), len(tar), 262_144), len(tar)})
    stored = [gzip.compress(tar[begin:end], mtime=0) for begin, end in itertools.pairwise(ends)]
    toc = sum(map(len, stored[:-1]))
    extra = b"SG" + struct.pack("<H", 22) + f"{toc:016x}STARGZ".encode()
    head = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + struct.pack("<H", len(extra)) + extra
    return b"".join(stored) + head + b"\x01\x00\x00\xff\xff" + bytes(8)


def padded(tar: bytes) -> bytes:
    """A gzip file that is filled with zeros up to whole blocks, as tapes want it."""
    stored = gzip.compress(tar, mtime=0)
    return stored + bytes(-len(stored) % 10_240)


def seekable_zstd(tar: bytes) -> bytes:
    """Frames of 256 KiB, and the seek table of zstd's seekable format."""
    step, frames, entries = 256 << 10, [], b""
    for at in range(0, len(tar), step):
        part = tar[at : at + step]
        frames.append(zstandard.ZstdCompressor().compress(part))
        entries += struct.pack("<II", len(frames[-1]), len(part))
    table = entries + struct.pack("<IBI", len(frames), 0, 0x8F92EAB1)
    return b"".join(frames) + struct.pack("<II", 0x184D2A5E, len(table)) + table


def chunked_zstd(tar: bytes) -> bytes:
    """A frame for each header and each file, and table and footer in skippable frames, as zstd:chunked has them."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as read:
        begins = sorted({place for info in read.getmembers() for place in (info.offset, info.offset_data)})
    packer = zstandard.ZstdCompressor()
    frames = [packer.compress(tar[begin:end]) for begin, end in zip(begins, [*begins[1:], len(tar)], strict=True)]
    table = packer.compress(json.dumps({"version": 1, "entries": []}).encode())
    skipped = struct.pack("<II", 0x184D2A50, len(table)) + table
    footer = struct.pack("<QQQQ8s", sum(map(len, frames)) + 8, len(table), 40, 1, b"GNUlInUx")
    return b"".join(frames) + skipped + struct.pack("<II", 0x184D2A50, len(footer)) + footer


def streamed_zstd(tar: bytes) -> bytes:
    """One frame without the size of its content, as builders write it."""
    packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return packer.compress(tar) + packer.flush()


def gnu_sparse(directory: Path, *options: str) -> bytes:
    """What ``tar --sparse`` makes of files with holes."""
    directory.mkdir()
    with (directory / "holes").open("wb") as file:
        for at, data in ((0, b"begin"), (1 << 20, b"middle" * 3000), (3 << 20, b"late")):
            file.seek(at)
            file.write(data)
        file.truncate(4 << 20)
    with (directory / "empty").open("wb") as file:
        file.truncate(1 << 20)
    (directory / "usual").write_bytes(b"usual" * 2000)
    command = ["tar", "--sparse", *options, "--sort=name", "--owner=0", "--group=0", "-C", str(directory), "-c", "."]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


@dataclass(frozen=True)
class Hard:
    """A kind of layer, and the option that allows it ("" if it works without)."""

    name: str
    make: Callable[[bytes], bytes]
    media_type: str
    option: str
    #: The refusal says this beside the way out.
    reason: str = ""

    def __str__(self) -> str:
        return self.name


KINDS = (
    Hard("joined gzip files", joined, GZIP, "--several-members", "gzip file of several members"),
    Hard("eStargz", estargz, GZIP, "--several-members", "gzip file of several members"),
    Hard("bgzip", bgzip, GZIP, "--several-members", "gzip file of several members"),
    Hard("gzip with padding", padded, GZIP, ""),
    Hard("one giant deflate block", one_block, GZIP, ""),
    Hard("one zstd frame", lambda tar: zstandard.ZstdCompressor().compress(tar), ZSTD, "--zstd-layers", "got zstd"),
    Hard("a zstd frame of unknown size", streamed_zstd, ZSTD, "--zstd-layers", "got zstd"),
    Hard("seekable zstd", seekable_zstd, ZSTD, "--zstd-layers", "got zstd"),
    Hard("zstd:chunked", chunked_zstd, ZSTD, "--zstd-layers", "got zstd"),
)


def as_the_original_reads(stored: bytes, index: bytes) -> bytes:
    """The content that the original sees: no member behind the first, and zeros behind the end it knows.

    Raises ValueError for an index that it refuses to open.
    """
    header = IndexHeader.from_bytes(index, index_size=len(index))
    if index[8] != ONE_MEMBER or header.compressed_size != len(stored):
        raise ValueError("the original refuses it")
    rows = parse_table(index[header.index_start :], header)
    assert header.index_start >= HEADER_SIZE
    parts = []
    ends = [*(int(row["content"]) for row in rows[1:]), header.uncompressed_size]
    for row, end in zip(rows, ends, strict=True):
        place, bits = int(row["stored"]), int(row["bits"])
        window = index[int(row["window"]) : int(row["window"]) + int(row["length"])]
        inflater = zlib.decompressobj(wbits=-15, zdict=parse_window(window, header))
        data = begin_inside_byte(stored[place - 1], bits) if bits else b""
        parts.append(inflater.decompress(data + stored[place:], end - int(row["content"])))
    return b"".join(parts)
