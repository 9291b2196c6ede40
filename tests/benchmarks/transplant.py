"""What a trace is still worth after its image was rebuilt: transplanted, against the rebuilt image's own. Needs root.

    python -m tests.benchmarks.transplant [--image redis] [--rate 100] [--rtt 20] [--rounds 3]

One layer of the image (the largest but the lowest, or --layer) is written again with its files in another order and
others among them, so that all of it lies elsewhere; both images are converted alike. The start of each is recorded
once, the old image's trace is transplanted, and the reads of the new image's start are replayed over a shaped link as
in :mod:`tests.benchmarks.prefetch`. "kept" is the share of the own trace's gain that the transplanted one has.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import random
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from obdlab.cli.main import main as obdlab
from obdlab.lab.images.recipe import find_recipe
from obdlab.lab.paths import LabPaths
from obdlab.settings.settings import Settings
from tests.benchmarks.extents import LAB, Read, image_config, record, registry
from tests.benchmarks.prefetch import Outcome, start_once

MiB = 1 << 20
OLD, NEW = "old", "rebuilt"


@dataclass(frozen=True)
class Start:
    reads: Sequence[Read]
    trace: Path


def stored(digest: str) -> bytes:
    return (LAB / "docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data").read_bytes()


def rewritten(layer: bytes) -> bytes:
    """The layer's tar with its regular files in another order, each after a new one of some KiB."""
    rng = random.Random(7)
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(gzip.decompress(layer))) as source,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as target,
    ):
        members = source.getmembers()
        files = [member for member in members if member.isreg()]
        rng.shuffle(files)
        for member in members:
            if member.isdir():
                target.addfile(member)
        for number, member in enumerate(files):
            if number % 8 == 0:
                added = replace_info(f"{os.path.dirname(member.name)}/added-{number}", rng.randrange(20_000))
                target.addfile(added, io.BytesIO(rng.randbytes(added.size)))
            target.addfile(member, source.extractfile(member))
        for member in members:
            if not member.isdir() and not member.isreg():
                target.addfile(member)
    return out.getvalue()


def replace_info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info


def write_layout(directory: Path, image: str, tag: str, number: int | None) -> str:
    """Write an OCI layout with the image rebuilt; return which layer was."""
    link = LAB / "docker/registry/v2/repositories" / image / "_manifests/tags" / tag / "current/link"
    manifest = json.loads(stored(link.read_text()))
    config = json.loads(stored(manifest["config"]["digest"]))
    sizes = [layer["size"] for layer in manifest["layers"]]
    number = number if number is not None else sizes.index(max(sizes[1:]), 1)
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)

    def store(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    for at, layer in enumerate(manifest["layers"]):
        data = stored(layer["digest"])
        if at == number:
            tar = rewritten(data)
            config["rootfs"]["diff_ids"][at] = f"sha256:{hashlib.sha256(tar).hexdigest()}"
            data = gzip.compress(tar, 1, mtime=0)
        layer.update(store(data))
    manifest["config"].update(store(json.dumps(config).encode()))
    entry = store(json.dumps(manifest).encode()) | {"mediaType": manifest["mediaType"]}
    entry["annotations"] = {"org.opencontainers.image.ref.name": NEW}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"layer {number} of {len(sizes)}, {sizes[number] / MiB:.1f} MiB"


def run(*words: str) -> None:
    if obdlab(list(words)):
        raise SystemExit(f"failed: obdlab {' '.join(words)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="redis")
    parser.add_argument("--tag", default="", help="default: the dataset's, of the tags the one without a suffix")
    parser.add_argument("--layer", type=int, metavar="N", help="which is rebuilt, from 0")
    parser.add_argument("--rate", type=float, default=100, metavar="MBIT")
    parser.add_argument("--rtt", type=float, default=20, metavar="MS")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if os.geteuid():
        raise SystemExit("needs root: mounts, a device, network namespaces")
    tags = LAB / "docker/registry/v2/repositories" / args.image / "_manifests/tags"
    tag = args.tag or next(path.name for path in tags.iterdir() if path.name.isalnum())
    command = find_recipe(args.image, LabPaths().datasets).config.command
    with tempfile.TemporaryDirectory(dir=LAB.parents[2]) as place:
        directory = Path(place)
        data = directory / "registry" / "data"
        data.parent.mkdir()
        subprocess.run(["cp", "-al", LAB, data], check=True)
        print(f"rebuilt: {write_layout(directory / 'layout', args.image, tag, args.layer)}")
        starts = {}
        with registry(0, 0, data) as host:
            for source, name in ((host.reference(args.image, tag), OLD), (f"oci:{directory / 'layout'}:{NEW}", NEW)):
                reference = host.reference(args.image, name)
                plain = ["--plain-http", host.host, "--algorithm", "zstd", "--block-size-kib", "16", "-q"]
                run("convert", source, reference, *plain, "--database", "none")
                trace = directory / f"{name}.trace"
                trace.touch()
                config = replace(image_config(host, args.image, name), record_trace_path=str(trace))
                (directory / name).mkdir()
                starts[name] = Start(record(config, command, directory / name), trace)
            served = directory / "both" / "data"
            served.parent.mkdir()
            subprocess.run(["cp", "-al", host.directory / "data", served], check=True)
            moved = directory / "moved.trace"
            words = ["trace", "transplant", str(starts[OLD].trace)]
            words += [host.reference(args.image, name) for name in (OLD, NEW)]
            run(*words, "-o", str(moved), "--plain-http", host.host, "--cache-dir", str(directory / "cache"))
        choices = {"without": None, "own": starts[NEW].trace, "transplanted": moved, "the old": starts[OLD].trace}
        outcomes: dict[str, list[Outcome]] = {name: [] for name in choices}
        with registry(args.rate, args.rtt, served) as host:
            config = image_config(host, args.image, NEW)
            for _ in range(args.rounds):
                for name, chosen in choices.items():
                    outcomes[name].append(start_once(config, starts[NEW].reads, Settings(trace_path=chosen)))
        report(args, outcomes)


def report(args: argparse.Namespace, outcomes: dict[str, list[Outcome]]) -> None:
    middle = {name: statistics.median(one.total_s for one in found) for name, found in outcomes.items()}
    gain = middle["without"] - middle["own"]
    for name, total_s in middle.items():
        requests = statistics.median(one.counted["requests"] for one in outcomes[name])
        print(
            f"{args.rate:5g} Mbit/s {args.rtt:2g} ms  {name:12} {total_s:6.2f} s "
            f"({total_s / middle['without']:.2f} of without)  {requests:4g} requests  "
            f"kept {(middle['without'] - total_s) / gain:.0%}"
        )


if __name__ == "__main__":
    main()
