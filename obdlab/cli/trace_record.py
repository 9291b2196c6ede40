"""``obdlab trace record``: of a device in use, or of an image in a container made for it."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_registry_options, add_runtime_options, device_service_from, registry_from
from obdlab.errors import DeviceError, ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.service.client import DeviceService

_ASK_S = 0.5
_WRITTEN_S = 60.0


class RecordError(ObdlabError):
    """A trace cannot be recorded as asked for."""


def add(actions: Any) -> None:
    """Declare the command."""
    record = actions.add_parser(
        "record",
        help="record a device in use, or a start of an image",
        description=(
            "Of a device, records what is read of it from now on, without disturbing it; what the kernel has "
            "cached already is not read again. Of an image, attaches it, runs its command (or that of --run) once "
            "in a container of runc, with a loopback network, and records from the first read on. Ends after "
            "--seconds, at a signal (SIGINT, SIGTERM, SIGUSR1), when the container ends, or as soon as it is "
            "ready: a line of its output holds --until-line, or --until-command succeeds in it."
        ),
    )
    record.add_argument("source", metavar="DEVICE|IMAGE", help="a device's id or node; an image as for attach")
    record.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the trace goes")
    until = record.add_mutually_exclusive_group()
    until.add_argument("--seconds", type=_seconds, default=60.0, metavar="N", help="for so long (default: 60)")
    until.add_argument("--until-signal", action="store_true", help="until a signal comes")
    ready = record.add_mutually_exclusive_group()
    ready.add_argument("--until-line", metavar="TEXT", help="of an image: or until a line of output has TEXT")
    ready.add_argument("--until-command", metavar="SH", help="of an image: or until sh -c SH succeeds in it")
    record.add_argument("--host-network", action="store_true", help="of an image: share the host's network")
    record.add_argument("-q", "--quiet", action="store_true", help="no summary, and no output of the container's")
    record.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        default=[],
        dest="words",
        metavar="COMMAND",
        help="of an image: run this instead of its own command; the last option, all after it is the command's",
    )
    add_runtime_options(record)
    add_registry_options(record)
    record.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError(text)
    return value


def run(args: argparse.Namespace) -> int:
    """Record one device, or one start."""
    from obdlab.service.live import find_device

    if not args.output.absolute().parent.is_dir():
        raise RecordError(f"{args.output}: no directory to write it to")
    service = device_service_from(args)
    device = find_device(service, args.source)
    of_image = [args.until_line, args.until_command, args.host_network, *args.words]
    with _signals() as ended:
        if device is not None:
            if any(of_image):
                raise RecordError(f"{args.source} is a device: --run, --until-* and --host-network are for images")
            return _record_device(args, service, device.device_id, ended)
        if args.source.startswith("/dev/"):
            raise DeviceError(f"{args.source}: no device of this run directory ({args.run_dir})")
        return _record_image(args, service, ended)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    ended = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ended.set())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- a device in use -------------------------------------------------------------------------------------------------


def _record_device(args: argparse.Namespace, service: DeviceService, device_id: str, ended: threading.Event) -> int:
    from obdlab.service.live import LiveDevice

    live = LiveDevice(service, device_id)
    live.start_recording()
    _wait(ended, None if args.until_signal else args.seconds, args.quiet)
    done = live.stop_recording(args.output)
    if not args.quiet:
        print(f"{args.output}: {done.reads} reads, {done.size} bytes")
    if done.left_out:
        print(f"obdlab trace: {done.left_out} reads came after the trace was full", file=sys.stderr)
    return 0


def _wait(ended: threading.Event, seconds: float | None, quiet: bool) -> None:
    from tqdm import tqdm

    deadline = None if seconds is None else time.monotonic() + seconds
    with tqdm(
        total=seconds, desc="recording", unit="s", leave=False, disable=True if quiet else None, file=sys.stderr
    ) as bar:
        began = time.monotonic()
        while not ended.is_set():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return
            ended.wait(0.5 if deadline is None else min(0.5, deadline - now))
            bar.n = round(time.monotonic() - began, 1)
            bar.refresh()


# -- a start of an image ---------------------------------------------------------------------------------------------


def _record_image(args: argparse.Namespace, service: DeviceService, ended: threading.Event) -> int:
    from dataclasses import replace

    from obdlab.cli.attach import image_config_of
    from obdlab.image.config import LowerConfig

    image = image_config_of([args.source], args)
    document = _container_config(args)
    service.run_dir.create()
    with ExitStack() as left, tempfile.TemporaryDirectory(prefix="record-", dir=service.run_dir.path) as directory:
        place = Path(directory).resolve()
        trace = place / "trace"
        trace.touch()
        if image.acceleration_layer:
            image = replace(image, acceleration_layer=False, lowers=image.lowers[:-1])
        # The trace is of a start that nothing helps, and of layers that everyone else has, too.
        image = replace(image, record_trace_path=str(trace), trace=LowerConfig())
        config = place / "config.v1.json"
        image.save(config)
        with _mounted(service, config, place / "image"):
            why = _run_once(args, place, document, ended)
        _await_trace(trace)
        shutil.copyfile(trace, args.output)
        left.callback(_summary, args, why)
    return 0


def _summary(args: argparse.Namespace, why: str) -> None:
    from obdlab.formats.trace import Trace

    recorded = Trace.from_bytes(args.output.read_bytes(), name=str(args.output))
    if not args.quiet:
        print(f"{args.output}: {len(recorded)} reads, {recorded.size} bytes ({why})")


@contextmanager
def _mounted(service: DeviceService, config: Path, target: Path) -> Iterator[None]:
    from obdlab.devices.abi import own_mounts
    from obdlab.devices.mount import unmount

    device_id = config.parent.name
    target.mkdir()
    device = service.attach(config, device_id)
    try:
        own_mounts()  # a mount namespace made elsewhere meanwhile would hold the device by its copy
        service.mount(device, target)
        try:
            yield
        finally:
            unmount(target)
    finally:
        service.detach(device_id)


def _run_once(args: argparse.Namespace, place: Path, document: dict[str, Any], ended: threading.Event) -> str:
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


# The server writes it when the device goes.
def _await_trace(trace: Path) -> None:
    deadline = time.monotonic() + _WRITTEN_S
    while not trace.with_name(trace.name + ".ok").exists():
        if time.monotonic() > deadline:
            raise RecordError(f"the trace was not written within {_WRITTEN_S:g} s (see the log of the device host)")
        time.sleep(0.02)
    if not trace.stat().st_size:
        raise RecordError("the trace is empty: nothing was read of the image's layers")


# What the image says its containers run; nothing, where the source is layers or a configuration.
def _container_config(args: argparse.Namespace) -> dict[str, Any]:
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
