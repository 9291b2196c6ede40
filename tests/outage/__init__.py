"""The outage laboratory: what readers get when a registry, its network or the local cache fails."""

from __future__ import annotations
