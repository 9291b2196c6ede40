"""What an experiment can compare: one adapter per way to start a container of an image, by its name.

A new one is a class like those here (``obdlab.lab.baselines.adapter``) and a line in ADAPTERS.
"""

from __future__ import annotations

from obdlab.lab.baselines.adapter import Adapter
from obdlab.lab.baselines.file import Erofs, PlainLoop
from obdlab.lab.baselines.lazy import Lazy
from obdlab.lab.baselines.overlayfs import Overlayfs
from obdlab.lab.baselines.prefetch import Hot, Prefetch
from obdlab.lab.baselines.soci import Soci
from obdlab.lab.baselines.stargz import Stargz

_ALL = (Overlayfs(), Lazy(), Prefetch(), Hot(), Stargz(), Soci(), Erofs(), PlainLoop())
ADAPTERS: dict[str, Adapter] = {adapter.name: adapter for adapter in _ALL}

__all__ = ["ADAPTERS", "Adapter"]
