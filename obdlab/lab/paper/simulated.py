"""Claims on more hosts than a machine can hold, as checks over simulated rows.

A simulated row proves nothing about machines: it says what follows from links, round trips and queues. So these
claims have verdicts of their own, and their confidence says whether the model was fitted to measured starts.
"""

from __future__ import annotations

import json
from functools import lru_cache
from statistics import median
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.lab.kinds.fitted import fit_swarm
from obdlab.lab.paper import questions as q
from obdlab.lab.paper.claim import Check, Claim
from obdlab.lab.paper.results import LEAST, samples
from obdlab.lab.paper.verdicts import Outcome, Verdict
from obdlab.peers.simulator.requests import SHAPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.lab.paper.results import Results
    from obdlab.lab.run.rows import Row
    from obdlab.peers.simulator.fitting import Fit

#: Bounds, in seconds or as ratios: those of the papers, or a factor of two about them.
ALL_READY_S, GAP_S, FLAT = 4.0, 2.0, 1.25
HYPER_HOSTS, BURST_HOSTS, FUNCTIONS_S = 100_000, 128, 8.3
ROOTED, ON_DEMAND, SPREAD_S, RECOVERY = (2.0, 4.0), (2.5, 10.0), 3.0, 2.0
IN_OF_OUT = (0.4, 0.6)
# Slow requests in the last seconds of a burst are those of a system that has not recovered.
_LAST_S = 1.0


def basis(fit: Fit | None) -> str:
    """Return the words for the trust in simulated numbers: the model's error at hosts that it was not fitted to."""
    if fit is None or fit.error is None:
        return "simulated, not fitted to a swarm"
    most = max(each.hosts for each in fit.fitted)
    asked = " and ".join(str(hosts) for hosts in sorted({each.hosts for each in fit.asked}))
    return f"simulated; the model, fitted to {most} emulated hosts, is wrong by at most {fit.error:.0%} at {asked}"


def fit_of(results: Results) -> Fit | None:
    """Return the model fitted to the swarm's rows, as far as the links decided their times; None without enough."""
    rows = [row for row in results.rows(q.SWARM, caches="cold") if row["links_decide"]]
    options = results.options(q.SWARM)
    if not rows or not options:
        return None
    keys = ("topology", "hosts", "median_s")
    return _fitted(json.dumps([{key: row[key] for key in keys} for row in rows]), json.dumps(options))


# A ledger asks once for each claim, and a fit takes some seconds.
@lru_cache(4)
def _fitted(rows: str, options: str) -> Fit | None:
    try:
        return fit_swarm(json.loads(rows), json.loads(options))
    except ObdlabError:
        return None


def _outcome(results: Results, run: q.Run, used: Sequence[Row], holds: bool | None, words: str) -> Outcome:
    seeds = len({row["repeat"] for row in used})
    verdict = Verdict.SIMULATED if holds else Verdict.SIMULATED_NOT
    if holds is None or seeds < LEAST:
        verdict = Verdict.UNCLEAR
    return Outcome(verdict, words, "", f"{basis(fit_of(results))}; {seeds} seeds", (run,), len(used))


def _middle(rows: Sequence[Row], key: str) -> float:
    return median(samples(rows, key))


def _ready(results: Results) -> Outcome:
    found = {
        (topology, caches): results.rows(
            q.SCALE, topology=topology, caches=caches, hosts=1000, containers=10.0, arity=2, shape="once"
        )
        for topology, caches in (("rooted", "cold"), ("rooted", "warm"), ("direct", "cold"))
    }
    cold, warm, control = found.values()
    if not cold:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.SCALE,))
    slowest = max(samples(cold, "all_ready_s"))
    words = f"all ready {slowest:.2f} s after the first start, in the worst case"
    words += f" (all local: {max(samples(warm, 'all_ready_s')):.2f} s)" if warm else ""
    words += f"; without peers {_middle(control, 'all_ready_s'):.1f} s" if control else ""
    return _outcome(results, q.SCALE, cold, slowest < ALL_READY_S, words)


def _gap(results: Results) -> Outcome:
    cold, warm = (
        results.rows(q.SCALE, topology="rooted", caches=caches, hosts=1000, containers=10.0)
        for caches in ("cold", "warm")
    )
    if not cold or not warm:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.SCALE,))
    gap = max(samples(cold, "median_s")) - min(samples(warm, "median_s"))
    words = f"a cold start takes at most {gap:.2f} s more (half of the starts)"
    return _outcome(results, q.SCALE, [*cold, *warm], gap <= GAP_S, words)


def _flat(results: Results) -> Outcome:
    rows = results.rows(q.HYPER, topology="rooted", caches="cold", shape="once")
    hosts = sorted({int(row["hosts"]) for row in rows})
    if len(hosts) < 2:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.HYPER,))
    growth = {
        arity: _middle([row for row in rows if (row["arity"], row["hosts"]) == (arity, hosts[-1])], "slowest_s")
        / _middle([row for row in rows if (row["arity"], row["hosts"]) == (arity, hosts[0])], "slowest_s")
        for arity in sorted({row["arity"] for row in rows})
        if {hosts[0], hosts[-1]} <= {row["hosts"] for row in rows if row["arity"] == arity}
    }
    if not growth:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.HYPER,))
    words = (
        f"the slowest start of {hosts[-1]:,} hosts takes {min(growth.values()):.2f} to {max(growth.values()):.2f} "
    )
    words += f"times as long as that of {hosts[0]:,}, at {min(growth)} to {max(growth)} children"
    holds = max(growth.values()) <= FLAT
    # Fewer hosts can refute the claim, not prove it.
    most = [row for row in rows if row["hosts"] == hosts[-1]]
    return _outcome(results, q.HYPER, most, None if holds and hosts[-1] < HYPER_HOSTS else holds, words)


def _faasnet(results: Results, topology: str) -> list[Row]:
    return results.rows(q.FAASNET, topology=topology, hosts=BURST_HOSTS, caches="cold", shape="once")


def _against(topology: str, words: str, bounds: tuple[float, float]) -> Check:
    def check(results: Results) -> Outcome:
        ours, theirs = _faasnet(results, "balanced"), _faasnet(results, topology)
        if not ours or not theirs:
            return Outcome(Verdict.NOT_MEASURED, runs=(q.FAASNET,))
        ratio = _middle(theirs, "median_s") / _middle(ours, "median_s")
        told = f"{words}: {_middle(theirs, 'median_s'):.2f} s against {_middle(ours, 'median_s'):.2f} s ({ratio:.2f})"
        return _outcome(results, q.FAASNET, [*ours, *theirs], bounds[0] <= ratio <= bounds[1], told)

    return check


def _spread(results: Results) -> Outcome:
    rows = _faasnet(results, "balanced")
    if not rows:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.FAASNET,))
    widest = max(samples(rows, "spread_s"))
    return _outcome(results, q.FAASNET, rows, widest < SPREAD_S, f"first and last are at most {widest:.2f} s apart")


def _peak(results: Results) -> Outcome:
    rows = [row for row in _faasnet(results, "balanced") if row.get("peak_sent_mb_s")]
    if not rows:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.FAASNET,))
    came, went = _middle(rows, "peak_received_mb_s"), _middle(rows, "peak_sent_mb_s")
    words = f"in its busiest second a host gets at most {came:.0f} MB/s and sends at most {went:.0f} MB/s"
    holds = IN_OF_OUT[0] <= came / went <= IN_OF_OUT[1]
    return _outcome(results, q.FAASNET, rows, holds, f"{words} ({came / went:.2f})")


def _functions(results: Results) -> Outcome:
    rows = results.rows(q.FUNCTIONS, topology="balanced", hosts=1000, containers=2.5)
    if not rows:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.FUNCTIONS,))
    slowest = max(samples(rows, "all_ready_s"))
    return _outcome(results, q.FUNCTIONS, rows, slowest <= FUNCTIONS_S, f"all ready after at most {slowest:.2f} s")


def _bursts(results: Results) -> Outcome:
    ours, theirs = (results.rows(q.BURSTS, topology=name, shape="iot") for name in ("balanced", "direct"))
    if not ours or not theirs:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.BURSTS,))
    times = [_middle(rows, "recovered_s") for rows in (theirs, ours)]
    # The last slow request is no recovery if requests ended with it: the time says only that it took no less.
    window_s = SHAPES["iot"].ends_s - SHAPES["iot"].begins_s
    is_over = [time_s > window_s - _LAST_S for time_s in times]
    told = [
        f"not within {window_s:g} s" if over else f"after {time_s:.1f} s"
        for time_s, over in zip(times, is_over, strict=True)
    ]
    holds: bool | None = times[0] >= RECOVERY * times[1]
    if is_over[0] and not holds:
        holds = None
    words = f"recovery on demand {told[0]}, by the tree {told[1]}"
    return _outcome(results, q.BURSTS, [*ours, *theirs], holds, words)


DADI: tuple[Claim, ...] = (
    Claim(
        "large-scale",
        "Fig 20",
        "many_hosts",
        "10,000 containers on 1,000 hosts start in 4 s.",
        "< 4 s",
        _ready,
        "one seed with a container that is ready 4 s after the first start or later",
    ),
    Claim(
        "large-scale-gap",
        "Fig 20",
        "many_hosts",
        "There a cold start takes 1 to 2 s more than a warm one.",
        "1 to 2 s",
        _gap,
        "a gap above 2 s; a smaller one is not the paper's either, but no reason against peers",
    ),
    Claim(
        "hyper-scale",
        "Fig 21",
        "many_hosts",
        "Projected, 100,000 do in little more.",
        "a flat projection",
        _flat,
        "the slowest start takes more than 1.25 times as long at the most hosts as at the fewest, for any arity",
    ),
)
FAASNET: tuple[Claim, ...] = (
    Claim(
        "faasnet-tree",
        "",
        "many_functions",
        "(FaaSNet, figure 14) Of 128 starts, a tree whose root is a host of the same class takes 2.8 times as long.",
        "2.8, with one limited machine as the root",
        _against("rooted", "root of the same class against none", ROOTED),
        "a ratio below 2 or above 4",
    ),
    Claim(
        "faasnet-on-demand",
        "",
        "many_functions",
        "(FaaSNet, figure 14) Of 128 starts, on demand without peers takes 5 times as long.",
        "5",
        _against("direct", "without peers against the balanced tree", ON_DEMAND),
        "a ratio below 2.5 or above 10",
    ),
    Claim(
        "faasnet-spread",
        "",
        "many_functions",
        "(FaaSNet, figure 15) The first and the last of 128 are ready 1.5 s apart.",
        "1.5 s",
        _spread,
        "3 s or more in one seed",
    ),
    Claim(
        "faasnet-peak",
        "",
        "many_functions",
        "(FaaSNet, figure 16) A host gets half as much as it sends.",
        "one half; at most 45 MB/s in",
        _peak,
        "a ratio below 0.4 or above 0.6",
    ),
    Claim(
        "faasnet-scale",
        "",
        "many_functions",
        "(FaaSNet, figure 17) 2,500 functions on 1,000 machines start within 8.3 s.",
        "5.1 to 8.3 s",
        _functions,
        "more than 8.3 s in one seed",
    ),
    Claim(
        "faasnet-bursts",
        "",
        "many_functions",
        "(FaaSNet, figures 11 to 13) After a burst, on demand needs four times as long to recover.",
        "113 s against 28 s",
        _bursts,
        "less than twice as long",
    ),
)
