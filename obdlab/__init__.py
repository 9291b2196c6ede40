"""Lazily started container images (DADI / overlaybd) in Python.

``open_zfile(path)`` and ``open_stack([bottom, ..., top])`` give read-only objects that are measured and sliced like
bytes (``len(disk)``, ``disk[a:b]``); a disk also shows which of its ``layers`` holds each range (``owners()``,
``index_frame()``, ``layer_frame()``). ``open_warp(meta, target, gzip_index)`` opens a turboOCI layer as such a
disk. ``open_image("config.v1.json")`` opens an image whose layers are files or in a registry; its ``around`` puts
wrappers (:class:`obdlab.blob.Wrapper`) into it. Every error is an :class:`ObdlabError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from obdlab.image.open import open_image, open_stack, open_warp, open_zfile

__all__ = ["ObdlabError", "open_image", "open_stack", "open_warp", "open_zfile"]


def __getattr__(name: str) -> object:
    # Late, so that `obdlab --help` and the tests of pure formats do not pay for numpy and an HTTP library.
    if name in ("open_image", "open_stack", "open_warp", "open_zfile"):
        from obdlab.image import open as image_open

        return getattr(image_open, name)
    raise AttributeError(f"module 'obdlab' has no attribute {name!r}")
