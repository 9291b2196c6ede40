"""``overlaybd-tcmu`` and ``overlaybd-snapshotter``: obdlab's services with the original's files and paths."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from obdlab.cli.dropin.grammar import FAILED_CPP, Operand, Style, Tool
from obdlab.cli.dropin.layer_tools import SERVICE_CONFIG

if TYPE_CHECKING:
    import argparse

_SNAPSHOTTER_CONFIG = "/etc/overlaybd-snapshotter/config.json"


def _tcmu(values: argparse.Namespace) -> int:
    from obdlab.cli.main import main

    status = main(["serve", "tcmu", "--settings", values.config or SERVICE_CONFIG])
    return FAILED_CPP if status == 1 else status


def _snapshotter(values: argparse.Namespace) -> int:
    from obdlab.cli.main import main

    # The original's snapshotter has its registry credentials and its cache by way of overlaybd-tcmu's configuration.
    settings = ["--settings", SERVICE_CONFIG] if os.path.exists(SERVICE_CONFIG) else []
    return main(["serve", "snapshotter", "--config", values.config or _SNAPSHOTTER_CONFIG, *settings])


TCMU = Tool(
    "overlaybd-tcmu",
    "Serves overlaybd's TCMU devices (obdlab serve tcmu).",
    Style.CLI11,
    _tcmu,
    operands=(Operand("config", f"service configuration (default: {SERVICE_CONFIG})", required=False),),
    service=True,
)
SNAPSHOTTER = Tool(
    "overlaybd-snapshotter",
    "Serves containerd's snapshots API (obdlab serve snapshotter).",
    Style.URFAVE,
    _snapshotter,
    operands=(Operand("config", f"configuration (default: {_SNAPSHOTTER_CONFIG})", required=False),),
    service=True,
)
