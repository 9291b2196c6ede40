"""EROFS in user space over a blob: reading it."""

from __future__ import annotations
