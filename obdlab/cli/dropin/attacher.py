"""``overlaybd-attacher``: TCMU devices made and removed by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.dropin.grammar import Operand, Style, Tool, option, switch
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    import argparse

#: As the original: so often, a second apart.
_TRIES = 5
_PAUSE_S = 1.0
_ID = option("--id", help="device id (a snapshot's)", required=True)
_VERBOSE = switch("--verbose", "-v", help="log more")


def _attach(values: argparse.Namespace) -> int:
    from obdlab.cli.device.tcmu_attach import attach

    config = Path(values.config).absolute()
    if not config.is_file():
        raise DeviceError(f"config file does not exist: {config}")
    for number in range(1, _TRIES + 1):
        try:
            print(attach(values.id, config, values.id if values.with_devid else ""))
            return 0
        except DeviceError as error:
            if number == _TRIES:
                raise DeviceError(f"failed to attach device after {_TRIES} attempts: {error}") from error
        time.sleep(_PAUSE_S)
    raise AssertionError


def _detach(values: argparse.Namespace) -> int:
    from obdlab.cli.common import need_root
    from obdlab.devices.tcmu.configfs import Target
    from obdlab.server.tcmu.devices import take_down

    need_root("removes a block device")
    take_down(Target.of(values.id))  # a device that is gone is no error, as in the original
    return 0


VERBS = {
    "attach": Tool(
        "overlaybd-attacher attach",
        "Attach an overlaybd device, and print its node.",
        Style.URFAVE,
        _attach,
        (
            _ID,
            option("--config", help="the image's config.v1.json", required=True),
            _VERBOSE,
            switch("--with-devid", help="the id serves for live snapshots, too"),
        ),
    ),
    "detach": Tool(
        "overlaybd-attacher detach", "Detach an overlaybd device.", Style.URFAVE, _detach, (_ID, _VERBOSE)
    ),
}


def _attacher(values: argparse.Namespace) -> int:
    verb = VERBS.get(values.command)
    if verb is None:
        raise DeviceError(f"No help topic for {values.command!r} (wanted attach or detach)")
    return verb.run(verb.parse(values.rest))


ATTACHER = Tool(
    "overlaybd-attacher",
    "Attaches and detaches overlaybd devices: attach --id ID --config FILE, detach --id ID.",
    Style.URFAVE,
    _attacher,
    operands=(Operand("command", "attach or detach"),),
    rest=True,
)
