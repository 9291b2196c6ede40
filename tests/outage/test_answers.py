"""Each bad answer, to an image read in process: what the table promises, never a wrong byte."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.image.open import open_image
from tests.outage import lab as bench
from tests.outage.cases import CASES, DEADLINE_S, DRIP_S, SLACK_S, Case
from tests.outage.lab import Lab, Pieces

pytestmark = pytest.mark.registry

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_once(lab: Lab, tmp_path: Path, pieces: Pieces, case: Case) -> None:
    with open_image(lab.config, replace(bench.patient(tmp_path), read_deadline_s=case.patience_s)) as image:
        before = lab.proxy.injected[case.name]
        lab.proxy.next(case, case.times)
        if case.once is None:
            started = time.monotonic()
            bench.assert_right(image, pieces)
            assert case.patience_s <= DRIP_S or time.monotonic() - started < DRIP_S
        else:
            error, _ = bench.read_until_failure(image, pieces)
            bench.assert_is(error, case.once)
        # What is fetched ahead may have met the second one.
        assert lab.proxy.injected[case.name] - before >= (case.times if case.once is None else 1)
        lab.proxy.good()
        bench.assert_right(image, pieces)


@each_case
def test_as_long_as_it_lasts(lab: Lab, tmp_path: Path, pieces: Pieces, case: Case) -> None:
    with bench.opened(lab.config, bench.impatient(tmp_path)) as image:
        before = lab.proxy.injected[case.name]
        lab.proxy.always(case)
        if case.lasts is None:
            bench.assert_right(image, pieces)
        else:
            error, took_s = bench.read_until_failure(image, pieces)
            bench.assert_is(error, case.lasts)
            assert any(lower.digest in str(error) for lower in lab.config.lowers)
            assert "at offset" in str(error)
            assert took_s < DEADLINE_S + SLACK_S
        assert lab.proxy.injected[case.name] > before
        lab.proxy.good()
        # Nothing wrong was kept: neither in the cache nor in the image that saw it.
        with open_image(lab.config, bench.patient(tmp_path)) as again:
            bench.assert_right(again, pieces)
        bench.assert_right_again(image, pieces)
