"""The adapters by name: one for each way to start a container of an image that an experiment can compare.

To add one, write a subclass of ``obdlab.lab.baselines.adapter.Adapter`` and list it in ADAPTERS.
"""

from __future__ import annotations

from obdlab.lab.baselines.adapter import Adapter
from obdlab.lab.baselines.erofslayers import ErofsLayers
from obdlab.lab.baselines.file import Erofs, PlainLoop
from obdlab.lab.baselines.lazy import Lazy, LazySmall, Verified
from obdlab.lab.baselines.localforms import Local, LocalCompressed
from obdlab.lab.baselines.overlayfs import Overlayfs, OverlayfsUnpigz
from obdlab.lab.baselines.recorded import Hot, Prefetch
from obdlab.lab.baselines.soci import Soci
from obdlab.lab.baselines.stargz import Stargz, StargzRecorded, StargzZstd
from obdlab.lab.baselines.turbo import Turbo
from obdlab.lab.baselines.zstdlayers import OverlayfsZstd

_ALL = (
    Overlayfs(),
    OverlayfsUnpigz(),
    OverlayfsZstd(),
    Lazy(),
    LazySmall(),
    Verified(),
    Local(),
    LocalCompressed(),
    Prefetch(),
    Hot(),
    Turbo(),
    Stargz(),
    StargzZstd(),
    StargzRecorded(),
    Soci(),
    Erofs(),
    ErofsLayers(),
    PlainLoop(),
)
ADAPTERS: dict[str, Adapter] = {adapter.name: adapter for adapter in _ALL}

__all__ = ["ADAPTERS", "Adapter"]
