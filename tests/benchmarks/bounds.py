"""How near starts with traces come to what the link permits: measures nothing, reads an experiment's rows.

    python -m tests.benchmarks.bounds [experiments/measured/peers]

The bound of a start, from the container's creation on with its metadata pulled, is what the fewest bytes that any
start with a hot layer received take at the line's rate, or the warm start if that takes longer, and three round
trips.
"of it" is the start's share of the bound; "of stargz" and "of overlayfs" its share of their times, from the pull on.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from obdlab.lab.run.rows import RowStore, newest_code, one_per_attempt

Row = dict[str, Any]
MB = 1_000_000
ARMS = ("obdlab-hot", "obdlab-prefetch")
AXES = ("image", "rate_mbit", "rtt_ms", "arm", "start")


def launch_s(rows: Sequence[Row]) -> float:
    return median(row["create_s"] + row["start_s"] + row["ready_s"] for row in rows)


def total_s(rows: Sequence[Row]) -> float:
    return median(row["total_s"] for row in rows)


def lines(results: Path) -> list[str]:
    """Return the table of the rows in ``results``."""
    groups: dict[tuple[str, float, float], dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    good = [row for row in RowStore(results).rows() if not row.get("error")]
    for row in one_per_attempt(newest_code(good, *AXES)):
        groups[row["image"], row["rate_mbit"], row["rtt_ms"]][row["arm"], row["start"]].append(row)
    table = [
        "image      Mbit/s  ms  arm              launch s  bound s  of it  n  total s  of stargz  of overlayfs  MB"
    ]
    for (image, rate, rtt), arms in sorted(groups.items()):
        if not arms.get(("obdlab-hot", "cold")):
            continue
        needed = min(row["bytes_received"] for row in arms["obdlab-hot", "cold"])
        for arm in ARMS:
            cold, warm = arms.get((arm, "cold")), arms.get((arm, "warm"))
            if not cold or not warm:
                continue
            bound = max(launch_s(warm), needed * 8 / MB / rate) + 3e-3 * rtt
            others = (
                f"{total_s(cold) / total_s(rows):9.2f}" if (rows := arms.get((name, "cold"))) else "        -"
                for name in ("stargz", "overlayfs")
            )
            taken = launch_s(cold)
            table.append(
                f"{image:10} {rate:6g} {rtt:3g}  {arm:16} {taken:8.3f} {bound:8.3f}  {taken / bound:5.2f} "
                f"{len(cold):2} {total_s(cold):8.3f}  {'  '.join(others)}  {needed / MB:8.1f}"
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("experiments/measured/peers"))
    print(*lines(parser.parse_args().results), sep="\n")


if __name__ == "__main__":
    main()
