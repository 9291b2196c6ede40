"""The ZFile format: seekable compression in independent blocks."""

from __future__ import annotations
