"""Device servers as processes of their own."""

from __future__ import annotations
