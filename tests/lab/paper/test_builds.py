"""Claims on whole builds: the worst of all numbers and sizes of new layers decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from obdlab.lab.paper.claims import CLAIMS
from obdlab.lab.paper.verdicts import Verdict
from obdlab.lab.run.rows import Row
from tests.lab.paper.rows import Given

BY_KEY = {claim.key: claim for claim in CLAIMS}


def _thrice(**values: Any) -> list[Row]:
    return [{"quiet": True, **values} for _ in range(3)]


def _verdict(root: Path, key: str, run: str, rows: list[Row]) -> tuple[Verdict, str]:
    outcome = BY_KEY[key].check(Given(root, {run: rows}))
    return outcome.verdict, outcome.measured


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (0.5, Verdict.REPRODUCED),
        (0.51, Verdict.SHAPE_ONLY),
        (0.99, Verdict.SHAPE_ONLY),
        (1.0, Verdict.NOT_REPRODUCED),
    ],
)
def test_a_whole_build_takes_half_of_dockers_time(tmp_path: Path, ratio: float, verdict: Verdict) -> None:
    rows = _thrice(new="1x400", builder="docker", total_s=10.0) + _thrice(new="1x400", builder="obdlab", total_s=1.0)
    rows += _thrice(new="10x25", builder="docker", total_s=1.0) + _thrice(
        new="10x25", builder="obdlab", total_s=ratio
    )
    found, told = _verdict(tmp_path, "build-whole", "lazy_build", rows)
    assert found is verdict
    assert told.startswith("pull, build and push of 10x25 MB, obdlab against docker: ")


@pytest.mark.parametrize(("share", "verdict"), [(0.05, Verdict.REPRODUCED), (0.051, Verdict.NOT_REPRODUCED)])
def test_a_build_reads_little_of_its_base(tmp_path: Path, share: float, verdict: Verdict) -> None:
    rows = _thrice(new="1x400", builder="docker", base_share=1.0)
    rows += _thrice(new="1x400", builder="obdlab", base_share=0.01)
    rows += _thrice(new="4x100", builder="obdlab", base_share=share)
    found, told = _verdict(tmp_path, "build-base-read", "lazy_build", rows)
    assert found is verdict
    assert "4x100" in told


def test_the_commit_counts(tmp_path: Path) -> None:
    rows = _thrice(layer="obdlab-append", build_s=0.5, commit_s=1.0)
    rows += _thrice(layer="overlayfs", build_s=1.0, commit_s=0.25)
    assert _verdict(tmp_path, "build", "build", rows)[0] is Verdict.REPRODUCED
    assert _verdict(tmp_path, "build-committed", "build", rows)[0] is Verdict.NOT_REPRODUCED


def test_without_docker_its_part_is_not_measured(tmp_path: Path) -> None:
    rows = _thrice(new="1x400", builder="obdlab", total_s=1.0, base_share=0.01)
    assert _verdict(tmp_path, "build-whole", "lazy_build", rows)[0] is Verdict.NOT_MEASURED
    assert _verdict(tmp_path, "build-base-read", "lazy_build", rows)[0] is Verdict.REPRODUCED
