"""Each trouble beside the answers, to an image read in process: what the table promises, never a wrong byte."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.image.open import ImageOpenError, open_image
from tests.outage import lab as bench
from tests.outage.cases import DEADLINE_S, SITUATIONS, SLACK_S, Case
from tests.outage.lab import Lab, Pieces
from tests.outage.situations import MAKING

pytestmark = pytest.mark.registry

each_situation = pytest.mark.parametrize("case", SITUATIONS, ids=lambda case: case.name)


@each_situation
def test_in_mid_reading(
    lab: Lab, tmp_path: Path, pieces: Pieces, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    cache = tmp_path / "cache"
    making = MAKING[case.name](lab, tmp_path, monkeypatch)
    settings = bench.patient(cache) if case.lasts is None else bench.impatient(cache)
    with making as situation, bench.opened(situation.config, settings) as image:
        situation.begin()
        if case.lasts is None:
            bench.assert_right(image, pieces)
        else:
            error, took_s = bench.read_until_failure(image, pieces)
            bench.assert_is(error, case.lasts)
            assert any(lower.digest in str(error) for lower in situation.config.lowers)
            assert took_s < DEADLINE_S + SLACK_S
        assert situation.happened()
        situation.end()
        with open_image(situation.config, bench.patient(cache)) as patient:
            bench.assert_right(patient, pieces)
        bench.assert_right_again(image, pieces)


@each_situation
def test_at_opening(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    if case.lasts is None:
        pytest.skip("nothing fails")
    settings = replace(bench.impatient(tmp_path / "cache"), open_deadline_s=DEADLINE_S)
    with MAKING[case.name](lab, tmp_path, monkeypatch) as situation:
        situation.begin()
        started = time.monotonic()
        with pytest.raises(ImageOpenError, match="cannot open lower") as caught:
            open_image(situation.config, settings)
        assert case.lasts.says in str(caught.value)
        assert time.monotonic() - started < DEADLINE_S + SLACK_S
        situation.end()
        open_image(situation.config, bench.patient(tmp_path / "cache")).close()
