"""What cold walks over lazy images wait for: round trips, requests and bytes, at 100 Mbit/s and 20 ms. Needs root.

    python -m tests.benchmarks.cold_walk LAYOUT... [--rate 100] [--rtt 20] [--trees]

Each LAYOUT is a converted image (obdlab image convert IMAGE oci:LAYOUT). It is pushed to a registry behind a shaped
link, attached with an empty cache and mounted; then the tree is walked. "Rounds" is the longest chain of requests for
blobs each of which arrived after the answer to the one before, as the registry's log has them. Clocks decide nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from obdlab.cli.main import main as obdlab
from obdlab.devices.fuse_loop import FuseLoopDevice
from obdlab.image.from_manifest import fetch_config
from obdlab.image.open import open_image
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.registry import RegistryHost, Request
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from obdlab.system.mount import mount, unmount

WALKS = {
    "open": ["true"],
    "find": ["find", ".", "-newer", "/"],
    "du": ["du", "-sx", "."],
    "tar": ["sh", "-c", "tar -c . | cat >/dev/null"],
}


def rounds(requests: Sequence[Request], rtt_s: float) -> int:
    """Return the length of the longest chain of requests that waited for one another's answers.

    The sender has an answer half a round trip after it left, and its next request takes as long to arrive.
    """
    ends: list[tuple[float, int]] = []
    for request in sorted(requests, key=lambda request: request.began_s):
        known = request.began_s - 0.9 * rtt_s
        ends.append((request.ended_s, 1 + max((depth for end, depth in ends if end <= known), default=0)))
    return max((depth for _, depth in ends), default=0)


def walk(host: RegistryHost, reference: str, command: Sequence[str], directory: Path) -> list[Request]:
    """Mount the image with an empty cache, run the command in it, and return its requests for blobs."""
    with closing(RegistryClient()) as client:
        config = fetch_config(client, Reference.parse(reference), host_platform())
    root = directory / "root"
    for path in (root, directory / "device"):
        path.mkdir()
    begin = host.mark()
    with ExitStack() as stack:
        image = stack.enter_context(open_image(config, Settings(cache_dir=directory / "cache")))
        device = FuseLoopDevice(image, directory / "device", read_only=True)
        stack.callback(device.stop)
        mount(device.path, root, read_only=True)
        stack.callback(unmount, root)
        subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
        end = host.mark()
    return [request for request in host.requests(begin, end) if request.method == "GET" and request.blob]


def protected(reference: str) -> str:
    """Give the image's layers hash trees; return the reference of the image with them."""
    new = f"{reference}-trees"
    if obdlab(["image", "protect", reference, new]) != 0:
        raise SystemExit("no hash trees")
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="+", metavar="LAYOUT", type=Path)
    parser.add_argument("--rate", type=float, default=100.0, metavar="MBIT")
    parser.add_argument("--rtt", type=float, default=20.0, metavar="MS")
    parser.add_argument("--walks", nargs="+", choices=WALKS, default=["open", "find", "du"])
    parser.add_argument("--trees", action="store_true", help="with hash trees, by which each read is checked")
    parser.add_argument("--requests", action="store_true", help="print each: when it came, how long it took")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as work,
        ExperimentNetwork(args.rate, args.rtt, Path(work) / "state") as network,
        RegistryHost(Path(work) / "registry", network) as host,
    ):
        for layout in args.layouts:
            reference = host.push_layout(layout, f"walk/{layout.name.lower()}")
            if args.trees:
                with network.unshaped():
                    reference = protected(reference)
            host.preload()
            for name in args.walks:
                with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as directory:
                    got = walk(host, reference, WALKS[name], Path(directory))
                print(
                    f"  {layout.name:24} {name:5} {rounds(got, args.rtt / 1000):4} rounds {len(got):5} requests "
                    f"{sum(request.written for request in got) / 1e6:7.2f} MB",
                    flush=True,
                )
                if args.requests:
                    for each in sorted(got, key=lambda request: request.began_s):
                        at = (each.began_s - got[0].began_s) * 1000
                        print(f"    {at:8.1f} {each.duration_s * 1000:7.1f} ms  {each.blob[7:15]} {each.written:9}")


if __name__ == "__main__":
    main()
