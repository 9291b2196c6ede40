"""How near starts with traces come to what the link permits: measures nothing, reads an experiment's rows.

    python -m tests.benchmarks.bounds [results/peers]

The bound of a start, from the container's creation on with its metadata pulled, is what its traced bytes as stored
(the hot layer's size, in the lab's registry) take at the line's rate, or the warm start if that takes longer, and
three round trips. "of" are the start's share of the bound, and of other snapshotters' times, those from the pull on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.extents import LAB

Row = dict[str, Any]
MB = 1_000_000
ARMS = ("obdlab-hot", "obdlab-prefetch")


def hot_layer_size(image: str) -> int:
    tags = LAB / "docker/registry/v2/repositories" / image / "_manifests/tags"
    tag = max(path for path in tags.iterdir() if "-hot" in path.name)
    digest = (tag / "current/link").read_text()
    manifest = LAB / "docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data"
    return int(json.loads(manifest.read_text())["layers"][-1]["size"])


def launch_s(rows: Sequence[Row]) -> float:
    return statistics.median(row["create_s"] + row["start_s"] + row["ready_s"] for row in rows)


def total_s(rows: Sequence[Row]) -> float:
    return statistics.median(row["total_s"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("results/peers"))
    args = parser.parse_args()
    groups: dict[tuple[str, float, float], dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for line in (args.results / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "total_s" in row:
            groups[row["image"], row["rate_mbit"], row["rtt_ms"]][row["arm"], row["start"]].append(row)
    print("image      Mbit/s  ms  arm              launch s  bound s  of it  n  total s  of stargz  of overlayfs  MB")
    for (image, rate, rtt), arms in sorted(groups.items()):
        stored = hot_layer_size(image)
        for arm in ARMS:
            cold, warm = arms.get((arm, "cold")), arms.get((arm, "warm"))
            if not cold or not warm:
                continue
            bound = max(launch_s(warm), stored * 8 / MB / rate) + 3e-3 * rtt
            others = (
                f"{total_s(cold) / total_s(rows):9.2f}" if (rows := arms.get((name, "cold"))) else "        -"
                for name in ("stargz", "overlayfs")
            )
            taken = launch_s(cold)
            print(
                f"{image:10} {rate:6g} {rtt:3g}  {arm:16} {taken:8.3f} {bound:8.3f}  {taken / bound:5.2f} "
                f"{len(cold):2} {total_s(cold):8.3f}  {'  '.join(others)}  {stored / MB:8.1f}"
            )


if __name__ == "__main__":
    main()
