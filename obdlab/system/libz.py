"""zlib's inflate, which can stop at the end of each deflate block: Python's ``zlib`` has no Z_BLOCK.

Of ``zlib.h``. The library is on every Linux system: dpkg, rpm and systemd need it. Calls let go of the interpreter
lock.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

from obdlab.errors import CorruptBlobError, SourceError

if TYPE_CHECKING:
    from typing import Self

_NAME = "libz.so.1"
_Z_BLOCK = 5
_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR = 0, 1, -5
_GZIP = 31  # 15 bits of window, and a gzip header and trailer
_VERSION = b"1.2.3"  # the library compares the first digit alone
_UNUSED_BITS, _LAST_BLOCK, _END_OF_BLOCK = 7, 64, 128


class _Stream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_NAME)
    except OSError as error:
        raise SourceError(f"zlib cannot be loaded ({error}); install zlib1g", blob=_NAME) from error
    stream = ctypes.POINTER(_Stream)
    library.inflateInit2_.argtypes = [stream, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.inflate.argtypes = [stream, ctypes.c_int]
    library.inflateReset.argtypes = library.inflateEnd.argtypes = [stream]
    return library


class BlockInflater:
    """Inflates gzip members into a buffer of its own, stopping at the end of each deflate block and of each header.

    ``output`` is filled from :attr:`filled` on; its user moves that back to make room. Not thread-safe.
    Raises SourceError if the system has no zlib.
    """

    def __init__(self, output: bytearray) -> None:
        self._library = _library()
        self._output = (ctypes.c_char * len(output)).from_buffer(output)
        self._output_at = ctypes.addressof(self._output)
        self._size = len(output)
        #: Where the next content goes.
        self.filled = 0
        self._stream = _Stream()
        result = self._library.inflateInit2_(ctypes.byref(self._stream), _GZIP, _VERSION, ctypes.sizeof(_Stream))
        if result != _Z_OK:
            raise SourceError(f"zlib cannot begin to inflate (result {result})", blob=_NAME)
        self._input = ctypes.create_string_buffer(0)

    def feed(self, data: bytes) -> None:
        """Give the next compressed bytes, once those before are used up."""
        self._input = ctypes.create_string_buffer(data, len(data))
        self._stream.next_in = ctypes.addressof(self._input)
        self._stream.avail_in = len(data)

    @property
    def unused(self) -> int:
        """Number of the bytes given that have not been used."""
        return int(self._stream.avail_in)

    def rest(self) -> bytes:
        """Return the bytes given that have not been used."""
        return self._input.raw[len(self._input) - self._stream.avail_in :]

    def step(self) -> bool:
        """Inflate up to the end of a block or header, of the input or of the output's room. True: a member has ended.

        Raises CorruptBlobError, without a name, if the data does not inflate or does not match its checksum.
        """
        stream = self._stream
        stream.next_out = self._output_at + self.filled
        stream.avail_out = self._size - self.filled
        result = self._library.inflate(ctypes.byref(stream), _Z_BLOCK)
        self.filled = self._size - stream.avail_out
        if result not in (_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR):
            reason = (stream.msg or b"").decode(errors="replace") or f"result {result}"
            raise CorruptBlobError(f"gzip data does not inflate ({reason})")
        return bool(result == _Z_STREAM_END)

    def border(self) -> int | None:
        """Return the number of bits of the last byte used that belong to the next block.

        None unless the last step ended at a header's end, or at the end of a block that is not the member's last.
        """
        kind = self._stream.data_type
        return kind & _UNUSED_BITS if kind & _END_OF_BLOCK and not kind & _LAST_BLOCK else None

    def next_member(self) -> None:
        """Begin with the header of the next member."""
        self._library.inflateReset(ctypes.byref(self._stream))

    def close(self) -> None:
        """Free the memory. Closing twice is allowed."""
        self._library.inflateEnd(ctypes.byref(self._stream))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
