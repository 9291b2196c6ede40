"""The reads of a container that starts: blocks in the order of a recorded start, and the time between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from obdlab.peers.simulator.eventqueue import SimulationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Bounds of documents: a start has thousands of reads, an image thousands of such blocks.
_MOST_READS, _MOST_BLOCKS = 1_000_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Step:
    """Blocks that are read at the same time, ``think_s`` seconds after the step before has ended."""

    think_s: float
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """A start: its steps, and of each block the bytes that hosts move and the layer that it belongs to."""

    steps: tuple[Step, ...]
    sizes: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def size(self) -> int:
        """The working set: bytes that one host fetches for one start."""
        return sum(self.sizes)

    @property
    def think_s(self) -> float:
        """The time between reads, in seconds."""
        return sum(step.think_s for step in self.steps)

    def scaled(self, size: int) -> Workload:
        """Return the same reads with blocks so large, in proportion, that the working set has ``size`` bytes."""
        if size < len(self.sizes):
            raise SimulationError(f"working set: wanted at least a byte for each of {len(self.sizes)} blocks")
        factor = size / self.size
        return replace(self, sizes=tuple(max(1, round(each * factor)) for each in self.sizes))

    def stretched(self, factor: float) -> Workload:
        """Return the same reads with ``factor`` times the time between them."""
        return replace(self, steps=tuple(replace(step, think_s=step.think_s * factor) for step in self.steps))

    @classmethod
    def even(cls, blocks: int, size: int, think_s: float = 0.0) -> Workload:
        """Return a start that reads ``blocks`` blocks of ``size`` bytes of one layer, one after the other."""
        return cls(tuple(Step(think_s, (each,)) for each in range(blocks)), (size,) * blocks, (0,) * blocks)

    @classmethod
    def from_timeline(cls, document: Mapping[str, Any], block_size: int) -> Workload:
        """Return the start that ``obdlab trace timeline --json`` prints, in whole blocks of ``block_size`` bytes.

        Reads that overlapped are one step. The time in which no read waited is the program's own, and stays. Blocks
        have the stored size of the document's share. Raises SimulationError for a document of another form.
        """
        if block_size < 4096:
            raise SimulationError(f"block size: wanted at least 4096 bytes (got {block_size})")
        try:
            share = float(document["summary"]["stored_size"]) / float(document["summary"]["size"])
            reads = sorted(
                (float(read["at_ms"]), float(read["took_ms"]), int(read["offset"]), int(read["length"]), _layer(read))
                for read in document["steps"]
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise SimulationError(f"timeline: not that of a start: {error!r}") from error
        if not reads or not 0 < share <= 1 or len(reads) > _MOST_READS:
            raise SimulationError(f"timeline: wanted reads and a stored share (got {len(reads)} reads, {share:g})")
        return _in_steps(reads, block_size, max(1, round(block_size * share)))


# A layer's part of a range: the uppermost layer, as the index's last entry is.
def _layer(read: Mapping[str, Any]) -> int:
    layers = read["layers"]
    return int(layers[-1]) if layers else -1


def _in_steps(reads: Sequence[tuple[float, float, int, int, int]], block_size: int, stored: int) -> Workload:
    numbers: dict[tuple[int, int], int] = {}
    layers: dict[int, int] = {}
    waves: list[tuple[float, list[int]]] = []
    end = think = 0.0
    for at, took, offset, length, layer in reads:
        if at >= end:
            think += at - end
            waves.append((think, []))
        end = max(end, at + took)
        if offset < 0 or length < 0 or length > block_size * _MOST_BLOCKS:
            raise SimulationError(f"timeline: a read of {length} bytes at {offset}")
        if layer < 0:
            continue  # of no layer: zeros, which nothing stores
        for block in range(offset // block_size, (offset + length - 1) // block_size + 1):
            key = (layers.setdefault(layer, len(layers)), block)
            if key not in numbers:
                numbers[key] = len(numbers)
                waves[-1][1].append(numbers[key])
                think = 0.0
                if len(numbers) > _MOST_BLOCKS:
                    raise SimulationError(f"timeline: more than {_MOST_BLOCKS} blocks")
    steps = tuple(Step(wait / 1e3, tuple(blocks)) for wait, blocks in waves if blocks)
    if not steps:
        raise SimulationError("timeline: no read of any layer")
    return Workload(steps, (stored,) * len(numbers), tuple(layer for layer, _ in numbers))
