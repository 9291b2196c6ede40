"""Claims on starts of many hosts, as checks over rows of a swarm in network namespaces of one machine.

Its agents, bytes and connections are real; hosts and links are emulated, as is the start, which is replayed. Rows in
which the processors were too busy are no evidence of links, and decide nothing.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from obdlab.lab.kinds.emulation import MOST_BUSY
from obdlab.lab.paper import questions as q
from obdlab.lab.paper.claim import Claim
from obdlab.lab.paper.results import LEAST, ratio, samples
from obdlab.lab.paper.verdicts import Outcome, Verdict, confidence, of_ratio
from obdlab.lab.run.statistics import ALPHA
from obdlab.lab.run.student import slope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.lab.paper.results import Results
    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.student import Normal

#: The share of one start by which starts may become longer with each doubling of the hosts.
FLAT = 0.05
#: Most bytes of the registry, in working sets, and the slowest of all hosts as a ratio to a single one.
MOST_SETS, SLOWEST = 1.2, 1.25
#: Fewer hosts can refute figure 17, not prove it.
MOST_HOSTS = 32
_PEERS, _DIRECT = "rendezvous", "direct"
_BASIS = "hosts and links emulated"


def _fair(rows: Sequence[Row]) -> tuple[list[Row], int]:
    # The rows of those numbers of hosts with which the links decided in every row, and the number of the others.
    wrong = {row["hosts"] for row in rows if not row["links_decide"]}
    fair = [row for row in rows if row["hosts"] not in wrong]
    return fair, len(rows) - len(fair)


def growth(rows: Sequence[Row]) -> Normal | None:
    """Return what a doubling of the hosts adds to a start, as a share of a start on the fewest; None without two."""
    hosts = sorted({int(row["hosts"]) for row in rows})
    if len(hosts) < 2 or len(rows) < len(hosts) + 1:
        return None
    one = median(samples([row for row in rows if row["hosts"] == hosts[0]], "median_s"))
    doublings = np.log2(np.array([float(row["hosts"]) for row in rows]))
    return slope(doublings, np.array(samples(rows, "median_s")) / one)


def _told(found: Normal) -> str:
    # Without a sign before what is rounded to 0.
    middle, low, high = (f"{round(value, 3) + 0.0:+.1%}" for value in (found.centre, *found.interval(0.95)))
    return f"{middle} [{low}, {high}]"


def _flat(results: Results) -> Outcome:
    rows, left_out = _fair(results.rows(q.SWARM, topology=_PEERS, caches="cold"))
    control, _ = _fair(results.rows(q.SWARM, topology=_DIRECT, caches="cold"))
    found, without = growth(rows), growth(control)
    if found is None:
        return _too_busy(left_out, q.SWARM)
    hosts = sorted({int(row["hosts"]) for row in rows})
    words = f"from {hosts[0]} to {hosts[-1]} hosts a doubling adds {_told(found)} of a start"
    words += f"; without peers {_told(without)}" if without is not None else ""
    words += f"; {_left_out(left_out)}" if left_out else ""
    rises = without is not None and without.interval(0.95)[0] > FLAT
    trust = f"{confidence(min(_counts(rows)), [*rows, *control])}, {_BASIS}"
    verdict, p = Verdict.UNCLEAR, max(found.p(-FLAT), found.p(FLAT))
    if abs(found.centre) > FLAT:
        p = found.p(math.copysign(FLAT, found.centre))
        verdict = Verdict.NOT_REPRODUCED if p <= ALPHA else verdict
    elif p <= ALPHA and rises and hosts[-1] >= MOST_HOSTS:
        verdict = Verdict.REPRODUCED
    return Outcome(verdict, words, "", trust, (q.SWARM,), len(rows) + len(control), p)


def _left_out(count: int) -> str:
    return f"{count} rows of numbers of hosts with processors busier than {MOST_BUSY:.0%} left out"


def _too_busy(left_out: int, run: q.Run) -> Outcome:
    if not left_out:
        return Outcome(Verdict.NOT_MEASURED, runs=(run,))
    words = f"the processors decided, not the links: {_left_out(left_out)}"
    return Outcome(Verdict.UNCLEAR, words, "", f"low, {_BASIS}", (run,), left_out)


def _counts(rows: Sequence[Row]) -> list[int]:
    return [sum(row["hosts"] == hosts for row in rows) for hosts in {row["hosts"] for row in rows}]


def _origin(results: Results) -> Outcome:
    rows = [row for row in results.rows(q.SWARM, caches="cold") if row["topology"] != _DIRECT]
    if not rows:
        return Outcome(Verdict.NOT_MEASURED, runs=(q.SWARM,))
    most, hosts = max(samples(rows, "origin_sets")), max(int(row["hosts"]) for row in rows)
    topologies = len({row["topology"] for row in rows})
    words = f"the registry sends at most {most:.2f} working sets to 1 to {hosts} hosts ({topologies} topologies)"
    control = samples(results.rows(q.SWARM, topology=_DIRECT, hosts=hosts), "origin_sets")
    words += f"; without peers {median(control):.1f}" if control else ""
    verdict = Verdict.REPRODUCED if most <= MOST_SETS else Verdict.NOT_REPRODUCED
    if verdict is Verdict.REPRODUCED and (hosts < MOST_HOSTS or min(_counts(rows)) < LEAST):
        verdict = Verdict.UNCLEAR
    return Outcome(verdict, words, "", f"exact, by the registry's log; {_BASIS}", (q.SWARM,), len(rows))


def _slowest(results: Results) -> Outcome:
    rows, left_out = _fair(results.rows(q.SWARM, topology=_PEERS, caches="cold"))
    most = max((int(row["hosts"]) for row in rows), default=1)
    many, one = ([row for row in rows if row["hosts"] == hosts] for hosts in (most, 1))
    if most == 1 or not one:
        return _too_busy(left_out, q.SWARM)
    outcome = of_ratio(
        ratio(many, one, "slowest_s"),
        what=f"the slowest of {most} hosts against a single one",
        paper="",
        below=SLOWEST,
        enough=SLOWEST,
        used=[*many, *one],
        run=q.SWARM,
    )
    return _with_basis(outcome, fewer=most < MOST_HOSTS)


def _from_peers(results: Results) -> Outcome:
    fair, left_out = _fair(results.rows(q.FROM_PEERS, hosts=1))
    peers, direct = ([row for row in fair if row["topology"] == name] for name in ("rooted", _DIRECT))
    if not fair:
        return _too_busy(left_out, q.FROM_PEERS)
    outcome = of_ratio(
        ratio(peers, direct, "median_s"),
        what="from a root that holds the image against from the registry",
        paper="0.29",
        below=1.0,
        enough=0.58,
        used=[*peers, *direct],
        run=q.FROM_PEERS,
    )
    return _with_basis(outcome, fewer=False)


def _with_basis(outcome: Outcome, *, fewer: bool) -> Outcome:
    if outcome.verdict is Verdict.NOT_MEASURED:
        return outcome
    verdict = Verdict.UNCLEAR if fewer and outcome.verdict is Verdict.REPRODUCED else outcome.verdict
    trust = f"{outcome.confidence}, {_BASIS}"
    return Outcome(verdict, outcome.measured, "", trust, outcome.runs, outcome.rows, outcome.p)


FROM_PEERS = Claim(
    "cold-start-p2p",
    "Fig 14",
    "many_hosts",
    "From peers faster still.",
    "0.62 s against 2.15 s from the registry (0.29)",
    _from_peers,
    "a start from a peer takes surely no less time than one from the registry",
)
BATCH: tuple[Claim, ...] = (
    Claim(
        "batch-start",
        "Fig 17",
        "many_hosts",
        "Starts stay flat from 1 to 32 hosts.",
        "0.7 s on 3 to 39 hosts",
        _flat,
        "a doubling of the hosts surely adds more than 5 % of a start",
    ),
    Claim(
        "batch-origin",
        "Fig 17",
        "many_hosts",
        "(obdlab's own) However many hosts start, the registry sends hardly more than one working set.",
        "not in the paper",
        _origin,
        "one row with more than 1.2 working sets",
    ),
    Claim(
        "batch-slowest",
        "Fig 17",
        "many_hosts",
        "(obdlab's own) The slowest of all hosts takes hardly longer than a single one.",
        "not in the paper",
        _slowest,
        "surely more than 1.25 times as long",
    ),
)
