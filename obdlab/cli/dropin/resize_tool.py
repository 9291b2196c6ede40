"""``overlaybd-resize``: the writable layer of a configuration, and the ext4 on its disk."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.dropin.grammar import Style, Tool, ToolError, option
from obdlab.cli.dropin.layer_tools import CONFIG_FLAGS, service_settings

if TYPE_CHECKING:
    import argparse

_GIB = 1 << 30
_MOST_GIB = (1 << 34) - 1


def _resize(values: argparse.Namespace) -> int:
    from obdlab.cli.common import DEFAULT_RUN_DIR, need_root
    from obdlab.cli.layer.resize import grow_filesystem
    from obdlab.image.config import ImageConfig
    from obdlab.layers.upper import open_upper
    from obdlab.server.client import DeviceService
    from obdlab.server.live import LiveDevice, find_by_upper

    began = time.monotonic()
    if not values.size.isascii() or not values.size.isdigit() or not 0 < int(values.size) <= _MOST_GIB:
        raise ToolError(f"invalid size: {values.size} (wanted a number of GB, more than 0)")
    size = int(values.size) * _GIB
    config = ImageConfig.load(values.config)
    if not config.upper.active:
        raise ToolError(f"{values.config}: the configuration has no writable layer (upper)")
    need_root("makes a block device, on which resize2fs works")
    service = DeviceService(Path(os.environ.get("OBDLAB_RUN_DIR", DEFAULT_RUN_DIR)), service_settings(values))
    device = find_by_upper(service, config.upper.data)
    if device is not None:
        LiveDevice(service, device.device_id).resize(size)
        grow_filesystem(device.path)
    else:
        with open_upper(config.upper.data, config.upper.index) as upper:
            upper.set_virtual_size(size)  # refuses to make it smaller
            upper.flush()
        device = service.attach(Path(values.config).absolute())
        try:
            grow_filesystem(device.path)
        finally:
            service.detach(device.device_id)
    print(f"Success: filesystem resized to {values.size} GB ({time.monotonic() - began:.3f} seconds)")
    return 0


RESIZE = Tool(
    "overlaybd-resize",
    "Makes the disk of a writable layer and its ext4 larger. Disks never shrink.",
    Style.CLI11,
    _resize,
    (
        option("--config", help="config.v1.json", existing=True, required=True),
        option("--size", help="new size in GB", required=True),
        *CONFIG_FLAGS,
    ),
    failure=1,
)
