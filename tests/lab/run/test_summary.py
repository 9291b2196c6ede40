"""Summaries as a reader sees them: each sentence and each line of a table to the letter."""

from __future__ import annotations

from typing import Any

import pytest

from obdlab.lab.run.rows import Row
from obdlab.lab.run.statistics import Estimate
from obdlab.lab.run.summary import (
    HEADER,
    Summary,
    caveats,
    findings,
    headlines,
    legend_records,
    summarise,
    summary_records,
    text_table,
    versions_notes,
    wrapped,
)

BASE = "overlayfs"


def _starts(arm: str, totals: list[float], start: str = "cold", **more: Any) -> list[Row]:
    about = {"image": "redis", "rate_mbit": 100.0, "rtt_ms": 5.0, "arm": arm, "start": start}
    # 1.35 MB is on the edge of a digit: a factor that is wrong by a millionth shows.
    traffic = {"bytes_received": 1_350_000 if arm == BASE else 250_000, "requests": 7 if arm == BASE else 4}
    return [
        {
            **about,
            "pull_s": total_s / 2,
            "create_s": 0.07,
            "start_s": 0.03,
            "ready_s": total_s / 2 - 0.1,
            "total_s": total_s,
            "cpu_s": 0.25,
            "pss_bytes": 3e6,
            "disk_bytes": 5e6,
            "round_trip_waits": 2,
            **traffic,
            **more,
        }
        for total_s in totals
    ]


def _same(arm: str, total_s: float, count: int = 3, start: str = "cold", **more: Any) -> list[Row]:
    return _starts(arm, [total_s] * count, start, **more)


def test_the_table_for_a_terminal() -> None:
    rows = _same(BASE, 4.0) + _same("obdlab", 12.5, 1)
    rows += _same(BASE, 0.5, start="warm", requests=0, pull_s=0.0) + _same(
        "obdlab", 1.0, rate_mbit=50.0, disk="cloud"
    )
    assert text_table(summarise(rows)).splitlines() == [
        "redis, 50 Mbit/s, 5 ms, cloud disk",
        "start  arm        seconds until ready  n  ratio  pull s   MB  requests  CPU s",
        "cold   obdlab     1.00 (1.00 to 1.00)  3           0.50  0.2         4   0.25",
        "",
        "redis, 100 Mbit/s, 5 ms",
        "start  arm        seconds until ready  n  ratio  pull s   MB  requests  CPU s",
        "cold   overlayfs  4.00 (4.00 to 4.00)  3           2.00  1.4         7   0.25",
        "cold   obdlab     12.50                1  3.12     6.25  0.2         4   0.25",
        "warm   overlayfs  0.50 (0.50 to 0.50)  3                                 0.25",
    ]


def test_all_columns_for_a_data_frame() -> None:
    (base, ours) = summary_records(summarise(_same(BASE, 4.0) + _same("obdlab", 1.0)))
    assert tuple(base) == tuple(ours) == HEADER
    assert list(base.values())[4:] == [
        *("4.00 (4.00 to 4.00) n=3", "", "2.00", "0.07", "0.03", "1.90"),
        *("1.4", "7", "2", "0.25", "3", "5", ""),
    ]
    assert list(ours.values()) == [
        *("redis", "100 Mbit/s, 5 ms", "cold", "obdlab", "1.00 (1.00 to 1.00) n=3", "0.25 [0.25, 0.25]"),
        *("0.50", "0.07", "0.03", "0.40", "0.2", "4", "2", "0.25", "3", "5", "-1.00"),
    ]
    assert {name for each in legend_records() for name in each["column"].split(", ")} >= {"MB", "waits", "δ", "cold"}


def test_a_summary_without_more_has_zeros() -> None:
    least = Summary(
        "redis", 100.0, 5.0, "native", "cold", "x", Estimate(1.0, 1.0, 1.0, 1), None, (0.0,) * 4, 0.0, 0.0
    )
    assert (least.round_trip_waits, least.cpu_s, least.pss_bytes, least.disk_bytes) == (0.0, 0.0, 0.0, 0.0)
    assert (least.shift_s, least.delta) == (None, None)


COLD = (
    " Until then it had received 0.2 MB in 4 requests against 1.4 MB in 7; overlayfs spent 2.00 s pulling and "
    "unpacking, obdlab {} s."
)


@pytest.mark.parametrize(
    ("count", "total_s", "text"),
    [
        (1, 1.0, "not to be told apart (too few starts) from overlayfs: ready after 1.00 s against 4.00 s (×0.25)."),
        (
            2,
            1.0,
            (
                "not to be told apart (too few starts) from overlayfs: ready after 1.00 s against 4.00 s "
                "(×0.25 [0.25, 0.25])."
            ),
        ),
        (
            3,
            1.0,
            (
                "faster than overlayfs: ready after 1.00 s against 4.00 s (×0.25 [0.25, 0.25]; by -3.00 s, Cliff's δ "
                "-1.00)."
            ),
        ),
        (
            4,
            5.0,
            (
                "slower than overlayfs: ready after 5.00 s against 4.00 s (×1.25 [1.25, 1.25]; by +1.00 s, Cliff's δ "
                "+1.00)."
            ),
        ),
    ],
)
def test_a_finding_to_the_letter(count: int, total_s: float, text: str) -> None:
    (cold,) = findings(summarise(_same(BASE, 4.0, count) + _same("obdlab", total_s, count)))
    assert cold == f"redis, cold, 100 Mbit/s, 5 ms: obdlab is {text}{COLD.format(f'{total_s / 2:.2f}')}"
    # A warm start has no sentence about traffic.
    (warm,) = findings(summarise(_same(BASE, 4.0, count, "warm") + _same("obdlab", total_s, count, "warm")))
    assert warm == f"redis, warm, 100 Mbit/s, 5 ms: obdlab is {text}"


@pytest.mark.parametrize(
    ("ours", "again", "verdict"),
    [
        # Three scattered samples are not sure.
        ([1.0, 2.0, 2.0], None, "no different (within the noise) from"),
        ([1.0, 0.5, 0.5], None, "no different (within the noise) from"),
        ([1.25, 2.0, 2.0], None, "no different (within the noise) from"),
        ([1.8, 2.0, 2.0], None, "slower than"),
        ([0.55, 0.5, 0.5], None, "faster than"),
        # As large as between identical arms is within the noise, in both directions; twice 1 is far from it.
        ([1.25] * 3, [1.25] * 3, "no different (within the noise) from"),
        ([0.75] * 3, [1.25] * 3, "no different (within the noise) from"),
        ([0.5] * 3, [1.25] * 3, "faster than"),
        ([2.0] * 3, [1.25] * 3, "slower than"),
        # The noise floor is of this place alone.
        ([1.5] * 3, [1.25] * 3, "slower than"),
    ],
)
def test_within_the_noise(ours: list[float], again: list[float] | None, verdict: str) -> None:
    rows = _same(BASE, 1.0) + _starts("obdlab", ours) + _starts(f"{BASE} (A/A)", again or [])
    elsewhere = _same(BASE, 1.0, image="other") + _same(f"{BASE} (A/A)", 9.0, image="other")
    (sentence,) = findings(summarise(rows + elsewhere))
    assert f": obdlab is {verdict} overlayfs: " in sentence
    (headline,) = headlines(summarise(rows))
    assert headline.startswith("redis starts no sooner than the noise: obdlab against a full pull with ") == (
        "noise" in verdict
    )


@pytest.mark.parametrize(
    ("count", "doubt"),
    [
        (1, "; 1 start each: too few to be sure"),
        (2, "; 2 starts each: too few to be sure"),
        (3, ""),
        (4, ""),
    ],
)
def test_a_headline_of_few_starts(count: int, doubt: str) -> None:
    (headline,) = headlines(summarise(_same(BASE, 0.5, count) + _same("obdlab", 0.494, count)))
    assert headline == (
        f"redis starts in 0.49 s instead of 0.5 s (obdlab against a full pull with overlayfs; cold, 100 Mbit/s, "
        f"5 ms{doubt})."
    )


def test_headlines_are_of_each_image_under_its_first_network() -> None:
    rows: list[Row] = []
    for image, scale in (("a", 1.0), ("b", 2.0)):
        for rate_mbit, start, disk, base, ours in (
            # A slower network and a throttled disk would give another best arm and other seconds.
            (100.0, "cold", "native", 4.0, 2.0),
            (100.0, "warm", "native", 1.0, 0.25),
            (500.0, "cold", "native", 3.0, 0.5),
            (100.0, "cold", "cloud", 9.0, 0.75),
            (100.0, "dropped", "native", 8.0, 7.0),
        ):
            place: dict[str, Any] = {"image": image, "rate_mbit": rate_mbit, "disk": disk}
            rows += _same(BASE, scale * base, start=start, **place)
            rows += _same("new-arm", scale * ours, start=start, **place)
    # An image with warm starts alone has no sentence, and one whose native disk has no cold start has the other's.
    rows += _same(BASE, 1.0, start="warm", image="c") + _same("obdlab", 0.5, start="warm", image="c")
    for start, disk in (("cold", "cloud"), ("warm", "native")):
        rows += _same(BASE, 6.0, start=start, image="d", disk=disk)
        rows += _same("obdlab", 3.0, start=start, image="d", disk=disk)
    about = "(new-arm against a full pull with overlayfs; cold, 100 Mbit/s, 5 ms)"
    assert headlines(summarise(rows)) == [
        f"a starts in 2.0 s instead of 4.0 s {about}. Warm: 0.25 s against 1.0 s.",
        f"b starts in 4.0 s instead of 8.0 s {about}. Warm: 0.5 s against 2.0 s.",
        (
            "d starts in 3.0 s instead of 6.0 s (obdlab against a full pull with overlayfs; cold, 100 Mbit/s, 5 ms, "
            "cloud disk)."
        ),
    ]
    # Without a baseline, or with nothing but the baseline twice, there is nothing to compare.
    assert headlines(summarise(_same("obdlab", 1.0))) == []
    assert headlines(summarise(_same(BASE, 1.0) + _same(f"{BASE} (A/A)", 0.5))) == []


def test_lines_have_a_hundred_characters_and_whole_words() -> None:
    first = "a" * 49
    assert wrapped([f"{first} {'b' * 50}"]) == [f"{first} {'b' * 50}"]
    assert wrapped([f"{first} {'b' * 51}"]) == [first, f"  {'b' * 51}"]
    path = f"{'c' * 40}-{'d' * 40}"
    assert wrapped([f"{first} {path}", "next"]) == [first, f"  {path}", "next"]
    assert wrapped(["e" * 120]) == ["e" * 120]


def test_reasons_for_caution_to_the_letter() -> None:
    rows = [
        {**row, "quiet": quiet, "load_1m": load, "load_limit": 1.5, "repeat": repeat}
        for repeat, (quiet, load) in enumerate([(False, 2.0), (True, 0.5), (False, 3.25)])
        for row in _same("obdlab", 1.0, 1)
    ]
    # Warm starts count as busy as well, but their load is the attempt's own. A cold one asks the registry.
    rows += _same("obdlab", 1.0, 2, "warm", quiet=False, load_1m=9.0, again=True, requests=5, bytes_received=9e6)
    for requests, received in ((3, 1.25e6), (1, 2.75e6), (0, 8e6)):
        rows += _same("obdlab", 1.0, 1, "dropped", requests=requests, bytes_received=received)
    for settings in ({"b": 1, "a": 2}, {"a": 2, "b": 1}, {"a": 1}, {}):
        rows += _same("obdlab", 1.0, 1, settings=settings)
    rows += _same("obdlab", 1.0, 1, "warm", error="no answer", repeat=1)
    assert caveats(rows) == [
        "Left out: redis obdlab #2 failed when warm: no answer",
        "4 of 5 starts began on a busy host (load up to 3.2, limit 1.5): trust ratios more than seconds.",
        "2 starts with the page cache dropped asked the registry (for up to 2.8 MB).",
        (
            "2 warm starts are later tries: the first met blocks that no start had read, or a page cache "
            "that another program had dropped."
        ),
        'With obdlab\'s settings changed: {"a": 1}, {"a": 2, "b": 1}.',
    ]
    assert caveats(_same("obdlab", 1.0, quiet=True, load_1m=0.5, load_limit=1.5)) == []


def test_a_ratio_of_a_recorded_arm_to_one_without_a_record_says_so() -> None:
    rows = _same(BASE, 4.0) + _same("obdlab", 2.0) + _same("obdlab-hot", 1.0)
    summaries = summarise(rows)
    by_arm = {line.split()[1]: line for line in text_table(summaries).splitlines()[2:]}
    assert "0.25 [0.25, 0.25] rec" in by_arm["obdlab-hot"]
    assert " rec" not in by_arm["obdlab"] + by_arm[BASE]
    assert [record["vs baseline"].endswith(" rec") for record in summary_records(summaries)] == [False, False, True]
    plain, recorded = findings(summaries)
    assert "recorded against unrecorded)." in recorded
    assert "recorded" not in plain
    # Like against like: the baseline has a record as well.
    like = summarise(_same("stargz-recorded", 4.0) + _same("obdlab-hot", 1.0), baseline="stargz-recorded")
    assert " rec" not in text_table(like)
    assert "recorded against" not in findings(like)[0]


def test_an_arm_that_ended_early_is_compared_with_the_same_repeats() -> None:
    # The host becomes slower; in the repeats of both there is no difference.
    totals = [1 + 0.1 * repeat for repeat in range(12)]
    rows = [row | {"repeat": repeat} for repeat, row in enumerate(_starts(BASE, totals, "warm"))]
    rows += [row | {"repeat": repeat} for repeat, row in enumerate(_starts("obdlab", totals[:5], "warm"))]
    base, ours = summarise(rows)
    assert (base.total_s.count, ours.total_s.count) == (12, 5)
    assert ours.ratio is not None
    assert ours.shift_s is not None
    assert (ours.ratio.median, ours.shift_s.median, ours.delta) == (1.0, 0.0, 0.0)
    # Without a common repeat there is no better baseline than all of it.
    others = [row | {"repeat": row["repeat"] + 50 * (row["arm"] == BASE)} for row in rows]
    ratio = summarise(others)[1].ratio
    assert ratio is not None
    assert ratio.median == pytest.approx(1.2 / 1.55)


def test_versions_of_all_compared_programs() -> None:
    compared = [{"compared": {"a": {"x": "1"}, "b": {"y": version}}} for version in ("2", "2", "3")]
    assert versions_notes(compared) == ["Versions: x: 1; y: 2 and 3."]
    assert versions_notes([{}]) == []
