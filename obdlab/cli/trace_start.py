"""What ``obdlab trace record`` and ``watch`` share: a device in use, or a start of an image made for it."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_registry_options, add_runtime_options, registry_from
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from obdlab.service.client import AttachedDevice, DeviceService

_ASK_S = 0.5


class RecordError(ObdlabError):
    """A start cannot be made, or a trace cannot be recorded, as asked for."""


def add_start_options(parser: argparse.ArgumentParser) -> None:
    """Add what is started, and when it ends."""
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--seconds", type=_seconds, default=60.0, metavar="N", help="for so long (default: 60)")
    until.add_argument("--until-signal", action="store_true", help="until a signal comes")
    ready = parser.add_mutually_exclusive_group()
    ready.add_argument("--until-line", metavar="TEXT", help="of an image: or until a line of output has TEXT")
    ready.add_argument("--until-command", metavar="SH", help="of an image: or until sh -c SH succeeds in it")
    parser.add_argument("--host-network", action="store_true", help="of an image: share the host's network")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary, and no output of the container's")
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        default=[],
        dest="words",
        metavar="COMMAND",
        help="of an image: run this instead of its own command; the last option, all after it is the command's",
    )
    add_runtime_options(parser)
    add_registry_options(parser)


def device_of(args: argparse.Namespace, service: DeviceService) -> AttachedDevice | None:
    """Return the device that the command line names; None: it names an image.

    Raises RecordError for an output that cannot be written, a node that is no device of ours, or, of a device,
    options that are for images only.
    """
    from obdlab.service.live import find_device

    outputs = [path for path in (args.output, getattr(args, "events", None)) if path is not None]
    for path in outputs:
        if not path.absolute().parent.is_dir():
            raise RecordError(f"{path}: no directory to write it to")
        if path.is_dir():
            raise RecordError(f"{path}: is a directory")
    if len({path.absolute() for path in outputs}) < len(outputs):
        raise RecordError(f"{args.output}: named twice, for the trace and for the events")
    device = find_device(service, args.source)
    if device is None and args.source.startswith("/dev/"):
        raise RecordError(f"{args.source}: no device of this run directory ({args.run_dir})")
    if device is not None and any([args.until_line, args.until_command, args.host_network, *args.words]):
        raise RecordError(f"{args.source} is a device: --run, --until-* and --host-network are for images")
    return device


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError(text)
    return value


@contextmanager
def signals() -> Iterator[threading.Event]:
    """Within ``with``, set the event when a signal asks for the end."""
    ended = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ended.set())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    }
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(ended: threading.Event, seconds: float | None, quiet: bool, what: str = "recording") -> None:
    """Wait for the event, for so many seconds at most, with a progress bar."""
    from tqdm import tqdm

    deadline = None if seconds is None else time.monotonic() + seconds
    with tqdm(
        total=seconds, desc=what, unit="s", leave=False, disable=True if quiet else None, file=sys.stderr
    ) as bar:
        began = time.monotonic()
        while not ended.is_set():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return
            ended.wait(0.5 if deadline is None else min(0.5, deadline - now))
            bar.n = round(time.monotonic() - began, 1)
            bar.refresh()


@contextmanager
def mounted(service: DeviceService, config: Path, target: Path, events: Path | None = None) -> Iterator[None]:
    """Within ``with``, have the image attached and mounted on ``target``; see :func:`listening` for ``events``."""
    from obdlab.devices.abi import own_mounts
    from obdlab.devices.mount import unmount

    device_id = config.parent.name
    target.mkdir()
    device = service.attach(config, device_id)
    try:
        own_mounts()  # a mount namespace made elsewhere meanwhile would hold the device by its copy
        with listening(device.path, events):
            service.mount(device, target)
            try:
                yield
            finally:
                unmount(target)
    finally:
        service.detach(device_id)


@contextmanager
def listening(node: Path, events: Path | None) -> Iterator[None]:
    """Within ``with``, have the kernel tell its block events of a device; in the end they are in that file."""
    if events is None:
        yield
        return
    from obdlab.devices.blocktrace import BlockTrace

    with BlockTrace(node) as trace:
        try:
            yield
        finally:
            lost = trace.save(events)
            if lost:
                print(f"obdlab trace: {events}: {lost} events came too many", file=sys.stderr)


def run_once(args: argparse.Namespace, place: Path, document: dict[str, Any], ended: threading.Event) -> str:
    """Run the container over the image mounted in ``place``; return why it came to its end, in words."""
    from obdlab.service.tempcontainer import LineWatch, TemporaryContainer

    bundle = place / "container"
    bundle.mkdir()
    with ExitStack() as opened:
        target = sys.stderr.fileno() if not args.quiet else opened.enter_context(open("/dev/null", "wb")).fileno()
        watch = LineWatch(args.until_line or "\n", target)
        opened.callback(watch.close)
        container = opened.enter_context(
            TemporaryContainer(
                bundle,
                place / "image",
                document,
                command=args.words,
                host_network=args.host_network,
                output=watch.descriptor,
            )
        )
        ready = _readiness(args, container.answers, lambda: watch.seen)
        runs = container.wait(None if args.until_signal else args.seconds, lambda: ended.is_set() or ready())
        if runs:
            return "signal" if ended.is_set() else "ready" if ready() else f"{args.seconds:g} s"
        if container.status and not ready():
            raise RecordError(f"{args.source}: its command has ended with status {container.status}")
        return "its command has ended"


def _readiness(
    args: argparse.Namespace, answers: Callable[[str], bool], seen: Callable[[], bool]
) -> Callable[[], bool]:
    # Asking runs a process in the container, so not too often; once ready it stays so.
    known = False
    asked = 0.0

    def ready() -> bool:
        nonlocal known, asked
        if not known and args.until_line:
            known = seen()
        elif not known and args.until_command and time.monotonic() >= asked + _ASK_S:
            known = answers(args.until_command)
            asked = time.monotonic()
        return known

    return ready


def container_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the image says its containers run; nothing, where the source is layers or a configuration."""
    from obdlab.convert.source import names_image, open_source
    from obdlab.registry.platforms import host_platform

    if not names_image(args.source):
        return {}
    client = registry_from(args)
    try:
        source = open_source(args.source, client)
        document = source.config(source.manifest(host_platform(), overlaybd=True)).document
        return dict(document.get("config") or {})
    finally:
        client.close()
