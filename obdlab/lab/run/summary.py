"""From raw rows to the reader's table: the fastest arms, their lead, and where time and bytes went."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from obdlab.lab.baselines import ADAPTERS
from obdlab.lab.run.rows import AA_SUFFIX, newest_code, one_per_attempt, told_apart
from obdlab.lab.run.statistics import (
    Estimate,
    cliffs_delta,
    holm,
    median_interval,
    outliers,
    ratio_interval,
    shift_interval,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from obdlab.lab.run.rows import Row

PHASES = ("pull_s", "create_s", "start_s", "ready_s")

HEADER = (
    "image",
    "network",
    "start",
    "arm",
    "total s [95% CI] (range)",
    "vs baseline",
    "pull",
    "create",
    "start phase",
    "ready",
    "MB",
    "requests",
    "waits",
    "CPU s",
    "PSS MB",
    "disk MB",
    "δ",
)

#: With fewer starts than this an interval says nothing.
LEAST_STARTS = 3

_CELL = ("image", "rate_mbit", "rtt_ms", "disk", "start", "arm", "settings", "pause_s")
#: image, rate, round trip, disk, start: equal for all compared arms.
Place = tuple[str, float, float, str, str]


@dataclass(frozen=True, slots=True)
class Summary:
    """One arm under one network, cold or warm. Times in seconds, sizes in bytes."""

    image: str
    rate_mbit: float
    rtt_ms: float
    disk: str
    start: str
    arm: str
    total_s: Estimate
    #: Ratio of totals to the baseline arm in the same repeats and conditions; None for the baseline itself.
    ratio: Estimate | None
    #: Median of each phase, in the order of PHASES.
    phases_s: tuple[float, ...]
    bytes_received: float
    requests: float
    #: Successive round trips (``obdlab.lab.testbed.registry.Traffic.round_trip_waits``).
    round_trip_waits: float = 0.0
    cpu_s: float = 0.0
    #: Memory of containerd, snapshotter and device servers.
    pss_bytes: float = 0.0
    #: Bytes on disk of containerd, the snapshotters and the block cache.
    disk_bytes: float = 0.0
    #: Shift above the baseline (Hodges-Lehmann), then Cliff's delta; None for the baseline.
    shift_s: Estimate | None = None
    delta: float | None = None
    #: The arm's image holds a recorded start and the baseline's does not, or the reverse.
    mixed: bool = False

    @property
    def place(self) -> Place:
        """The conditions that this summary shares with those it is compared with."""
        return (self.image, self.rate_mbit, self.rtt_ms, self.disk, self.start)


def summarise(rows: Iterable[Row], baseline: str = "overlayfs") -> list[Summary]:
    """Group good rows by image, network, disk, start and arm; the starts of one attempt are one sample.

    Of an arm measured again by other code the newest rows count. Raises ValueError without good rows.
    """
    groups: dict[tuple[Place, str], list[Row]] = defaultdict(list)
    for row in one_per_attempt(_comparable(rows)):
        place = (row["image"], row["rate_mbit"], row["rtt_ms"], row.get("disk", "native"), row["start"])
        groups[place, row["arm"]].append(row)
    if not groups:
        raise ValueError("no good row to summarise")
    return [
        replace(
            _summary(place, arm, groups[place, arm], groups.get((place, baseline)) if arm != baseline else None),
            mixed=_is_recorded(arm) != _is_recorded(baseline) and AA_SUFFIX not in arm,
        )
        for place, arm in sorted(groups, key=lambda key: (key[0], key[1] != baseline, key[1]))
    ]


def _comparable(rows: Iterable[Row]) -> list[Row]:
    return newest_code((row for row in told_apart(rows) if not row.get("error")), *_CELL)


def noise_floor(summaries: Iterable[Summary]) -> float | None:
    """Return the largest |ratio - 1| between two identical arms; None without an A/A arm."""
    ratios = [s.ratio for s in summaries if s.arm.endswith(AA_SUFFIX) and s.ratio is not None]
    return max((abs(ratio.median - 1) for ratio in ratios), default=None)


def caveats(rows: Sequence[Row]) -> list[str]:
    """Return sentences about failed starts, starts on a busy host and other reasons for caution."""
    sentences = [
        f"Left out: {row['image']} {row['arm']} #{row['repeat'] + 1} failed when {row['start']}: {row['error']}"
        for row in rows
        if row.get("error")
    ]
    known = [row for row in rows if "quiet" in row]
    busy = [row for row in known if not row["quiet"]]
    if busy:
        # The load at a later start of an attempt comes from the attempt itself; that at a cold start is the host's.
        worst = max(row["load_1m"] for row in [row for row in busy if row["start"] == "cold"] or busy)
        limit = next((f", limit {row['load_limit']:g}" for row in busy if "load_limit" in row), "")
        sentences.append(
            f"{len(busy)} of {len(known)} starts began on a busy host (load up to {worst:.1f}{limit}): trust ratios "
            "more than seconds."
        )
    good = [row for row in rows if not row.get("error")]
    if older := len(good) - len(_comparable(rows)):
        sentences.append(f"{older} starts of other code or another host are left out: the same was measured later.")
    asked = [row for row in rows if row["start"] == "dropped" and row.get("requests")]
    if asked:
        most = max(row["bytes_received"] for row in asked)
        sentences.append(
            f"{len(asked)} starts with the page cache dropped asked the registry (for up to {most / 1e6:.1f} MB)."
        )
    again = [row for row in rows if row.get("again")]
    if again:
        sentences.append(
            f"{len(again)} warm starts are later tries: the first met blocks that no start had read, "
            "or a page cache that another program had dropped."
        )
    changed = sorted({json.dumps(row["settings"], sort_keys=True) for row in rows if row.get("settings")})
    if changed:
        sentences.append(f"With obdlab's settings changed: {', '.join(changed)}.")
    return sentences + _wild(rows)


def _wild(rows: Sequence[Row]) -> list[str]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in told_apart(rows):
        if not row.get("error"):
            keys = ("image", "rate_mbit", "rtt_ms", "disk", "start", "arm")
            groups[tuple(str(row.get(key)) for key in keys)].append(row)
    found = sum(len(outliers([row["total_s"] for row in group])) for group in groups.values())
    if not found:
        return []
    return [
        f"{found} of {sum(map(len, groups.values()))} starts are far out (three interquartile ranges); none left out."
    ]


def findings(summaries: Sequence[Summary]) -> list[str]:
    """Return a sentence for every arm that is not a baseline: faster or slower, and why."""
    baselines = {s.place: s for s in summaries if s.ratio is None}
    sure = surely_different(summaries)
    return [
        _finding(summary, summary.ratio, baselines[summary.place], (summary.place, summary.arm) in sure)
        for summary in summaries
        if summary.ratio is not None and not summary.arm.endswith(AA_SUFFIX)
    ]


def surely_different(summaries: Sequence[Summary]) -> set[tuple[Place, str]]:
    """Return place and arm of the ratios that are sure among all shown and above that of identical arms."""
    sure = _sure(summaries)
    floors = {place: noise_floor(s for s in summaries if s.place == place) for place in {s.place for s in summaries}}
    return {
        (s.place, s.arm)
        for s in summaries
        if (s.place, s.arm) in sure and s.ratio is not None and not _is_noise(s.ratio, floors[s.place])
    }


# The comparisons that stay sure among all that are shown, by place and arm.
def _sure(summaries: Sequence[Summary]) -> set[tuple[Place, str]]:
    return holm({
        (s.place, s.arm): s.ratio.p(1.0)
        for s in summaries
        if s.ratio is not None and s.ratio.count >= LEAST_STARTS and not s.arm.endswith(AA_SUFFIX)
    })  # fmt: skip


# Two identical arms differ by as much.
def _is_noise(ratio: Estimate, floor: float | None) -> bool:
    return abs(ratio.median - 1) <= (floor or 0.0)


def _verdict(ratio: Estimate, sure: bool) -> str:
    if ratio.count < LEAST_STARTS:
        return "not to be told apart (too few starts) from"
    if not sure:
        return "no different (within the noise) from"
    return "faster than" if ratio.is_below(1) else "slower than"


def _finding(summary: Summary, ratio: Estimate, base: Summary, sure: bool) -> str:
    verdict = _verdict(ratio, sure)
    sentence = (
        f"{summary.image}, {summary.start}, {_conditions(summary)}: {summary.arm} is "
        f"{verdict} {base.arm}: ready after {summary.total_s.median:.2f} s against {base.total_s.median:.2f} s "
        f"(×{_range(ratio)}"
    )
    if summary.shift_s is not None and summary.delta is not None and ratio.count >= LEAST_STARTS:
        sentence += f"; by {summary.shift_s.median:+.2f} s, Cliff's δ {summary.delta:+.2f}"
    sentence += "; recorded against unrecorded)." if summary.mixed else ")."
    if summary.start == "cold":
        sentence += (
            f" Until then it had received {summary.bytes_received / 1e6:.1f} MB in {summary.requests:.0f} requests "
            f"against {base.bytes_received / 1e6:.1f} MB in {base.requests:.0f}; {base.arm} spent "
            f"{base.phases_s[0]:.2f} s pulling and unpacking, {summary.arm} {summary.phases_s[0]:.2f} s."
        )
    return sentence


def headlines(summaries: Sequence[Summary]) -> list[str]:
    """Return one sentence for each image under its first network: how much sooner its best arm starts.

    The sentence compares cold starts and adds the warm ones. An image without cold starts has no sentence.
    """
    sentences, sure = [], _sure(summaries)
    for image in dict.fromkeys(summary.image for summary in summaries):
        cold = [s for s in summaries if s.image == image and s.start == "cold"]
        # The native disk goes before a throttled one.
        cold.sort(key=lambda s: s.disk != "native")
        first = [s for s in cold if s.place == cold[0].place]
        others = [s for s in first if s.ratio is not None and not s.arm.endswith(AA_SUFFIX)]
        base = next((s for s in first if s.ratio is None), None)
        if base is None or not others:
            continue
        best = min(others, key=lambda s: s.total_s.median)
        is_noise = best.ratio is None or _is_noise(best.ratio, noise_floor(first))
        sentences.append(_headline(base, best, (best.place, best.arm) in sure and not is_noise))
        warm = {s.arm: s.total_s.median for s in summaries if s.place == (*base.place[:4], "warm")}
        if base.arm in warm and best.arm in warm:
            sentences[-1] += f" Warm: {_seconds(warm[best.arm])} against {_seconds(warm[base.arm])}."
    return sentences


def _headline(base: Summary, best: Summary, sure: bool) -> str:
    mixed = ", recorded," if best.mixed else ""
    arms = f"{_title(best.arm)}{mixed} against {_title(base.arm)}; cold, {_conditions(best)}"
    assert best.ratio is not None
    if best.ratio.count < LEAST_STARTS:
        arms += f"; {best.ratio.count} start{'s' if best.ratio.count > 1 else ''} each: too few to be sure"
    elif not sure:
        return f"{best.image} starts no sooner than the noise: {arms}."
    ours, theirs = _seconds(best.total_s.median), _seconds(base.total_s.median)
    return f"{best.image} starts in {ours} instead of {theirs} ({arms})."


def _title(arm: str) -> str:
    known = ADAPTERS.get(arm)
    return known.title if known is not None and known.title else arm


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 0.5 else f"{value:.2f} s"


_NARROW = ("start", "arm", "seconds until ready", "n", "ratio", "pull s", "MB", "requests", "CPU s")
#: Characters per line.
WIDTH = 100


def text_table(summaries: Sequence[Summary]) -> str:
    """Return the summaries as aligned text for a terminal, a block for each image and network.

    :func:`summary_records` has all columns.
    """
    lines = [_NARROW, *map(_narrow, summaries)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_NARROW))]

    def aligned(cells: Sequence[str]) -> str:
        # Words are aligned left, numbers right.
        sides = [cell.ljust(width) if column in (0, 1, 2, 4) else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(cells, widths, strict=True))]  # fmt: skip
        return "  ".join(sides).rstrip()

    text: list[str] = []
    for (image, conditions), block in groupby(summaries, key=lambda summary: (summary.image, _conditions(summary))):
        text += [f"{image}, {conditions}", aligned(_NARROW), *(aligned(_narrow(summary)) for summary in block), ""]
    return "\n".join(text[:-1])


# After a ratio between an arm whose image holds a recorded start and one without.
_MIXED = " rec"


def _is_recorded(arm: str) -> bool:
    known = ADAPTERS.get(arm)
    return known is not None and known.recorded


LEGEND = (
    "seconds until ready: median [95 % interval] (or range, of less than six) of n attempts, from before the pull "
    "until the application answers; ratio: to the first arm; (A/A): the first arm once more, what it differs by is "
    "noise; rec: an arm with a recorded start against one without; cold: nothing of the image is on this host; warm: "
    "started again; dropped: pulled, page cache empty; MB, requests: from the registry"
)


def wrapped(sentences: Iterable[str]) -> list[str]:
    """Return sentences as lines of at most WIDTH characters."""
    return [line for sentence in sentences for line in _wrap(sentence)]


def _wrap(sentence: str) -> list[str]:
    # Paths stay whole, so that they can be copied.
    return textwrap.wrap(sentence, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _narrow(summary: Summary) -> tuple[str, ...]:
    pull_s = summary.phases_s[0]
    return (
        summary.start,
        summary.arm,
        _range(summary.total_s),
        str(summary.total_s.count),
        "" if summary.ratio is None else f"{_range(summary.ratio)}{_MIXED if summary.mixed else ''}",
        f"{pull_s:.2f}" if pull_s else "",
        f"{summary.bytes_received / 1e6:.1f}" if summary.requests else "",
        f"{summary.requests:.0f}" if summary.requests else "",
        f"{summary.cpu_s:.2f}",
    )


def _summary(place: Place, arm: str, rows: list[Row], baseline: list[Row] | None) -> Summary:
    totals = [row["total_s"] for row in rows]
    others = [row["total_s"] for row in _same_repeats(rows, baseline or [])]
    return Summary(
        *place,
        arm,
        total_s=median_interval(totals),
        ratio=ratio_interval(totals, others) if others else None,
        shift_s=shift_interval(totals, others) if others else None,
        delta=cliffs_delta(totals, others) if others else None,
        phases_s=tuple(_median(rows, phase) for phase in PHASES),
        bytes_received=_median(rows, "bytes_received"),
        requests=_median(rows, "requests"),
        round_trip_waits=_median(rows, "round_trip_waits"),
        cpu_s=_median(rows, "cpu_s"),
        pss_bytes=_median(rows, "pss_bytes"),
        disk_bytes=_median(rows, "disk_bytes"),
    )


# An arm can end some repeats before the baseline, and the host's speed drifts: only the same repeats are comparable.
def _same_repeats(rows: list[Row], baseline: list[Row]) -> list[Row]:
    mine = {row.get("repeat") for row in rows}
    return [row for row in baseline if row.get("repeat") in mine] or baseline


def _median(rows: list[Row], key: str) -> float:
    # Rows of older results lack some keys.
    return median_interval([row.get(key, 0.0) for row in rows]).median


def _cells(summary: Summary) -> tuple[str, ...]:
    total = summary.total_s
    return (
        summary.image,
        _conditions(summary),
        summary.start,
        summary.arm,
        f"{_range(total)} n={total.count}",
        "" if summary.ratio is None else f"{_range(summary.ratio)}{_MIXED if summary.mixed else ''}",
        *(f"{phase:.2f}" for phase in summary.phases_s),
        f"{summary.bytes_received / 1e6:.1f}",
        f"{summary.requests:.0f}",
        f"{summary.round_trip_waits:.0f}",
        f"{summary.cpu_s:.2f}",
        f"{summary.pss_bytes / 1e6:.0f}",
        f"{summary.disk_bytes / 1e6:.0f}" if summary.disk_bytes else "",
        "" if summary.delta is None else f"{summary.delta:+.2f}",
    )


def _conditions(summary: Summary) -> str:
    disk = "" if summary.disk == "native" else f", {summary.disk} disk"
    return f"{summary.rate_mbit:g} Mbit/s, {summary.rtt_ms:g} ms{disk}"


def _range(estimate: Estimate) -> str:
    return estimate.text(".2f")


#: The meanings of HEADER's columns.
_MEANINGS = {
    "total s": "seconds from before the pull (cold) or from `ctr run` until the application answers its probe",
    "vs baseline": (
        "ratio to the first arm in the same repeats; (A/A) is that arm once more, what it differs by is noise"
    ),
    "pull, create, start phase, ready": "seconds of each phase, medians",
    "MB, requests": "what the registry was asked for until ready, by its own count",
    "waits": "round trips that followed one another",
    "CPU s, PSS MB": "processor time until ready, and memory then, of containerd, snapshotter and device servers",
    "disk MB": "on disk when ready: content store, snapshots, block cache",
    "δ": "Cliff's delta: -1 if every start was faster than every one of the first arm's, 1 if slower",
    "cold, warm, dropped": "nothing of the image on this host; started again; pulled, with the page cache empty",
}


def legend_records() -> list[dict[str, str]]:
    """Return the meaning of each column, for a data frame beside :func:`summary_records`."""
    return [{"column": column, "meaning": meaning} for column, meaning in _MEANINGS.items()]


def summary_records(summaries: Iterable[Summary]) -> list[dict[str, str]]:
    """Return the table as one dict of texts per summary, for a data frame."""
    return [dict(zip(HEADER, _cells(summary), strict=True)) for summary in summaries]


def versions_notes(environments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a sentence with the versions of all compared programs; nothing for experiments that compare none."""
    found: dict[str, dict[str, None]] = {}
    for environment in environments:
        for programs in environment.get("compared", {}).values():
            for program, version in programs.items():
                found.setdefault(program, {})[version] = None
    told = "; ".join(f"{program}: {' and '.join(versions)}" for program, versions in sorted(found.items()))
    return [f"Versions: {told}."] if told else []
