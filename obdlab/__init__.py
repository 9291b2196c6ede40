"""Lazily started container images (DADI / overlaybd) in Python.

``open_zfile(path)`` and ``open_stack([bottom, ..., top])`` give read-only objects with ``.size`` and
``.read_at(offset, length)``; every error is an :class:`ObdlabError`.
"""

from __future__ import annotations

from obdlab.errors import ObdlabError
from obdlab.image.open import open_stack, open_zfile

__all__ = ["ObdlabError", "open_stack", "open_zfile"]
