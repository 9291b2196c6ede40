"""Commands about traces of reads."""

from __future__ import annotations
