"""Results as if measured: rows of every experiment, with the numbers a test wants."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

from obdlab.lab.kinds import KINDS
from obdlab.lab.paper import questions as q
from obdlab.lab.paper.results import Results
from obdlab.lab.run.rows import Row, RowStore
from obdlab.lab.run.spec import Spec

_CONTEXT = "as if measured"

#: Seconds of a start by arm and kind; those of the paper, about.
TOTALS = {
    ("overlayfs", "cold"): 11.0,
    ("obdlab", "cold"): 2.1,
    ("obdlab-prefetch", "cold"): 0.6,
    ("obdlab-hot", "cold"): 0.5,
    **{(arm, start): 0.4 for arm in ("obdlab", "obdlab-prefetch", "obdlab-hot") for start in ("warm", "dropped")},
    ("overlayfs", "warm"): 0.5,
    ("overlayfs", "dropped"): 0.5,
}


def start_rows(totals: dict[tuple[str, str], float] = TOTALS, repeats: int = 3, **more: Any) -> list[Row]:
    """Rows of starts, each repeat a little slower than the one before."""
    rows = []
    for (arm, start), disk, repeat in product(totals, ("native", "cloud"), range(repeats)):
        total = totals[arm, start] * (1 + 0.01 * repeat) * (1 if disk == "native" else 1.5)
        pull = 0.8 * total if arm == "overlayfs" and start == "cold" else 0.01
        rest = total - pull
        about = {"image": "redis", "arm": arm, "start": start, "disk": disk, "rate_mbit": 100.0, "rtt_ms": 5.0}
        times = {"pull_s": pull, "create_s": 0.2 * rest, "start_s": 0.2 * rest, "ready_s": 0.6 * rest}
        traffic = {"bytes_received": 1e6, "requests": 10, "cpu_s": 0.3, "quiet": True}
        rows.append({**about, **times, **traffic, "repeat": repeat, "total_s": total, "environment": "e", **more})
    return rows


def grid_rows(kind: str, axes: dict[str, tuple[Any, ...]], values: dict[str, float]) -> list[Row]:
    """Rows of a grid: the same values at every point, thrice."""
    names = [metric.key for metric in KINDS[kind].metrics]
    return [
        {"kind": kind, **dict(zip(axes, point, strict=True)), **dict.fromkeys(names, 1.0), **values, "quiet": True}
        for point in product(*axes.values())
        for _ in range(3)
    ]


#: Axes of simulated rows by run, for :func:`simulated`.
_SIMULATED: dict[str, dict[str, tuple[Any, ...]]] = {
    "simulated_scale": {"topology": ("rooted", "direct"), "caches": ("cold", "warm"), "containers": (10.0,)},
    "simulated_hyper": {"topology": ("rooted",), "hosts": (1000, 100_000), "arity": (2, 3)},
    "simulated_faasnet": {"topology": ("balanced", "rooted", "direct"), "hosts": (8, 128)},
    "simulated_functions": {"topology": ("balanced",), "containers": (2.5,)},
    "simulated_bursts": {"topology": ("balanced", "direct"), "shape": ("iot",)},
    "simulated_churn": {"topology": ("balanced", "direct"), "hosts": (128,)},
}


def simulated(**values: dict[str, float]) -> dict[str, list[Row]]:
    """Rows of all simulated experiments with three seeds; ``values`` by run replace those that hold the claims."""
    about = {"hosts": (1000,), "containers": (1.0,), "arity": (2,), "caches": ("cold",), "shape": ("once",)}
    found = {}
    for run, axes in _SIMULATED.items():
        rows = grid_rows("simulation", about | axes, {"spread_s": 1.0, **values.get(run, {})})
        for number, row in enumerate(rows):
            row |= {"label": "simulated", "repeat": number % 3, "peak_sent_mb_s": 90.0, "peak_received_mb_s": 45.0}
            if row["topology"] == "direct":
                row |= {key: 5 * row[key] for key in ("median_s", "all_ready_s", "recovered_s")}
            elif row["topology"] == "rooted" and run == "simulated_faasnet":
                row["median_s"] *= 2.8
        found[run] = rows
    return found


def swarm(**values: Any) -> dict[str, list[Row]]:
    """Rows of both emulated experiments, three of each point, that hold the claims; ``values`` replace some."""
    found: list[Row] = []
    for topology, hosts, repeat in product(("rendezvous", "direct"), (1, 2, 4, 8, 16, 32), range(3)):
        grows = 1 + (0.4 * math.log2(hosts) if topology == "direct" else 0.0)
        about = {"kind": "swarm", "topology": topology, "hosts": hosts, "caches": "cold", "repeat": repeat}
        numbers = dict.fromkeys((metric.key for metric in KINDS["swarm"].metrics), 1.0)
        times = {"median_s": grows * (10 + 0.01 * repeat), "slowest_s": grows * (10.5 + 0.01 * repeat)}
        sets = {"origin_sets": float(hosts) if topology == "direct" else 1.05}
        state = {"label": "emulated", "links_decide": True, "quiet": True}
        found.append({**about, **numbers, **times, **sets, **state, **values})
    one = grid_rows("swarm", {"topology": ("rooted", "direct"), "hosts": (1,), "caches": ("warm root",)}, {})
    for number, row in enumerate(one):
        about = {"label": "emulated", "links_decide": True, "repeat": number % 3}
        row |= {**about, "median_s": {"rooted": 0.3, "direct": 1.0}[row["topology"]] * (1 + 0.01 * (number % 3))}
    return {"swarm": found, "swarm_from_peers": one}


class Given(Results):
    """Results that a test gives."""

    def __init__(self, root: Path, rows: dict[str, list[Row]]) -> None:
        super().__init__(root)
        self._rows = {run.name: [] for run in q.runs()} | rows


def everything(root: Path) -> Given:
    """Rows of every experiment."""
    depths = {"device": ("loop", "obdlab-raw", "obdlab-lz4", "obdlab-zstd"), "iodepth": (1, 16, 128)}
    return Given(
        root,
        {
            "start": start_rows(),
            "random_read": grid_rows("fio", depths, {"iops": 1000.0}),
            "scan_du": start_rows(),
            "scan_tar": start_rows(),
            "build": grid_rows("build", {"layer": ("overlayfs", "obdlab-append")}, {}),
            "lazy_build": grid_rows(
                "lazy_build", {"new": ("1x400", "10x25"), "builder": ("docker", "obdlab")}, {"base_share": 0.01}
            ),
            "index": grid_rows("index", {"segments": (1000, 4500, 100000), "layers": (1, 50)}, {"batch_m_s": 7.0}),
            "depth": grid_rows("depth", {"layers": (10, 205)}, {"segments": 4000.0}),
            "codec": grid_rows("codec", {"algorithm": ("lz4", "zstd"), "block_size": (4096,), "workers": (1,)}, {}),
            "conversion": grid_rows(
                "conversion",
                {"algorithm": ("lz4", "zstd"), "image": ("redis",), "block_size": (4096,)},
                {"segments": 4000.0, "of_source": 1.6},
            ),
            "misses": grid_rows("misses", {"rtt_ms": (0, 20), "size": (4096,)}, {}),
            **simulated(),
            **swarm(),
            "memory": grid_rows("memory", {"devices": (1, 10)}, {}),
        },
    )


def store_starts(directory: Path, spec: Spec, rows: list[Row]) -> Path:
    """Keep rows as if ``spec`` had been run in ``directory``: of each cell all rows with its values."""
    store = RowStore(directory)
    for cell in spec.cells():
        about = {**spec.columns(cell), "cell": spec.key(cell, _CONTEXT), "context": _CONTEXT, "attempt": 1}
        keys = ("image", "arm", "disk", "rate_mbit", "rtt_ms", "repeat")
        found = [row for row in rows if all(row[key] == about[key] for key in keys)]
        store.append([{**about, **row} for row in found])
    return _declared(directory, spec)


def store_grid(directory: Path, spec: Spec, values: dict[str, float]) -> Path:
    """Keep rows with these values as if the grid had been measured in ``directory``."""
    store = RowStore(directory)
    about = {"context": _CONTEXT, "attempt": 1, "kind": spec.kind, "quiet": True, "environment": "e"}
    numbers = {**dict.fromkeys((metric.key for metric in KINDS[spec.kind].metrics), 1.0), **values}
    store.append(
        {**about, **spec.columns(cell), "cell": spec.key(cell, _CONTEXT), **numbers} for cell in spec.cells()
    )
    return _declared(directory, spec)


def _declared(directory: Path, spec: Spec) -> Path:
    (directory / "spec.json").write_text(json.dumps({**spec.declaration(), "context": _CONTEXT}))
    return directory
