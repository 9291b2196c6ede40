"""Commands about block devices and mounts."""

from __future__ import annotations
