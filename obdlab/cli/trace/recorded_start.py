"""Shared by ``obdlab trace record`` and ``watch``: a device in use, or a start of an image made for the purpose."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options
from obdlab.cli.jsonoutput import add_json_option
from obdlab.cli.numbers import real
from obdlab.cli.progressbar import shown_bar
from obdlab.cli.sources import add_source_options
from obdlab.errors import ObdlabError
from obdlab.system.pauses import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from obdlab.server.client import AttachedDevice, DeviceService

# At the end, a read of the disk that is under way for longer counts as hung.
_MOST_WAITED_S = 3.0
_LOOK_S = 0.1


class RecordError(ObdlabError):
    """A start cannot be made, or a trace cannot be recorded, as asked for."""


def add_start_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the start and its end."""
    until = parser.add_mutually_exclusive_group()
    until.add_argument(
        "--seconds", type=real(above=0, below=1e6), default=60.0, metavar="N", help="for so long (default: 60)"
    )
    until.add_argument("--until-signal", action="store_true", help="until a signal comes")
    ready = parser.add_mutually_exclusive_group()
    ready.add_argument("--until-line", metavar="TEXT", help="of an image: or until a line of output has TEXT")
    ready.add_argument("--until-command", metavar="SH", help="of an image: or until sh -c SH succeeds in it")
    parser.add_argument("--host-network", action="store_true", help="of an image: share the host's network")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary, and no output of the container's")
    add_json_option(parser)
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        dest="words",
        metavar="COMMAND",
        help="of an image: run this instead of its own command; the last option, all after it is the command's",
    )
    add_runtime_options(parser)
    add_source_options(parser)


def device_of(args: argparse.Namespace, service: DeviceService) -> AttachedDevice | None:
    """Return the device that the command line names, or None if it names an image.

    Raises RecordError for an output that cannot be written, for a node that is no device of the run directory, and
    for options of images together with a device.
    """
    from obdlab.server.live import find_device

    check_outputs([path for path in (args.output, getattr(args, "events", None)) if path is not None])
    if args.words == []:
        raise RecordError("--run: nothing to run after it")
    device = find_device(service, args.source)
    if device is None and args.source.startswith("/dev/"):
        raise RecordError(f"{args.source}: no device of this run directory ({args.run_dir})")
    if device is not None and any([args.until_line, args.until_command, args.host_network, args.words]):
        raise RecordError(f"{args.source} is a device: --run, --until-* and --host-network are for images")
    return device


def check_outputs(outputs: Sequence[Path]) -> None:
    """Raise RecordError for files that cannot be written. Call it before anything is done."""
    for path in outputs:
        if not path.absolute().parent.is_dir():
            raise RecordError(f"{path}: no directory to write it to")
        if path.is_dir():
            raise RecordError(f"{path}: is a directory")
    if len({path.absolute() for path in outputs}) < len(outputs):
        raise RecordError(f"{outputs[0]}: named twice, for the trace and for the events")


class EndAsked(threading.Event):
    """Set when a signal asks for the end. Before ``looked_at`` is set, a signal interrupts instead."""

    looked_at = False

    def note(self, *_: object) -> None:
        """Handle a signal. Raises KeyboardInterrupt while no code waits for the event."""
        self.set()
        if not self.looked_at:
            raise KeyboardInterrupt


@contextmanager
def signals() -> Iterator[EndAsked]:
    """Within ``with``, have signals ask for the end."""
    ended = EndAsked()
    before = {
        number: signal.signal(number, ended.note)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    }
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(ended: threading.Event, seconds: float | None, quiet: bool, what: str = "recording") -> None:
    """Wait for the event, for ``seconds`` at most, with a progress bar."""
    deadline = None if seconds is None else time.monotonic() + seconds
    with shown_bar(what, seconds, unit="s", quiet=quiet) as bar:
        began = time.monotonic()
        while not ended.is_set():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return
            ended.wait(0.5 if deadline is None else min(0.5, deadline - now))
            bar.n = round(time.monotonic() - began, 1)
            bar.refresh()


@contextmanager
def mounted(
    service: DeviceService,
    config: Path,
    target: Path,
    events: Path | None = None,
    before_force: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[], None]]:
    """Within ``with``, have the image attached and mounted on ``target``; for ``events`` see :func:`listening`.

    Yields a function that detaches the device by force, after a call of ``before_force``. At the end all is taken
    down, with that function if a read hangs.
    """
    from obdlab.system.abi import own_mounts
    from obdlab.system.mount import unmount

    device_id = config.parent.name
    target.mkdir()
    device = service.attach(config, device_id, served=True)
    stuck = False

    def release() -> None:
        before_force()
        service.detach(device_id, force=True)

    try:
        own_mounts()  # a mount namespace made meanwhile would copy the mount and hold the device
        with listening(device.path, events):
            service.mount(device, target)
            try:
                yield release
            finally:
                # Unmounting waits for reads that are under way, and cannot be interrupted.
                stuck = _hangs(service, device_id)
                if stuck:
                    release()
                unmount(target, lazy=stuck)
    finally:
        service.detach(device_id, force=stuck)


def _hangs(service: DeviceService, device_id: str) -> bool:
    def is_idle() -> bool:
        try:
            return not service.statistics(device_id)["under_way_s"]
        except ObdlabError:  # gone, or being replaced
            return True

    return not wait_until(is_idle, _MOST_WAITED_S, look_s=_LOOK_S)


@contextmanager
def listening(node: Path, events: Path | None) -> Iterator[None]:
    """Within ``with``, record the kernel's block events of a device; write them to ``events`` at the end."""
    if events is None:
        yield
        return
    from obdlab.traces.blocktrace import BlockTrace

    with BlockTrace(node) as trace:
        try:
            yield
        finally:
            lost = trace.save(events)
            if lost:
                print(f"obdlab trace: {events}: {lost} events came too many", file=sys.stderr)
