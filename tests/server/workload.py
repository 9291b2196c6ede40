"""A guest whose every step is known: python -m tests.server.workload DIRECTORY SEED FIRST

Writes whole files anew, renames and removes them, step by step from number FIRST on, until it is killed. Each step is
on stable storage when its number is printed. What a step does follows from SEED and its number alone, so that whoever
reads the last number knows what every file holds, but for the one that the next step changes.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

SLOTS = 40
MOST = 300_000


@dataclass(frozen=True)
class Step:
    """One file gets this content, or is removed (None)."""

    slot: int
    content: bytes | None

    @classmethod
    def of(cls, seed: int, number: int) -> Step:
        rng = random.Random(f"{seed} {number}")
        slot = rng.randrange(SLOTS)
        return cls(slot, None if rng.random() < 0.15 else rng.randbytes(rng.randrange(MOST)))

    def do(self, directory: Path) -> None:
        path = directory / f"file{self.slot}"
        if self.content is None:
            path.unlink(missing_ok=True)
        else:
            fresh = directory / "fresh"
            with fresh.open("wb") as out:
                out.write(self.content)
                os.fsync(out.fileno())
            fresh.replace(path)
        sync(directory)


def sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class Expected:
    """What the files hold after a number of steps."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.done = 0
        self.files: dict[int, bytes] = {}

    def advance(self, steps: int) -> None:
        for number in range(self.done, steps):
            self._apply(Step.of(self.seed, number))
        self.done = max(self.done, steps)

    def _apply(self, step: Step) -> None:
        if step.content is None:
            self.files.pop(step.slot, None)
        else:
            self.files[step.slot] = step.content

    def check(self, directory: Path) -> None:
        """All files are as after the last step, or as after the one that was under way."""
        under_way = Step.of(self.seed, self.done)
        for slot in range(SLOTS):
            path = directory / f"file{slot}"
            found = path.read_bytes() if path.exists() else None
            if slot == under_way.slot and found == under_way.content:
                continue
            assert found == self.files.get(slot), f"{path} after {self.done} steps"


def main() -> None:
    directory, seed, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    while True:
        Step.of(seed, number).do(directory)
        number += 1
        os.write(1, b"%d\n" % number)


if __name__ == "__main__":
    main()
