"""No bytes whatever make a parser raise anything but our own errors, hang, or take memory that they do not have."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from tests.fuzz.targets import TARGETS

#: Seconds for each parser in the long run. After a change of a parser, 600 are not too many.
LONG_S = float(os.environ.get("OBDLAB_FUZZ_S", "120"))


def run(target: str, amount: str, seed: int, timeout_s: float) -> tuple[int, int]:
    command = [sys.executable, "-m", "tests.fuzz.run", target, amount, str(seed)]
    done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    inputs, refused = map(int, done.stdout.split())
    return inputs, refused


@pytest.mark.parametrize("target", TARGETS)
def test_a_few_hundred_inputs(target: str) -> None:
    inputs, refused = run(target, "400x", 1, 200)
    assert inputs == 400
    assert refused < 400, "some changes do no harm"
    assert bool(refused) == TARGETS[target].strict


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_for_minutes(target: str) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    inputs, refused = run(target, str(LONG_S), seed, 2 * LONG_S + 300)
    print(f"{target}: {inputs} inputs, {refused} refused, seed {seed}")
    assert refused < inputs
    assert bool(refused) == TARGETS[target].strict
