"""``obdlab fsck``: check a snapshotter's root, and mend it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_registry_options, add_runtime_options, device_service_from
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Checks whether metadata, directories, configurations, layers and devices of a snapshotter's root agree. "
        "With --repair, no snapshotter may run on it: missing files that can be made again are made, leftovers are "
        "deleted, and lost snapshots are forgotten with all that build on them, so that clients pull them again. The "
        "exit status is 1 if a fault is left."
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="the snapshotter's --root")
    parser.add_argument("--repair", action="store_true", help="repair the faults")
    parser.add_argument(
        "--snapshotter-config", type=Path, metavar="FILE", help="the snapshotter's --config, for registries over HTTP"
    )
    add_json_option(parser, "print one JSON object for each fault")
    add_runtime_options(parser)
    add_registry_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check; mend if asked."""
    from obdlab.errors import ObdlabError
    from obdlab.snapshotter.config import SnapshotterConfig
    from obdlab.snapshotter.fsck import RootCheck

    config = SnapshotterConfig.load(args.snapshotter_config) if args.snapshotter_config else SnapshotterConfig()
    hosts = config.images.plain_http_hosts | frozenset(args.plain_http)
    options = replace(config.images, plain_http_hosts=hosts)
    check = RootCheck(args.root, options, device_service_from(args), lock=args.repair)
    found = left = 0
    try:
        for finding in check.findings():
            found += 1
            state = f"; remedy: {finding.remedy}" if finding.remedy else "; no remedy known"
            mended = False
            if args.repair and finding.mend is not None:
                try:
                    finding.mend()
                    mended, state = True, f"; mended: {finding.remedy}"
                except (ObdlabError, OSError) as error:
                    state = f"; not mended ({finding.remedy}): {error}"
            left += not mended
            if args.json:
                print_json({"fault": finding.what, "remedy": finding.remedy, "mended": mended})
            else:
                print(printable(f"{finding.what}{state}"))
    finally:
        check.close()
    if args.json:
        return 1 if left else 0
    print(f"{args.root}: {found or 'nothing'} wrong" + (f", {found - left} mended" if args.repair and found else ""))
    return 1 if left else 0
