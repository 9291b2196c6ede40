"""One start in a container of its own, for ``obdlab trace record`` and ``watch``, and its end."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from obdlab.cli.common import registry_from
from obdlab.cli.sources import image_config
from obdlab.cli.trace.recorded_start import RecordError, mounted

if TYPE_CHECKING:
    import argparse
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.cli.trace.recorded_start import EndAsked
    from obdlab.server.client import DeviceService

# Each question runs a process in the container: not too often.
_ASK_S = 0.5
_ANSWER_S = 30.0


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a start ended, in words, and whether it ended before it was ready although ``--until-*`` asked for that."""

    why: str
    unready: bool

    def status(self, written: str) -> int:
        """Return the command's exit status. If it is not 0, print why, and which output was written."""
        if self.unready:
            print(f"obdlab trace: never ready ({self.why}); {written}", file=sys.stderr)
        return int(self.unready)


def run_once(
    args: argparse.Namespace,
    place: Path,
    document: dict[str, Any],
    ended: EndAsked,
    release: Callable[[], None],
) -> Ended:
    """Run the container over the image mounted in ``place``, until it ends or a condition of ``args`` is met.

    ``release`` is called if the container's processes hang in reads of the image.
    """
    from obdlab.server.capture.container import LineWatch, TemporaryContainer

    bundle = place / "container"
    bundle.mkdir()
    ended.looked_at = True
    with ExitStack() as opened:
        target = sys.stderr.fileno() if not args.quiet else opened.enter_context(open("/dev/null", "wb")).fileno()
        watch = LineWatch(args.until_line or "\n", target)
        opened.callback(watch.close)
        container = opened.enter_context(
            TemporaryContainer(
                bundle,
                place / "image",
                document,
                command=args.words or (),
                host_network=args.host_network,
                output=watch.descriptor,
                release=release,
            )
        )
        wanted = bool(args.until_line or args.until_command)
        ready = opened.enter_context(_Readiness(args, container.run, lambda: watch.seen))
        runs = container.wait(None if args.until_signal else args.seconds, lambda: ended.is_set() or ready())
        if runs:
            if ended.is_set():
                return Ended("signal", unready=False)
            return Ended("ready", unready=False) if ready() else Ended(f"{args.seconds:g} s", unready=wanted)
        if container.status and not ready():
            raise RecordError(f"{args.source}: its command has ended with status {container.status}")
        return Ended("its command has ended", unready=wanted and not ready())


def run_mounted(args: argparse.Namespace, service: DeviceService, ended: EndAsked) -> Ended:
    """Run the image's container as :func:`run_once` does, and write the kernel's block events to ``args.output``."""
    from obdlab.server.capture.directories import place_for_start

    document = container_config(args)
    with image_config([args.source], args) as image, place_for_start(service.run_dir, "watch") as place:
        config = place / "config.v1.json"
        image.save(config)
        with mounted(service, config, place / "image", args.output) as release:
            return run_once(args, place, document, ended, release)


class _Readiness:
    # True once the container is ready, and from then on. Calls do not wait.
    def __init__(
        self, args: argparse.Namespace, run: Callable[[str], subprocess.Popen[bytes]], seen: Callable[[], bool]
    ) -> None:
        self._line, self._command = args.until_line, args.until_command
        self._run, self._seen = run, seen
        self._known = False
        self._asked_at = 0.0
        self._asking: subprocess.Popen[bytes] | None = None

    def __call__(self) -> bool:
        if not self._known:
            self._known = self._seen() if self._line else bool(self._command) and self._answers()
        return self._known

    def _answers(self) -> bool:
        now = time.monotonic()
        if self._asking is None:
            if now >= self._asked_at + _ASK_S:
                self._asking, self._asked_at = self._run(self._command), now
            return False
        status = self._asking.poll()
        if status is None and now < self._asked_at + _ANSWER_S:
            return False
        self._forget()
        self._asked_at = now
        return status == 0

    def _forget(self) -> None:
        if self._asking is not None:
            self._asking.kill()
            self._asking.wait()
            self._asking = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()


def container_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the image's own container configuration; {} if the source is layers or an image configuration."""
    from obdlab.convert.endpoints.forms import names_image
    from obdlab.convert.endpoints.names import open_source
    from obdlab.registry.platform import host_platform

    if not names_image(args.source):
        return {}
    client = registry_from(args)
    try:
        source = open_source(args.source, client, containerd=args.containerd)
        document = source.config(source.manifest(host_platform(), overlaybd=True)).document
        return dict(document.get("config") or {})
    finally:
        client.close()
