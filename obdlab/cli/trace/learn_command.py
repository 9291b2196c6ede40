"""``obdlab trace learn``: a profile of starts, from images with a recorded trace."""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, platform, registry_from, settings_from
from obdlab.cli.jsonoutput import add_json_option, answer
from obdlab.cli.sources import add_source_options
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    import argparse

    from obdlab.convert.endpoints.endpoint import ImageSource
    from obdlab.registry.client import RegistryClient
    from obdlab.traces.learning import Example

_MOST_TRACE = 128 << 20


class LearnError(ObdlabError):
    """There is nothing to learn from."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Writes a profile of the starts of images whose traces were recorded: which files each start read, and which "
        "parts of them. trace suggest takes it with --profile. The trace of an IMAGE is the one that refers to it in "
        "its registry (image publish --as referrer). "
        "Example: obdlab trace learn registry.example/redis:7-obd registry.example/app:2-obd -o our.profile"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="an overlaybd image in a registry, with a trace")
    parser.add_argument(
        "--example",
        nargs=2,
        action="append",
        default=[],
        metavar=("IMAGE", "TRACE"),
        help="an overlaybd image anywhere, by a name with its image config, and a file; repeatable",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    parser.add_argument("-q", "--quiet", action="store_true", help="no line for each image")
    add_json_option(parser)
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Learn, and write the profile."""
    from obdlab.system.newfile import new_file
    from obdlab.traces.learning import learn

    wanted: list[tuple[str, Path | None]] = [(image, None) for image in args.images]
    wanted += [(image, Path(trace)) for image, trace in args.example]
    if not wanted:
        raise LearnError("no image to learn from: name some, or give --example IMAGE TRACE")
    examples = []
    with closing(registry_from(args)) as client:
        for image, trace in wanted:
            example = _example(args, client, image, trace)
            if not args.quiet:
                print(f"{image}: {len(example.reads)} files read of {len(example.paths)}", file=sys.stderr)
            examples.append(example)
    profile = learn(examples, made="obdlab trace learn")
    data = profile.to_bytes()
    with new_file(args.output, force=True) as file:
        file.write(data)
    facts = {"output": str(args.output), "examples": len(examples), "files": len(profile.files), "size": len(data)}
    answer(args, facts, f"{args.output}: {len(examples)} examples, {len(profile.files)} files, {len(data)} bytes")
    return 0


def _example(args: argparse.Namespace, client: RegistryClient, image: str, trace: Path | None) -> Example:
    from obdlab.convert.endpoints.names import open_source
    from obdlab.convert.publish.hot_and_traces import opened
    from obdlab.registry.platform import host_platform
    from obdlab.traces.learning import example_of
    from obdlab.traces.replay import load_file

    with (
        closing(open_source(image, client, containerd=args.containerd)) as source,
        tempfile.TemporaryDirectory(prefix="obdlab-learn-", dir="/var/tmp") as directory,
    ):
        descriptor, manifest = source.find(args.platform or host_platform(), overlaybd=True)
        data = load_file(str(trace)) if trace is not None else _published(source, descriptor.digest, image)
        document = source.config(manifest).document
        with opened(source, manifest, settings_from(args), client, Path(directory), None) as disk:
            return example_of(image, disk, document, data)


def _published(source: ImageSource, digest: str, image: str) -> bytes:
    from obdlab.traces.replay import load_blob

    found = source.trace(digest)
    if found is None:
        raise LearnError(f"{image}: no trace refers to it (give one with --example)")
    if found.size > _MOST_TRACE:
        raise LearnError(f"{image}: its trace is too large ({found.size} bytes)")
    return load_blob(source.open_blob(found), found.digest)
