"""Whether ZFile blocks are packed and unpacked by compiled code (:mod:`obdlab.layers._blocks`) or in Python.

The compiled form is optional: it is built at installation where there is a C compiler, and used on x86-64 for each
algorithm whose library (liblz4, libzstd) is found. Both forms give the same bytes and the same errors.
``OBDLAB_NATIVE=0`` turns it off.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from obdlab.formats.zfile import Algorithm

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Buffer
    from obdlab.formats.zfile.layout import ZFileHeader
    from obdlab.layers._blocks import Unpacker

#: The environment variable; "0" leaves everything to Python.
SWITCH = "OBDLAB_NATIVE"
#: The liblz4 whose compressed bytes are known to be those of the Python form's library; another one's may differ.
LZ4_VERSION = 11000


def unpacker(offsets: memoryview, header: ZFileHeader) -> Unpacker | None:
    """Return the compiled reader of a ZFile with these block boundaries, or None if Python has to read it."""
    if os.environ.get(SWITCH) == "0" or header.use_dict:
        return None
    try:
        from obdlab.layers._blocks import LIBRARIES, Unpacker
    except ImportError:
        return None
    algorithm = Algorithm(header.algorithm)
    # A checkout may be newer than the module built in it.
    if not LIBRARIES[algorithm.label] or not hasattr(Unpacker, "pread"):
        return None
    return Unpacker(offsets, header.block_size, header.original_size, algorithm, header.verify)


def packer(algorithm: Algorithm) -> Callable[[Buffer, int, bool], tuple[bytes, list[int]] | None] | None:
    """Return the compiled function that packs a batch of blocks, or None if Python has to.

    It takes the content, the block size, and whether CRCs follow the blocks; it returns the stored blocks and the
    length of each, or None if the library refuses one. zstd is left to Python, whose library packs batches itself.
    """
    if os.environ.get(SWITCH) == "0" or algorithm is not Algorithm.LZ4:
        return None
    try:
        from obdlab.layers import _blocks
    except ImportError:
        return None
    return _blocks.store if getattr(_blocks, "LZ4_VERSION", 0) == LZ4_VERSION else None


def state() -> str:
    """Return which form is in use, and the reason if it is not the compiled one for every algorithm."""
    if os.environ.get(SWITCH) == "0":
        return f"Python ({SWITCH}=0)"
    try:
        from obdlab.layers._blocks import LIBRARIES
    except ModuleNotFoundError:
        return "Python (not built: no C compiler at installation, or not x86-64)"
    except ImportError as error:
        return f"Python ({error})"
    native = [name for name, found in LIBRARIES.items() if found]
    missing = [f"lib{name}.so.1" for name, found in LIBRARIES.items() if not found]
    if not native:
        return f"Python ({' and '.join(missing)} not found)"
    return f"compiled, for {' and '.join(native)}" + (f" ({missing[0]} not found)" if missing else "")
