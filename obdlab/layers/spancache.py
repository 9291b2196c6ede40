"""Decoded pieces of the targets of one image, in memory, up to a limit."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from obdlab.call import UNBOUND
from obdlab.errors import ObdlabError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.call import Call

    #: The owner of a piece, and its number there; parts of one have numbers of their own behind that.
    Key = tuple[int, ...]

#: Bytes for all targets of an image: two spans of sixteen readers.
LIMIT = 32 << 20
# Longest wait for another thread that decodes the same piece: it takes milliseconds, or as long as a registry.
_LONGEST_WAIT_S = 60.0


class SpanCache:
    """The least recently used pieces are dropped. One piece is decoded by one thread; others wait for it.

    Each blob is an owner of its pieces (:meth:`new_owner`). Thread-safe. A piece larger than ``limit`` is not kept.
    ``directory`` is for decoded content that is too long for memory; "" is the usual one for temporary files.
    """

    def __init__(self, limit: int = LIMIT, directory: str = "") -> None:
        self._limit = limit
        self.directory = directory
        self._lock = threading.Lock()
        self._pieces: OrderedDict[Key, bytes] = OrderedDict()
        self._size = 0
        self._decoding: dict[Key, _Decoding] = {}
        self._owners = itertools.count()

    def new_owner(self) -> int:
        """Return a number for the keys of a blob's pieces."""
        return next(self._owners)

    def get(self, key: Key, decode: Callable[[], bytes], call: Call | None = None) -> bytes:
        """Return the piece ``key``, by ``decode`` if it is not here.

        Raises what ``decode`` raises, in the waiting threads as well; SourceError if another thread takes too long.
        """
        with self._lock:
            piece = self._pieces.get(key)
            if piece is not None:
                self._pieces.move_to_end(key)
                return piece
            decoding = self._decoding.get(key)
            mine = decoding is None
            if decoding is None:
                decoding = self._decoding[key] = _Decoding()
        terms = call or UNBOUND
        terms.about_to_wait()
        if not mine:
            return decoding.result(terms.left_s(_LONGEST_WAIT_S))
        try:
            piece = decoding.piece = decode()
        except BaseException as error:
            decoding.error = error
            raise
        finally:
            with self._lock:
                del self._decoding[key]
                if decoding.piece is not None and not decoding.dropped:
                    self._keep(key, decoding.piece)
            decoding.done.set()
            # The error's traceback refers to this frame: a cycle would keep the bytes of all its frames.
            del decoding
        return piece

    def has(self, key: Key) -> bool:
        """Return True if the piece is here, or is being decoded."""
        return key in self._pieces or key in self._decoding

    def drop(self, owner: int, first: int, last: int) -> None:
        """Forget the pieces of an owner with the numbers from ``first`` to ``last``.

        Those that are being decoded will not be kept.
        """

        def is_meant(key: Key) -> bool:
            return key[0] == owner and first <= key[1] <= last

        with self._lock:
            for key in [key for key in self._pieces if is_meant(key)]:
                self._size -= len(self._pieces.pop(key))
            for key, decoding in self._decoding.items():
                decoding.dropped = decoding.dropped or is_meant(key)

    @property
    def size(self) -> int:
        """Bytes of the pieces."""
        return self._size

    def _keep(self, key: Key, piece: bytes) -> None:
        self._pieces[key] = piece
        self._size += len(piece)
        while self._size > self._limit:
            _, oldest = self._pieces.popitem(last=False)
            self._size -= len(oldest)


class _Decoding:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.piece: bytes | None = None
        self.error: BaseException | None = None
        self.dropped = False

    def result(self, wait_s: float) -> bytes:
        if not self.done.wait(wait_s):
            raise SourceError("another thread has not decoded the same bytes in time", temporary=True)
        if self.piece is not None:
            return self.piece
        if isinstance(self.error, ObdlabError):
            raise self.error
        raise SourceError("another thread was interrupted while it decoded the same bytes", temporary=True)
