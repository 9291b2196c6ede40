"""Wire and disk formats as pure code: bytes in, frozen values out, no I/O."""

from __future__ import annotations
