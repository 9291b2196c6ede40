"""Writable devices against a model: see :mod:`tests.devices.torture`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.devices.torture import OPERATIONS, Operation, Torture, WrongBytesError, operations, shrink, torture
from tests.layers.uppers import KINDS

SEEDS = range(1, 9)


@pytest.mark.kernel
@pytest.mark.parametrize(("kind", "lowers"), [("append", True), ("sparse", False)])
def test_a_little(tmp_path: Path, kind: str, lowers: bool) -> None:
    torture(tmp_path, kind, lowers=lowers, seed=1029, count=25)


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lowers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_much(tmp_path: Path, kind: str, lowers: bool, seed: int) -> None:
    torture(tmp_path, kind, lowers=lowers, seed=seed, count=300)


def test_all_kinds_of_operations_come() -> None:
    assert {operation.name for operation in operations(1029, 25)} >= set(OPERATIONS) - {"kill_while_collecting"}
    assert {operation.name for seed in SEEDS for operation in operations(seed, 300)} == set(OPERATIONS)
    assert operations(3, 50) == operations(3, 50)


class Spoiled(Torture):
    """Somebody changes a sector behind the device's back, in the model to be precise."""

    def flush(self, operation: Operation) -> None:
        self.model[operation.offset] ^= 1


@pytest.mark.kernel
def test_a_wrong_byte_is_found(tmp_path: Path) -> None:
    todo = [Operation("write", 0, 4096, 1), Operation("flush", 512, 0, 0), Operation("read", 0, 4096, 0)]
    with pytest.raises(WrongBytesError, match=r"^operation 2, .*: the sector at 512$"):
        Spoiled(tmp_path.resolve(), "append", lowers=False).run(todo)


def test_what_is_not_needed_to_fail_is_left_out() -> None:
    todo = operations(5, 64)
    culprits = [todo[7], todo[40]]

    def fails(some: Sequence[Operation]) -> bool:
        return [each for each in some if each in culprits] == culprits

    assert shrink(todo, fails, tries=1000) == culprits
