"""containerd's gRPC API."""

from __future__ import annotations
