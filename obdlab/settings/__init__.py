"""Settings: how this host opens images, and the files that say it."""

from __future__ import annotations
