"""Members of untrusted tars."""

from __future__ import annotations
