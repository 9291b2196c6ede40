"""Networks, registries, containerd and limits of experiments, made and taken down."""

from __future__ import annotations
