"""Write a file of synthetic weights: make_weights.py FILE MIB. The same bytes in each build.

The file is laid out as model files are: the length of a header in eight bytes, the header (JSON with each tensor's
place and CRC-32), then the tensors one after another. Values are normally distributed bfloat16, which compress as
little as those of trained models do: their low bytes are random, their high bytes (sign and exponent) are not.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import zlib
from statistics import NormalDist

_TENSOR = 4 << 20
_MOST_TENSORS = 1 << 16
_DEVIATION = 0.02
# The high byte of a bfloat16 for each of 256 equally likely ranges of the distribution.
_HIGH = bytes(struct.pack(">f", NormalDist(0, _DEVIATION).inv_cdf((step + 0.5) / 256))[0] for step in range(256))


def tensor(number: int, size: int) -> bytes:
    """Return the bytes of one tensor; ``size`` is even."""
    rng = random.Random(number)
    values = bytearray(size)
    values[0::2] = rng.randbytes(size // 2)
    values[1::2] = rng.randbytes(size // 2).translate(_HIGH)
    return bytes(values)


def main() -> None:
    path, left = sys.argv[1], int(sys.argv[2]) << 20
    sizes = []
    while left:
        sizes.append(min(left, _TENSOR))
        left -= sizes[-1]
    if not sizes or len(sizes) > _MOST_TENSORS:
        raise SystemExit(f"wanted 1 MiB or more of weights, {_MOST_TENSORS} tensors at most (got {len(sizes)})")
    header, begin = {}, 0
    # The checksums come before the tensors, so each is made twice; none is kept.
    for number, size in enumerate(sizes):
        check = zlib.crc32(tensor(number, size))
        header[f"layer{number}"] = {"dtype": "BF16", "begin": begin, "end": begin + size, "crc32": check}
        begin += size
    encoded = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for number, size in enumerate(sizes):
            file.write(tensor(number, size))


if __name__ == "__main__":
    main()
