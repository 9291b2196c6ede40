"""Cells of an experiment on several test hosts, through Dask: each host measures whole blocks, one after another.

A block is one repeat of all cells of one bench (of starts: of one network), so that compared rows come from one
host. Hosts must be alike (code, kernel, processor, containerd), each with one worker of one thread. Start a worker as
root from the same checkout: ``dask worker tcp://SCHEDULER:8786 --nthreads 1 --no-nanny``. Every client that reaches
the scheduler can run code as the workers' user: keep Dask to networks of your own, or use its TLS.

The worker measures a block in a child process: its main thread can have a time limit, and a hanging block ends with
the process.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.command import command, install_command
from obdlab.lab.images.pins import Pins, make_pins, obtain
from obdlab.lab.paths import LabPaths
from obdlab.lab.run.measuring import CONTEXT_KEYS, RUNTIME_KEYS, Measured, failed_rows, host_facts, measure_cells
from obdlab.lab.run.spec import Cell, Spec
from obdlab.lab.testbed.process import LabError, tail

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

_CONNECT_TIMEOUT_S = 30.0
# Time for publishing images and starting the bench, added to the cells' time.
_SETUP_TIMEOUT_S = 3600.0
_WORKER = ("-c", "from obdlab.contrib.dask.experiments import serve_block; serve_block()")


class Cluster:
    """The workers of a Dask scheduler. Raises LabError if it cannot be reached or its hosts are not alike."""

    def __init__(
        self, address: str, kind: str, paths: LabPaths, connect_timeout_s: float = _CONNECT_TIMEOUT_S
    ) -> None:
        try:
            import distributed as untyped
        except ImportError as error:
            raise LabError(f"--scheduler needs Dask: {install_command('mass')}") from error
        self._distributed: Any = untyped
        try:
            self._client = self._distributed.Client(address, timeout=connect_timeout_s, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise LabError(f"{address}: no Dask scheduler: {error}") from error
        try:
            self.surroundings = self._alike(address, kind, paths)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the scheduler; workers still finish their present block."""
        self._client.close()

    def images(self, spec: Spec, pins: Pins, paths: LabPaths) -> Pins:
        """Have every host build the images that it lacks; return the pins that all hosts share.

        Raises LabError if their images differ.
        """
        demand = json.dumps({"images": spec.images(), "pins": pins, "paths": _places(paths)})
        workers = sorted(self._client.nthreads())
        futures = [self._client.submit(obtain_images, demand, workers=[at], pure=False, retries=0) for at in workers]
        found: list[Pins] = self._client.gather(futures)
        for worker, other in zip(workers[1:], found[1:], strict=True):
            for name in spec.images():
                if other[name] != found[0][name]:
                    raise LabError(
                        f"hosts are not alike: image {name} is {found[0][name]['digest']} at {workers[0]} and "
                        f"{other[name]['digest']} at {worker} (to build it again on each: "
                        f"{command('lab', 'dataset', 'build', name, '--newest')})"
                    )
        return found[0]

    def measure(self, spec: Spec, pending: Sequence[Cell], paths: LabPaths) -> Generator[Measured]:
        """Measure cells; yield them as they come.

        Each cell of a block that failed as a whole gets a row with ``error``.
        """
        grouped: dict[str, list[Cell]] = defaultdict(list)
        for cell in pending:
            grouped[json.dumps([spec.shared(cell), cell.repeat])].append(cell)
        blocks = {}
        for block in grouped.values():
            limit_s = _SETUP_TIMEOUT_S + len(block) * spec.cell_timeout_s * 2
            order = _order(spec, block, paths)
            blocks[self._client.submit(run_block, order, limit_s, pure=False, retries=0)] = block
        for future in self._distributed.as_completed(list(blocks), loop=self._client.loop):
            block = blocks[future]
            try:
                measured = future.result()
            except Exception as error:  # any kind: a worker's death raises an exception of Dask
                for number, cell in enumerate(block):
                    yield Measured(cell, failed_rows(spec, str(error)), {}, "", number)
                continue
            for one in measured:
                yield Measured(**{**one, "cell": Cell(**one["cell"])})

    def _alike(self, address: str, kind: str, paths: LabPaths) -> dict[str, Any]:
        threads = self._client.nthreads()
        if not threads:
            raise LabError(f"{address}: the scheduler has no workers")
        busy = [worker for worker, count in threads.items() if count != 1]
        if busy:
            raise LabError(f"{busy[0]}: a worker with {threads[busy[0]]} threads (wanted dask worker --nthreads 1)")
        found: dict[str, dict[str, Any]] = self._client.run(host_facts, kind, paths.work)
        first, *others = sorted(found)
        for other in others:
            for key in (*CONTEXT_KEYS, *RUNTIME_KEYS):
                if found[first].get(key) != found[other].get(key):
                    raise LabError(
                        f"hosts are not alike: {key} is {found[first].get(key)!r} at {first} and "
                        f"{found[other].get(key)!r} at {other}"
                    )
        return found[first]


def obtain_images(demand: str) -> Pins:
    """Return the pins of the images in ``demand`` (JSON of this module); build missing images."""
    told = json.loads(demand)
    images = obtain(told["images"], _paths(told["paths"]), told["pins"], lambda text: None)
    return make_pins({name: image.facts() for name, image in images.items()})


def run_block(order: str, limit_s: float) -> list[dict[str, Any]]:
    """Measure a block (``order``, JSON of this module) in a child process; return its results.

    Raises LabError with the process's last output if it fails or takes longer than ``limit_s``.
    """
    try:
        done = subprocess.run(
            [sys.executable, *_WORKER], input=order, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{platform.node()}: a block was not done after {limit_s:g} s") from error
    if done.returncode != 0:
        raise LabError(f"{platform.node()}: a block failed\n{tail(done.stderr)}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def serve_block() -> None:
    """Measure the order from standard input; write a line of JSON for each cell."""
    order = json.load(sys.stdin)
    spec = Spec.from_values(order["spec"])
    cells = [Cell(**cell) for cell in order["cells"]]
    paths = _paths(order["paths"])

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    facts = host_facts(spec.kind, paths.work)
    for about, position, cell, rows in measure_cells(spec, cells, paths, say):
        one = Measured(cell, rows, {**facts, **about}, platform.node(), position)
        print(json.dumps(asdict(one)), flush=True)


def _order(spec: Spec, cells: Sequence[Cell], paths: LabPaths) -> str:
    values = {**spec.declaration(), "description": ""}
    return json.dumps({"spec": values, "cells": [asdict(cell) for cell in cells], "paths": _places(paths)})


def _places(paths: LabPaths) -> dict[str, Any]:
    return {
        "datasets": [str(path) for path in paths.datasets],
        "images": str(paths.images),
        "work": str(paths.work),
        "locked": paths.locked,
        "digests": dict(paths.digests),
    }


def _paths(places: dict[str, Any]) -> LabPaths:
    return LabPaths(
        tuple(map(Path, places["datasets"])),
        Path(places["images"]),
        Path(places["work"]),
        locked=places["locked"],
        digests=places["digests"],
    )
