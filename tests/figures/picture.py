"""The README's picture: starts of redis from the rows of ``peers``. The file names the rows it was drawn from."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path

from tests.figures.blocks import Row, of_peers
from tests.figures.page import ROOT

PATH = ROOT / "docs" / "images" / "quick.png"
_KEY = "Source"
_ARMS = ("overlayfs", "obdlab", "obdlab-hot")


def rows() -> list[Row]:
    """Return the starts that the picture shows."""
    return [row for row in of_peers(image="redis", rate_mbit=100.0, rtt_ms=20.0) if row["arm"] in _ARMS]


def digest() -> str:
    """Return the digest of these rows."""
    return hashlib.sha256(json.dumps(rows(), sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str:
    """Return the digest of the rows that a picture names; "" if it names none."""
    data, at = path.read_bytes(), 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
        if kind in (b"tEXt", b"iTXt") and key == _KEY.encode():
            return value.split(b"\0")[-1].decode()
        at += length + 12
    return ""


def draw(path: Path = PATH) -> None:
    """Draw the picture."""
    import matplotlib.pyplot as plt

    from obdlab.lab.show.figures import startup_figure

    figure = startup_figure(rows())
    figure.savefig(path, dpi=100, metadata={_KEY: digest()})
    plt.close(figure)


def is_whole(path: Path) -> bool:
    """Return True if every part of the picture has its checksum."""
    data, at = path.read_bytes(), 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        part, end = data[at + 4 : at + 8 + length], at + 12 + length
        if zlib.crc32(part) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        at = end
    return at == len(data)
