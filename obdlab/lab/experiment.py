"""A declared experiment and its results directory: run what is not measured yet, read what is.

The measuring itself is in ``bench``; this module decides what to measure, keeps rows and says how far it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

import obdlab
from obdlab.lab import environment
from obdlab.lab.bench import Bench, LabPaths
from obdlab.lab.rows import Row, RowStore
from obdlab.lab.spec import Cell, Spec

#: What of the environment makes older rows incomparable. Load, free memory and the like may differ.
CONTEXT_KEYS = ("kernel", "cpu_model", "cores", "code", "containerd", "runc", "registry")


class Experiment:
    """One spec with its results directory."""

    def __init__(self, spec: Spec, directory: Path, paths: LabPaths | None = None) -> None:
        self.spec = spec
        self.store = RowStore(directory)
        self._paths = paths or LabPaths()

    def run(self, *, again: bool = False) -> int:
        """Measure every cell that has no good row under today's code and host; return how many were measured.

        ``again`` measures everything anew and keeps the old rows. Needs root. A start that fails leaves a row with
        ``error`` and the run goes on; a stop (Ctrl-C) leaves every finished cell's rows and nothing running.
        """
        surroundings = {**environment.capture(), "code": code_digest()}
        context = context_of(surroundings, str(time.time_ns()) if again else "")
        done = self.store.done_keys()
        pending = {
            network: [cell for cell in self.spec.cells(*network) if cell.key(context) not in done]
            for network in self.spec.networks()
        }
        count = sum(map(len, pending.values()))
        if count == 0:
            return 0
        (self.store.directory / "spec.json").write_text(json.dumps(asdict(self.spec), indent=1) + "\n")
        with tqdm(total=count, unit="start", desc=self.spec.name) as bar:
            for network, cells in pending.items():
                if cells:
                    self._run_network(network, cells, surroundings, context, bar)
        self.store.write_csv()
        return count

    def _run_network(
        self, network: tuple[float, float], cells: list[Cell], surroundings: dict[str, Any], context: str, bar: Any
    ) -> None:
        with Bench(self.spec, network, self._paths, bar.set_description_str) as bench:
            environment_id = self.store.add_environment({**surroundings, **bench.environment()})
            for position, cell in enumerate(cells):
                bar.set_description_str(f"{cell.image} {cell.arm} #{cell.repeat + 1}")
                common = {
                    **asdict(cell),
                    "cell": cell.key(context),
                    "context": context,
                    "environment": environment_id,
                    "position": position,
                    "seed": self.spec.seed,
                    "label": "measured",
                }
                self.store.append([{**common, **row} for row in bench.measure(cell)])
                bar.update()

    def rows(self) -> list[Row]:
        """Return the rows of this spec's cells that were measured last under one code and host."""
        rows = self.store.rows()
        wanted = {
            (cell.image, cell.arm, cell.rate_mbit, cell.rtt_ms, cell.algorithm, cell.block_size, cell.repeat)
            for network in self.spec.networks()
            for cell in self.spec.cells(*network)
        }
        mine = [
            row
            for row in rows
            if (
                row["image"],
                row["arm"],
                row["rate_mbit"],
                row["rtt_ms"],
                row["algorithm"],
                row["block_size"],
                row["repeat"],
            )
            in wanted
        ]
        latest = mine[-1]["context"] if mine else None
        return [row for row in mine if row["context"] == latest]

    def environments(self) -> list[dict[str, Any]]:
        """Return the environments that :meth:`rows` were measured in."""
        used = {row["environment"] for row in self.rows()}
        return [value for key, value in self.store.environments().items() if key in used]


def code_digest() -> str:
    """Return a digest of the package's own sources: a commit that changes only texts leaves rows comparable."""
    package = Path(obdlab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def context_of(surroundings: dict[str, Any], nonce: str = "") -> str:
    """Return the identity of code and host under which rows can be compared."""
    stable = {key: surroundings.get(key) for key in CONTEXT_KEYS}
    return hashlib.sha256((json.dumps(stable, sort_keys=True) + nonce).encode()).hexdigest()[:12]
