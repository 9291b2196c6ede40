"""Commands about this host and its files of obdlab's."""

from __future__ import annotations
