"""``obdlab layer gc``: free what an append-mode writable layer has overwritten."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, device_service_from
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.packing import add_layer_arguments, end_politely_on_sigterm, layer_files
from obdlab.cli.progressbar import shown_bar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from obdlab.layers.gc import Collected


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Punches holes where the data file holds nothing that is still seen, moves data together that would keep "
        "mostly empty blocks, and shortens the index file. The layer reads as before, here and with the original "
        "tools, and may be killed at any point. If a device of the run directory has the layer open, its server "
        "collects it while it is in use. A sparse layer needs no collection, it frees space when it is discarded."
    )
    add_layer_arguments(parser, "data file of the layer")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    add_json_option(parser)
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Collect one layer."""
    from obdlab.server.live import LiveDevice, find_by_upper

    end_politely_on_sigterm()
    service = device_service_from(args)
    with _bar(args) as progress:
        try:
            device = find_by_upper(service, args.data)
        except PermissionError:  # the run directory is another user's
            device = None
        if device is not None:
            live = LiveDevice(service, device.device_id)
            done = live.collect(lambda state: progress(state.step, state.done, state.total))
        else:
            done = _collect_here(args, progress)
    if args.json:
        print_json({"data": args.data} | ({} if done is None else asdict(done)))
        return 0
    if done is None:
        print(f"{args.data}: a sparse layer has nothing to collect")
        return 0
    freed = done.allocated_before - done.allocated_after
    print(
        f"{args.data}: {done.allocated_after} bytes on disk ({freed} freed, {done.moved_size} moved), "
        f"{done.records_after} index records ({done.records_before} before)"
    )
    return 0


def _collect_here(args: argparse.Namespace, progress: Callable[[str, int, int], None]) -> Collected | None:
    from obdlab.layers.append import AppendUpper
    from obdlab.layers.gc import collect
    from obdlab.layers.upper import open_upper

    files = layer_files(args)
    with open_upper(files.data, files.index) as upper:
        return collect(upper, progress) if isinstance(upper, AppendUpper) else None


@contextmanager
def _bar(args: argparse.Namespace) -> Iterator[Callable[[str, int, int], None]]:
    with shown_bar(args.data, 1, unit="steps", quiet=args.quiet or args.json) as bar:

        def show(step: str, done: int, total: int) -> None:
            bar.set_description(f"{args.data}: {step}", refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        yield show
