"""``obdlab trace suggest``: a trace of an image that was never run."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, platform, registry_from, settings_from
from obdlab.cli.jsonoutput import add_json_option
from obdlab.cli.sources import add_source_options
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    import argparse

    from obdlab.traces.profile import Profile


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Writes a trace of the likely reads of a start of IMAGE, without running it: the programs of its entrypoint, "
        "command and scripts, their interpreters, libraries, imports and configurations, and files that "
        "starts of other images read, by a profile learned from their traces. "
        "Example: obdlab trace suggest registry.example/redis:7-obd -o redis.trace"
    )
    parser.add_argument("image", metavar="IMAGE", help="an overlaybd image, by a name with its image config")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    parser.add_argument(
        "--profile", metavar="FILE", help='made by trace learn, or "none" (default: that of this package)'
    )
    add_json_option(parser)
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the trace; report programs and libraries that are missing."""
    from obdlab.cli.trace.sets_command import save_trace
    from obdlab.convert.endpoints.names import open_source
    from obdlab.convert.publish.extend import manifest_of
    from obdlab.convert.publish.hot_and_traces import opened
    from obdlab.traces.likely import suggest

    profile = _profile(args.profile)
    with (
        closing(registry_from(args)) as client,
        closing(open_source(args.image, client, containerd=args.containerd)) as source,
        tempfile.TemporaryDirectory(prefix="obdlab-suggest-", dir="/var/tmp") as directory,
    ):
        manifest = manifest_of(source, args.platform)
        document = source.config(manifest).document
        with opened(source, manifest, settings_from(args), client, Path(directory), None) as disk:
            found = suggest(disk, document, profile)
    files = [os.fsdecode(path) for path in found.files]
    save_trace(args, found.trace, files=files, left_out=list(found.left_out))
    if not args.json:
        for reason in found.left_out[:10]:
            print(f"  left out: {printable(reason)}", file=sys.stderr)
    return 0


def _profile(name: str | None) -> Profile | None:
    from obdlab.localfile import LocalFile
    from obdlab.traces.profile import MAX_SIZE, Profile, own_profile

    if name is None:
        return own_profile()
    if name == "none":
        return None
    with LocalFile(name) as file:
        return Profile.from_bytes(file.read_at(0, min(file.size, MAX_SIZE + 1)), name=name)
