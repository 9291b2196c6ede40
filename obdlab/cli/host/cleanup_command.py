"""``obdlab cleanup``: take everything down, also after a crash."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, device_service_from, settings_from
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.sources import remove_copies

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Unmounts the file systems on obdlab's devices, detaches the devices, stops their servers and the device "
        "host, and empties the run directory; also after any of them was killed. Devices and mounts in use are named "
        "and left (exit status 1), and so are a snapshotter that still runs and its devices. Also takes down the "
        "leftovers of a killed experiment. Doing it twice is fine."
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="also devices in use, and those of a running snapshotter: their users get I/O errors",
    )
    parser.add_argument("--cache", action="store_true", help="empty the block cache too")
    add_json_option(parser, "print the results as one JSON object")
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Clean up and say what was done."""
    from obdlab.lab.testbed.leftovers import cleanup_leftovers
    from obdlab.server.cleanup import clean_up

    leftovers = [f"experiment's {name}" for name in cleanup_leftovers()]
    for name in () if args.json else leftovers:
        print(f"removed {name}")
    report = clean_up(device_service_from(args), force=args.force)
    if not report.in_use:
        remove_copies(settings_from(args), args.run_dir)
    cache_dir = settings_from(args).cache_dir
    if args.json:
        freed = _empty(cache_dir) if args.cache and not report.in_use else 0
        print_json({"removed": [*leftovers, *report.removed], "in_use": report.in_use, "freed_cache_bytes": freed})
        return 1 if report.in_use else 0
    for line in report.removed:
        print(f"removed {line}")
    for line in report.in_use:
        print(f"still in use: {line}")
    if args.cache and report.in_use:
        print(f"cache kept, since devices still read it: {cache_dir}")
    elif args.cache:
        print(f"removed cache ({_empty(cache_dir) >> 20} MiB)")
    if not (leftovers or report.removed or report.in_use or args.cache):
        print("nothing to clean up")
    return 1 if report.in_use else 0


# Empties the directory and returns its bytes on disk. Keeps the directory itself: it may be a mount point.
def _empty(cache_dir: Path) -> int:
    if not cache_dir.is_dir():
        return 0
    held = sum(path.lstat().st_blocks * 512 for path in cache_dir.rglob("*"))
    for entry in cache_dir.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return held
