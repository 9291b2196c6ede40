"""A containerd proxy snapshotter."""

from __future__ import annotations
