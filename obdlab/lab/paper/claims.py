"""The paper's claims as checks over rows. The numbers are read off the plots of "DADI" (USENIX ATC'20)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from obdlab.lab.paper import questions as q
from obdlab.lab.paper.results import Results, estimate, launch_s, ratio, samples
from obdlab.lab.paper.verdicts import Outcome, Verdict, confidence, of_number, of_ratio
from obdlab.lab.run.statistics import median_interval, ratio_interval

Check = Callable[[Results], Outcome]

_BASELINE, _COLD, _TRACE, _HOT = "overlayfs", "obdlab", "obdlab-prefetch", "obdlab-hot"
_AHEAD = "ahead of overlay2 and thin LVM, most on the slow disk; no numbers"
_P2P = "needs a peer-to-peer network of hosts, which is not built yet"


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim: its figure, its statement, the paper's numbers in words, and the check."""

    key: str
    figure: str
    question: str
    says: str
    paper: str
    check: Check


def _not_yet(_: Results) -> Outcome:
    return Outcome(Verdict.NOT_YET, because=_P2P)


def _not_here(because: str) -> Check:
    return lambda _: Outcome(Verdict.NOT_RUNNABLE, because=because)


def _starts(results: Results, arm: str, start: str, disk: str) -> list[dict[str, object]]:
    return results.rows(q.START, arm=arm, start=start, disk=disk)


def _start_ratio(arm: str, start: str, disk: str, paper: str, enough: float) -> Check:
    def check(results: Results) -> Outcome:
        ours, theirs = _starts(results, arm, start, disk), _starts(results, _BASELINE, start, disk)
        found = ratio(ours, theirs, "total_s")
        return of_ratio(
            found,
            what=f"{arm} against {_BASELINE}, {start}, {disk} disk",
            paper=paper,
            below=1.0,
            enough=enough,
            used=[*ours, *theirs],
            run=q.START,
        )

    return check


def _gap_removed(arm: str, paper: str) -> Check:
    # The removed share of the extra time that a cold start takes over a warm one.
    def check(results: Results) -> Outcome:
        cold, warm = (_starts(results, _COLD, start, "native") for start in ("cold", "warm"))
        helped = _starts(results, arm, "cold", "native")
        if not (cold and warm and helped):
            return Outcome(Verdict.NOT_MEASURED, runs=(q.START,))
        # All arms have the same pull; prefetching can only help the launch.
        base = median_interval([launch_s(row) for row in warm]).median
        whole = [launch_s(row) - base for row in cold]
        used = [*cold, *warm, *helped]
        if min(whole) <= 0:
            # A share of a gap that may be nothing, or negative, says nothing.
            gap = median_interval(whole)
            found = f"no sure gap to remove: cold launches take {gap.text('+.2f')} s more than warm ones"
            return Outcome(Verdict.UNCLEAR, found, "", confidence(gap.count, used), (q.START,), len(used))
        left = ratio_interval([launch_s(row) - base for row in helped], whole)
        interval = f" [{1 - left.high:.0%}, {1 - left.low:.0%}]" if left.has_interval else ""
        told = f"{arm} removes {1 - left.median:.0%}{interval} of the gap" + (f" (paper: {paper})" if paper else "")
        verdict = Verdict.UNCLEAR
        if not left.has_interval:
            pass
        elif left.high < 1:
            verdict = Verdict.REPRODUCED if left.median <= 0.25 else Verdict.SHAPE_ONLY
        elif left.low >= 1:
            verdict = Verdict.NOT_REPRODUCED
        return Outcome(verdict, told, "", confidence(left.count, used), (q.START,), len(used))

    return check


def _pull(results: Results) -> Outcome:
    ours, theirs = (_starts(results, arm, "cold", "native") for arm in (_COLD, _BASELINE))
    found = ratio(ours, theirs, "pull_s")
    what = "pull, obdlab against overlayfs"
    return of_ratio(found, what=what, paper="0.02", below=1.0, enough=0.1, used=[*ours, *theirs], run=q.START)


def _launch(results: Results) -> Outcome:
    ours, theirs = (_starts(results, arm, "dropped", "native") for arm in (_COLD, _BASELINE))
    if not ours or not theirs:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.START,))
    found = ratio_interval([launch_s(row) for row in ours], [launch_s(row) for row in theirs])
    what = "launch with all local, obdlab against overlayfs"
    return of_ratio(
        found, what=what, paper="0.90 of medians", below=1.1, enough=1.0, used=[*ours, *theirs], run=q.START
    )


def _iops(arm: str, other: str, depth: int, what: str, least: float, paper: str) -> Check:
    def check(results: Results) -> Outcome:
        ours = results.rows(q.FIO, device=arm, iodepth=depth)
        theirs = results.rows(q.FIO, device=other, iodepth=depth)
        found = ratio(ours, theirs, "iops")
        return of_number(
            found, what=what, unit=f"(paper: {paper})", least=least, most=None, used=[*ours, *theirs], run=q.FIO
        )

    return check


def _scan(run: q.Run, disk: str, enough: float) -> Check:
    # The paper has the device ahead of everything it compares with, without numbers. Reproduced: first here as well.
    def check(results: Results) -> Outcome:
        rows = results.rows(run, start="dropped", disk=disk)
        by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in {row["arm"] for row in rows}}
        ours, theirs = by_arm.get(_COLD, []), by_arm.get(_BASELINE, [])
        found = ratio(ours, theirs, "total_s")
        what = f"obdlab against overlayfs, {disk} disk"
        outcome = of_ratio(found, what=what, paper="", below=1.0, enough=enough, used=[*ours, *theirs], run=run)
        if found is None:
            return outcome
        medians = {arm: median_interval(samples(each, "total_s")).median for arm, each in by_arm.items()}
        ranked = sorted(medians, key=lambda arm: medians[arm])
        place = ranked.index(_COLD) + 1
        told = f"{outcome.measured}; {_ordinal(place)} of {len(ranked)} ({', '.join(ranked)})"
        verdict = outcome.verdict
        if verdict is Verdict.REPRODUCED and place > 1:
            verdict = Verdict.SHAPE_ONLY
        return replace(outcome, verdict=verdict, measured=told)

    return check


def _ordinal(place: int) -> str:
    return {1: "fastest", 2: "second", 3: "third", 4: "fourth"}.get(place, f"{place}th")


def _build(results: Results) -> Outcome:
    ours, theirs = (results.rows(q.BUILD, layer=name) for name in ("obdlab-append", "overlayfs"))
    found = ratio(ours, theirs, "build_s")
    what = "write and chmod, obdlab against overlayfs"
    return of_ratio(found, what=what, paper="0.6 to 0.8", below=1.0, enough=0.8, used=[*ours, *theirs], run=q.BUILD)


def _index_size(results: Results) -> Outcome:
    rows = results.rows(q.CONVERSION, algorithm="lz4")
    sizes = samples(rows, "segments")
    if not sizes:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.CONVERSION,))
    most = max(sizes)
    told = f"{most:.0f} segments in the largest index, {most * 16 / 1000:.1f} kB"
    verdict = Verdict.REPRODUCED if most <= 4500 else Verdict.NOT_REPRODUCED
    return Outcome(
        verdict, told, "", f"exact; {len({row['image'] for row in rows})} images", (q.CONVERSION,), len(rows)
    )


def _lookups(key: str, what: str) -> Check:
    def check(results: Results) -> Outcome:
        rows = [row for row in results.rows(q.INDEX) if row.get("segments") == 4500]
        found = estimate(rows, key)
        if found is not None and key == "lookup_us":
            found = median_interval([1 / value for value in samples(rows, key)])
        return of_number(found, what=what, unit="M/s (paper: > 6)", least=6.0, most=None, used=rows, run=q.INDEX)

    return check


def _size(results: Results) -> Outcome:
    rows = results.rows(q.CONVERSION, algorithm="lz4")
    found = estimate(rows, "of_source")
    what = "size of lz4 layers against the gzip layers they were made from"
    return of_number(found, what=what, unit="(paper: 1.66)", least=1.0, most=2.0, used=rows, run=q.CONVERSION)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "index-size",
        "Fig 6",
        "index",
        "The merged index of an image is small: at most 4,500 segments.",
        "at most 4,500 segments, 72 kB (16 bytes each), over 205 applications",
        _index_size,
    ),
    Claim(
        "index-lookups",
        "Fig 7",
        "index",
        "One core looks up more than 6 million ranges a second in 4,500 segments.",
        "> 6 M/s",
        _lookups("batch_m_s", "lookups in batches"),
    ),
    Claim(
        "index-lookups-single",
        "Fig 7",
        "index",
        "The same, one lookup at a time.",
        "> 6 M/s",
        _lookups("lookup_us", "lookups one at a time"),
    ),
    Claim(
        "cold-start",
        "Fig 14",
        "cold_start",
        "A cold start is much faster than pulling and unpacking first.",
        "2.15 s against 11.06 s (0.19)",
        _start_ratio(_COLD, "cold", "native", "0.19", 0.39),
    ),
    Claim("cold-start-p2p", "Fig 14", "cold_start", "From peers faster still.", "0.62 s", _not_yet),
    Claim(
        "cold-start-crfs",
        "Fig 14",
        "cold_start",
        "Lazy loading by files (CRFS) is slower than a full pull.",
        "18.9 s against 11.06 s",
        _not_here("CRFS is not maintained; its successor is measured as stargz in experiments/peers.toml"),
    ),
    Claim(
        "cold-start-slacker",
        "Fig 14",
        "cold_start",
        "Slacker (LVM over NFS) lies between.",
        "3.81 s",
        _not_here("Slacker's storage is not public; the paper rebuilt it with LVM over NFS"),
    ),
    Claim(
        "warm-start-fast",
        "Fig 15",
        "warm_start",
        "With all local on a fast disk a start is 15 to 25 % faster.",
        "0.43 s against 0.49 s (0.88)",
        _start_ratio(_COLD, "dropped", "native", "0.88", 0.9),
    ),
    Claim(
        "warm-start-slow",
        "Fig 15",
        "warm_start",
        "On a slow disk it is more than twice as fast, as less is read.",
        "0.75 s against 2.12 s (0.35)",
        _start_ratio(_COLD, "dropped", "cloud", "0.35", 0.5),
    ),
    Claim(
        "warm-start-lvm",
        "Fig 15",
        "warm_start",
        "Faster than thin LVM as well.",
        "0.43 s against 0.55 s; 0.75 s against 1.97 s",
        _not_here("device mapper's thin pool is not in this comparison"),
    ),
    Claim(
        "trace",
        "Fig 16",
        "trace_prefetch",
        "Replaying a trace removes 95 % of what a cold start takes more than a warm one.",
        "2.14 s to 0.51 s, warm 0.43 s",
        _gap_removed(_TRACE, "95%"),
    ),
    Claim(
        "hot-layer",
        "",
        "trace_prefetch",
        "(obdlab's own) A hot layer does the same by one request.",
        "not in the paper",
        _gap_removed(_HOT, ""),
    ),
    Claim("batch-start", "Fig 17", "", "Starts stay flat from 1 to 32 hosts.", "0.7 s on 3 to 39 hosts", _not_yet),
    Claim(
        "pull",
        "Fig 18",
        "pull_time",
        "Pulling becomes fetching metadata only.",
        "median 0.4 s against 23 s (0.02)",
        _pull,
    ),
    Claim(
        "launch",
        "Fig 19",
        "launch_shape",
        "Loading on demand does not make the launch slower.",
        "all within 0.42 to 0.50 of the axis, against 0.46 to 0.84",
        _launch,
    ),
    Claim("large-scale", "Fig 20", "", "10,000 containers on 1,000 hosts start in 4 s.", "< 4 s", _not_yet),
    Claim("hyper-scale", "Fig 21", "", "Projected, 100,000 do in little more.", "a flat projection", _not_yet),
    Claim(
        "read-depth-1",
        "Fig 22",
        "random_read",
        "At queue depth 1 the device is as fast as LVM.",
        "equal",
        _iops("obdlab-raw", "loop", 1, "uncompressed against a loop device, depth 1", 0.9, "1"),
    ),
    Claim(
        "read-depth-128",
        "Fig 22",
        "random_read",
        "At queue depth 128 the uncompressed device is the fastest.",
        "about 120,000 reads/s",
        _iops("obdlab-raw", "loop", 128, "uncompressed against a loop device, depth 128", 1.0, "> 1"),
    ),
    Claim(
        "read-compressed",
        "Fig 22",
        "random_read",
        "At low queue depths compression makes reading 10 to 20 % faster.",
        "1.1 to 1.2 of uncompressed",
        _iops("obdlab-lz4", "obdlab-raw", 1, "lz4 against uncompressed, depth 1", 1.05, "1.1 to 1.2"),
    ),
    Claim("du-fast", "Fig 23", "scan_du", "du is fastest on obdlab.", _AHEAD, _scan(q.DU, "native", 0.9)),
    Claim(
        "du-slow",
        "Fig 23",
        "scan_du",
        "du is fastest on a slow disk, and by more.",
        _AHEAD,
        _scan(q.DU, "cloud", 0.7),
    ),
    Claim("tar-fast", "Fig 24", "scan_tar", "tar is fastest on obdlab.", _AHEAD, _scan(q.TAR, "native", 0.9)),
    Claim(
        "tar-slow",
        "Fig 24",
        "scan_tar",
        "tar is fastest on a slow disk, and by more.",
        _AHEAD,
        _scan(q.TAR, "cloud", 0.7),
    ),
    Claim(
        "build",
        "Fig 25",
        "image_build",
        "Building an image is 20 to 40 % faster, commit left out.",
        "0.6 to 0.8 of overlay2's time",
        _build,
    ),
    Claim(
        "size",
        "text",
        "conversion",
        "Layers are larger than gzip's, by what random access costs.",
        "274 MB against 165 MB (1.66)",
        _size,
    ),
)
