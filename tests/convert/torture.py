"""An image with everything that is hard in a tar: written by hand where no library writes it."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import zlib
from typing import TYPE_CHECKING

from tests.convert.images import CAPABILITY
from tests.convert.layouts import CONFIG, LAYER, MANIFEST, Layout, directory, hardlink, member, symlink, tar_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.convert.layouts import Member

END = bytes(1024)
_TEMPLATE = tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT)
_PIECES = [(4096 * 3 * number, bytes([number + 1]) * 512 * (number % 3 + 1)) for number in range(30)]
_SPARSE_SIZE = 4096 * 100
_PIECES.append((_SPARSE_SIZE, b""))  # as GNU tar marks a hole at the end
_POSIX = {257: b"ustar\x0000"}


def raw_header(name: bytes, size: int, kind: bytes = b"0", *, fields: dict[int, bytes] | None = None) -> bytes:
    """One header block as it is told: ``fields`` are put at their offsets, the checksum made right."""
    header = bytearray(_TEMPLATE)
    header[:100] = name.ljust(100, b"\0")
    header[124:136] = b"%011o\0" % size
    header[156:157] = kind
    for offset, value in (fields or {}).items():
        header[offset : offset + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def old_sparse(name: bytes, pieces: list[tuple[int, bytes]], size: int) -> bytes:
    """GNU tar's old sparse format: four pieces in the header, the others in blocks that follow it."""

    def entries(some: list[tuple[int, bytes]]) -> bytes:
        return b"".join(b"%011o\0%011o\0" % (offset, len(data)) for offset, data in some)

    fields = {386: entries(pieces[:4]), 482: bytes([len(pieces) > 4]), 483: b"%011o\0" % size}
    made = raw_header(name, sum(len(data) for _, data in pieces), b"S", fields=fields)
    for at in range(4, len(pieces), 21):
        block = entries(pieces[at : at + 21]).ljust(504, b"\0") + bytes([len(pieces) > at + 21])
        made += block.ljust(512, b"\0")
    return made + padded(b"".join(data for _, data in pieces))


def pax_sparse(version: str, name: str, pieces: list[tuple[int, bytes]], size: int) -> bytes:
    """The sparse formats 0.0, 0.1 and 1.0 of GNU tar's pax archives."""
    numbers = [number for offset, data in pieces for number in (offset, len(data))]
    content = b"".join(data for _, data in pieces)
    records = [("GNU.sparse.size", str(size)), ("GNU.sparse.numblocks", str(len(pieces)))]
    if version == "0.0":
        # One pair of records a piece: more of one name than a dictionary takes.
        for offset, data in pieces:
            records += [("GNU.sparse.offset", str(offset)), ("GNU.sparse.numbytes", str(len(data)))]
    elif version == "0.1":
        records += [("GNU.sparse.map", ",".join(map(str, numbers))), ("GNU.sparse.name", name)]
    else:
        records = [
            ("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", name),
            ("GNU.sparse.realsize", str(size)),
        ]  # fmt: skip
        content = padded("".join(f"{number}\n" for number in (len(pieces), *numbers)).encode()) + content
    body = b"".join(pax_record(key, value) for key, value in records)
    shown = name if version == "0.0" else f"GNUSparseFile.0/{name}"
    return pax_header(body) + raw_header(shown.encode(), len(content), fields=_POSIX) + padded(content)


def pax_record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def pax_header(body: bytes, kind: bytes = b"x") -> bytes:
    # containerd makes the parent of a global header's name.
    name = b"pax_global_header" if kind == b"g" else b"PaxHeaders/x"
    return raw_header(name, len(body), kind, fields=_POSIX) + padded(body)


def gnu_long(kind: bytes, text: bytes) -> bytes:
    return raw_header(b"././@LongLink", len(text) + 1, kind) + padded(text + b"\0")


def base256(number: int, length: int) -> bytes:
    return (number + (1 << (8 * length - 1))).to_bytes(length, "big")


def gnu_only_layer() -> bytes:
    """What GNU tar writes and reads, and containerd does not take."""
    return b"".join(
        (
            raw_header(b"contiguous", 2, b"7"), padded(b"77"),
            old_sparse(b"old", _PIECES, _SPARSE_SIZE),
            old_sparse(b"old-few", [*_PIECES[:2], _PIECES[-1]], _SPARSE_SIZE),
            old_sparse(b"hole-only", [(_SPARSE_SIZE, b"")], _SPARSE_SIZE),
            formats_layer(),
        )
    )  # fmt: skip


def formats_layer() -> bytes:
    """Members in the formats of GNU tar and pax, headers that stand alone among them."""
    pieces, size = _PIECES, _SPARSE_SIZE
    long_name, long_link = b"long/" + b"n" * 200, b"t/" * 200 + b"end"
    return b"".join(
        (
            tar_bytes([directory("long/"), directory("gnu/", mode=0o711), directory("sparse/")])[: 3 * 512],
            gnu_long(b"L", long_name), raw_header(b"cut off", 4), padded(b"long"),
            gnu_long(b"K", long_link), gnu_long(b"L", b"long/" + b"l" * 180), raw_header(b"cut", 0, b"2"),
            raw_header(b"gnu/base256", 3, fields={
                108: base256(1 << 30, 8), 116: base256(70_000, 8), 136: base256(1_700_000_000, 12),
            }), padded(b"256"),
            # Times that GNU tar writes where ustar has the front of a name.
            raw_header(b"gnu/times", 1, fields={345: b"14524770000\x0014524770001\0"}), padded(b"t"),
            raw_header(b"gnu/blanks", 5, fields={124: b"         5 \0", 136: b" 14524770000"}), padded(b"blank"),
            pax_sparse("0.0", "sparse/pax00", pieces, size),
            pax_sparse("0.1", "sparse/pax01", pieces, size),
            pax_sparse("1.0", "sparse/pax10", pieces, size),
            pax_header(
                pax_record("path", "gnu/ü-" + "x" * 200) + pax_record("size", "6") + pax_record("uid", "3000000")
            ),
            raw_header(b"other name", 0), padded(b"by pax"),
            pax_header(pax_record("linkpath", "gnu/times")), raw_header(b"gnu/hard", 0, b"1"),
            END,
        )
    )  # fmt: skip


def small_files(count: int) -> bytes:
    """A layer of so many small files in directories of 500."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"small/{number // 500}/file {number}")
            data = b"%d\n" % number * (number % 40)
            info.size, info.mtime, info.mode = len(data), 1_700_000_000 + number, 0o600 + number % 0o100
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def hostile_names() -> list[Member]:
    return [
        member("n" * 255, b"255 bytes"),
        member("/".join(["d" * 250] * 14) + "/f", b"a path of 3500 bytes"),
        member("bytes\udcff\udc80 \n\t\x01", b"not UTF-8"),
        directory("links/"),
        member("links/one", b"many names", mode=0o4711),
        *(hardlink(f"links/{number}", "links/one", mode=0o4711) for number in range(200)),
        member("links/cap", b"\x7fELF", mode=0o755, xattrs={"security.capability": CAPABILITY, "user.x": b"v" * 900}),
        symlink("links/loop", "loop"),
        member("dev/null", kind=tarfile.CHRTYPE, mode=0o666, rdev=(1, 3)),
        member("dev/large", kind=tarfile.BLKTYPE, mode=0o660, rdev=(300, 70000)),
        member("twice", b"first"),
        directory("twice/"),
        member("twice", b"second"),
        directory("opaque/"),
        *(member(f"opaque/{number}", b"below") for number in range(300)),
        directory("white/"),
        *(member(f"white/{number}/f", b"below") for number in range(50)),
    ]


def changes() -> list[Member]:
    return [
        member("links/new", b"a new file"),
        hardlink("links/new-again", "links/new"),
        member("links/.wh.7"),
        member("links/one", b"parts from its other names", mode=0o600),
        member("opaque/.wh..wh..opq"),
        member("opaque/above", b"1"),
        member(".wh.white"),
        member("small/.wh.1"),
        member("small/0/.wh.file 3"),
        member("sparse/.wh.pax01"),
        member("n" * 255, b"replaced"),
    ]


def torture_tars(small: int) -> list[bytes]:
    """The layers, bottom first, with so many small files."""
    # Global headers, which containerd ignores and GNU tar does not.
    ignored = pax_header(pax_record("comment", "global") + pax_record("mtime", "5"), b"g")
    return [tar_bytes(hostile_names()), ignored + formats_layer(), small_files(small), tar_bytes(changes())]


def large_file_layout(root: Path, size: int) -> str:
    """An image with one file of ``size`` bytes, which fits in memory nowhere on the way. Its content's SHA-256."""
    chunk = b"".join(b"%020d\n" % number for number in range(1 << 16)) + random.Random(size).randbytes(1 << 14)
    content, diff_id, blob = hashlib.sha256(), hashlib.sha256(), bytearray()
    compressor = zlib.compressobj(1, wbits=31)

    def write(data: bytes) -> None:
        diff_id.update(data)
        blob.extend(compressor.compress(data))

    info = tarfile.TarInfo("large")
    info.size = size
    write(info.tobuf(tarfile.PAX_FORMAT))
    left = size
    while left:
        piece = chunk[:left]
        content.update(piece)
        write(piece)
        left -= len(piece)
    write(bytes(-size % 512) + END)
    blob += compressor.flush()
    layout = Layout(root)
    digests = [f"sha256:{diff_id.hexdigest()}"]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": digests}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": layout.add_json(config, CONFIG),
        "layers": [layout.add_blob(bytes(blob), LAYER + "+gzip")],
    }
    layout.write_index([layout.add_json(manifest, MANIFEST)])
    return content.hexdigest()
