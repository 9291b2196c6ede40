"""The figures by name, each from rows below ``experiments/measured``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from obdlab.lab.paper import ledger
from obdlab.lab.paper.published import published
from obdlab.lab.paper.questions import (
    CHURN,
    CODEC,
    CONVERSION,
    FAASNET,
    FROM_PEERS,
    HYPER,
    MEMORY,
    MISSES,
    SCALE,
    SWARM,
    Run,
)
from obdlab.lab.paper.results import Results
from obdlab.lab.paper.simulated import fit_of
from obdlab.lab.run.declaration import last_spec, open_experiment
from obdlab.lab.run.rows import AA_SUFFIX, RowStore, newest_code, one_per_attempt, with_quiet
from obdlab.lab.run.starts import summaries_of
from obdlab.lab.run.statistics import Estimate, median_interval, ratio_interval
from obdlab.lab.run.summary import caveats, findings, summarise, summary_records, surely_different
from tests.figures import benchmarks, suggestions

Row = dict[str, Any]

MEASURED = Path(__file__).parents[2] / "experiments" / "measured"
NETWORKS = ((100.0, 0.0), (100.0, 20.0), (1000.0, 0.0), (1000.0, 20.0))
IMAGES = ("redis", "nginx", "node", "pydata", "wordpress", "jdk", "torch")
ARMS = ("overlayfs", "obdlab", "obdlab-prefetch", "obdlab-hot", "stargz", "soci")
#: Arms whose image holds what a recorded start read.
RECORDED = ("obdlab-prefetch", "obdlab-hot")
_USUAL_COUNT = 3
_NOT_YET = "Not measured yet."


def figures() -> dict[str, str]:
    """Return the text of all figures by name."""
    made = {name: make() for name, make in _FIGURES.items()}
    made |= {f"ledger-{key}": text for key, text in _ledger().items()}
    return made | {f"benchmark-{name}": benchmarks.table(name) for name in benchmarks.SHOWN}


def files() -> dict[Path, str]:
    """Return the texts of whole files of figures."""
    measured = [
        name for name in ("peers", "hot", "first_set", "verified") if (MEASURED / name / "rows.jsonl").is_file()
    ]
    return {MEASURED / name / "table.txt": _all_columns(name) for name in measured}


def first_set(directory: Path) -> str:
    """Return the table of cold starts of a set that could stop early, or a sentence if it is not measured."""
    if not (directory / "rows.jsonl").is_file():
        return _NOT_YET
    spec = last_spec(directory)
    experiment = open_experiment(spec, directory)
    summaries = summaries_of(spec, experiment.rows())
    sure, lines = surely_different(summaries), []
    for each in summaries:
        if each.start != "cold":
            continue
        ratio, verdict = "", ""
        if each.ratio is not None:
            ratio = each.ratio.text(".2f") + (" rec" if each.mixed else "")
            word = "faster" if each.ratio.is_below(1) else "slower"
            verdict = word if (each.place, each.arm) in sure else "-"
        link = f"{each.rate_mbit:g} Mbit/s, {each.rtt_ms:g} ms"
        cells = [
            each.total_s.text(".2f"),
            ratio,
            verdict,
            f"{each.bytes_received / 1e6:.1f}",
            str(each.total_s.count),
        ]
        lines.append([each.image, link, each.arm, *cells])
    head = ("image", "link", "arm", "seconds", "ratio", "surely", "MB", "n")
    return "\n\n".join([_table(head, lines), *experiment.facts()["caveats"]])


@cache
def _rows(name: str) -> tuple[Row, ...]:
    rows = with_quiet(RowStore(MEASURED / name).rows())
    return tuple(row for row in rows if not row.get("error"))


def _starts(name: str, **where: Any) -> list[Row]:
    found = [row for row in _rows(name) if all(row.get(key) == value for key, value in where.items())]
    return one_per_attempt(newest_code(found, "image", "rate_mbit", "rtt_ms", "arm", "start", "settings"))


def of_peers(**where: Any) -> list[Row]:
    """Return the good starts of ``peers`` with these values."""
    return _starts("peers", **where)


def _middle(rows: Sequence[Row], key: str) -> float:
    return median(row[key] for row in rows)


def _launch_s(rows: Sequence[Row]) -> float:
    return median(row["create_s"] + row["start_s"] + row["ready_s"] for row in rows)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" if line else f"|{'---|' * len(head)}" for line in (head, (), *lines))


def _rate(rate_mbit: float) -> str:
    return f"{rate_mbit:g} Mbit/s" if rate_mbit < 1000 else f"{rate_mbit / 1000:g} Gbit/s"


def _peers_cold() -> str:
    lines = []
    for image in IMAGES:
        for rate, rtt in NETWORKS:
            base = _starts("peers", image=image, rate_mbit=rate, rtt_ms=rtt, start="cold", arm="overlayfs")
            cells = [image, f"{rate:g}", f"{rtt:g}"]
            for arm in ARMS:
                rows = _starts("peers", image=image, rate_mbit=rate, rtt_ms=rtt, start="cold", arm=arm)
                cells.append(_cold_cell(rows, base, is_base=arm == "overlayfs"))
            lines.append(cells)
    return _table(("image", "Mbit/s", "ms", *(_arm(arm) for arm in ARMS)), lines)


def _arm(arm: str) -> str:
    return f"{arm}, recorded" if arm in RECORDED else arm


def _cold_cell(rows: Sequence[Row], base: Sequence[Row], *, is_base: bool) -> str:
    if not rows:
        return "-"
    total_s, received = _middle(rows, "total_s"), _middle(rows, "bytes_received") / 1e6
    if is_base:
        return f"{total_s:.2f} ({received:.0f})"
    few = "" if len(rows) >= _USUAL_COUNT else f"; n = {len(rows)}"
    waits = _middle(rows, "round_trip_waits")
    return f"{total_s:.2f} (×{total_s / _middle(base, 'total_s'):.2f}; {received:.1f}, {waits:.0f}{few})"


def _local(start: str) -> Callable[[], str]:
    def made() -> str:
        lines = []
        for image in IMAGES:
            found = [_starts("peers", image=image, start=start, arm=arm) for arm in ARMS]
            lines.append([image, *(f"{_middle(rows, 'total_s'):.2f}" if rows else "-" for rows in found)])
        return _table(("image", *ARMS), lines)

    return made


def _counts(name: str) -> Callable[[], str]:
    def made() -> str:
        cold = [row for row in RowStore(MEASURED / name).rows() if row["start"] == "cold"]
        return f"{sum(bool(row['quiet']) for row in cold)} of {len(cold)} cold starts"

    return made


def _row_count(name: str) -> Callable[[], str]:
    return lambda: f"{len(RowStore(MEASURED / name).rows()):,} rows"


# Of launches with a hot layer: the time as a share of the bound (tests.benchmarks.bounds), and the time.
def _bounds(name: str, images: Sequence[str]) -> Callable[[], str]:
    def made() -> str:
        lines = []
        for image in images:
            cold = _starts(name, image=image, arm="obdlab-hot", start="cold")
            lines.append([f"{image} ({min(row['bytes_received'] for row in cold) / 1e6:.1f})"])
            for rate, rtt in NETWORKS:
                where = {"image": image, "arm": "obdlab-hot", "rate_mbit": rate, "rtt_ms": rtt}
                cold, warm = (_starts(name, **where, start=start) for start in ("cold", "warm"))
                if not cold or not warm:
                    lines[-1].append("-")
                    continue
                needed = min(row["bytes_received"] for row in cold)
                bound = max(_launch_s(warm), needed * 8e-6 / rate) + 3e-3 * rtt
                lines[-1].append(f"{_launch_s(cold) / bound:.2f} ({_launch_s(cold):.2f} s)")
        return _table(("image (MB)", *(f"{_rate(rate)}, {rtt:g} ms" for rate, rtt in NETWORKS)), lines)

    return made


def _hot_against() -> str:
    said = []
    for image in ("pydata", "wordpress"):
        for other in ("stargz", "overlayfs"):
            shares = []
            for rtt in (0.0, 20.0):
                where = {"image": image, "rate_mbit": 100.0, "rtt_ms": rtt, "start": "cold"}
                ours, theirs = (_middle(_starts("hot", **where, arm=arm), "total_s") for arm in ("obdlab-hot", other))
                shares.append(f"{ours / theirs:.2f}")
            said.append(f"{image} takes {shares[0]} and {shares[1]} (20 ms) of {other}'s time")
    return "; ".join(said)


_BEFORE, _AFTER = {"extents": {"cache_extent_max": 0}, "readahead": {"device_readahead_kib": 32}}, None


def _changed(name: str, image: str, rate: float, rtt: float) -> tuple[list[Row], list[Row]]:
    where = {"image": image, "rate_mbit": rate, "rtt_ms": rtt, "start": "cold"}
    with_settings, without = (_starts(name, **where, settings=settings) for settings in (_BEFORE[name], _AFTER))
    return with_settings, without


def _extents() -> str:
    lines = []
    for image in ("redis", "nginx", "pydata"):
        for rate in (100.0, 1000.0):
            cells = []
            for rtt in (0.0, 5.0, 20.0):
                old, new = _changed("extents", image, rate, rtt)
                times = " → ".join(f"{_middle(rows, 'total_s'):.2f}" for rows in (old, new))
                received = " → ".join(f"{_middle(rows, 'bytes_received') / 1e6:.1f}" for rows in (old, new))
                cells.append(f"{times} s ({received} MB)")
            lines.append([image, f"{rate:g}", *cells])
    return _table(("image", "Mbit/s", "0 ms", "5 ms", "20 ms"), lines)


def _extents_said() -> str:
    told = []
    for image in ("pydata", "redis", "nginx"):
        old, new = (_middle(rows, "total_s") for rows in _changed("extents", image, 1000.0, 20.0))
        told.append(f"{image} {new:.1f} instead of {old:.1f} s")
    more = [
        _middle(new, "bytes_received") / _middle(old, "bytes_received")
        for image in ("pydata", "redis", "nginx")
        for old, new in [_changed("extents", image, 1000.0, 20.0)]
    ]
    slow = []
    for rtt in (20.0, 0.0):
        shares = []
        for image in ("pydata", "redis", "nginx"):
            old, new = (_middle(rows, "total_s") for rows in _changed("extents", image, 100.0, rtt))
            shares.append(f"{(1 - new / old) * 100:.0f}")
        slow.append(f"{shares[0]}, {shares[1]} and {shares[2]} % sooner")
    return (
        f"At 1 Gbit/s and 20 ms a start takes {', '.join(told)}, for {min(more):.1f} to {max(more):.1f} times the "
        f"bytes; at 100 Mbit/s and 20 ms they are ready {slow[0]}, without a delay {slow[1]} (two starts each)"
    )


def _readahead() -> str:
    lines = []
    for image in ("redis", "pydata", "wordpress"):
        sizes = [
            _middle(one_per_attempt(rows), "bytes_received") / 1e6
            for rows in zip(*(_sides("readahead", image, *network) for network in NETWORKS), strict=True)
            for rows in [[row for part in rows for row in part]]
        ]
        cells = []
        for rate, rtt in NETWORKS:
            new, old = _changed("readahead", image, rate, rtt)
            cells.append(" → ".join(f"{_middle(rows, 'total_s'):.2f}" for rows in (old, new)) if old and new else "-")
        lines.append([image, " → ".join(f"{size:.1f}" for size in sizes), *cells])
    return _table(("image", "MB received", *(f"{_rate(rate)}, {rtt:g} ms" for rate, rtt in NETWORKS)), lines)


# Without the changed settings, then with them.
def _sides(name: str, image: str, rate: float, rtt: float) -> tuple[list[Row], list[Row]]:
    changed, without = _changed(name, image, rate, rtt)
    return without, changed


def _starts_table() -> str:
    lines = []
    for image in ("redis", "pydata", "wordpress"):
        for start in ("cold", "warm"):
            where = {"image": image, "rate_mbit": 100.0, "rtt_ms": 20.0, "start": start}
            base, lazy, hot = (_starts("peers", **where, arm=arm) for arm in ("overlayfs", "obdlab", "obdlab-hot"))
            cells = [f"{image}, {len(base)} starts each", start, _estimate(base).text(".2f")]
            for rows in (lazy, hot):
                ratio = ratio_interval([row["total_s"] for row in rows], [row["total_s"] for row in base])
                cells += [_estimate(rows).text(".2f"), ratio.text(".2f")]
            received = " / ".join(f"{_middle(rows, 'bytes_received') / 1e6:.1f}" for rows in (base, lazy, hot))
            lines.append([*cells, f"{received} MB" if start == "cold" else "0"])
    head = ("image", "start", "overlayfs, s", "obdlab, nothing recorded, s", "ratio", "obdlab, hot layer recorded, s")
    return _table((*head, "ratio", "received until ready"), lines)


def _estimate(rows: Sequence[Row]) -> Estimate:
    return median_interval([row["total_s"] for row in rows])


# The share of a lazy start that requests one after another and the link's rate explain.
def _explained() -> str:
    shares: dict[tuple[float, float], list[float]] = {}
    for image in IMAGES:
        for rate, rtt in NETWORKS:
            rows = _starts("peers", image=image, rate_mbit=rate, rtt_ms=rtt, start="cold", arm="obdlab")
            waits, received = _middle(rows, "requests") * (rtt / 1e3 + 2e-3), _middle(rows, "bytes_received")
            shares.setdefault((rate, rtt), []).append((waits + received * 8e-6 / rate) / _middle(rows, "total_s"))
    told = [
        f"{min(found):.0%} to {max(found):.0%} of a start over {_rate(rate)} and {rtt:g} ms".replace("%", " %")
        for (rate, rtt), found in shares.items()
    ]
    return ", ".join(told[:-1]) + f" and {told[-1]}"


def _grid(run: Run, axes: Sequence[str], metrics: dict[str, str]) -> Callable[[], str]:
    def made() -> str:
        rows = Results(MEASURED / "evaluation").rows(run)
        points: dict[tuple[Any, ...], list[Row]] = {}
        for row in sorted(rows, key=lambda row: tuple(row[axis] for axis in axes)):
            points.setdefault(tuple(row[axis] for axis in axes), []).append(row)
        lines = [
            [
                *(f"{value:,}" if isinstance(value, int) else str(value) for value in point),
                str(len(found)),
                *(median_interval([row[key] for row in found]).text(".3g") for key in metrics),
            ]
            for point, found in points.items()
        ]
        return _table((*(axis.replace("_", " ") for axis in axes), "n", *metrics.values()), lines)

    return made


# Both defaults, of the layers of pydata.
def _default_size() -> str:
    rows = Results(MEASURED / "evaluation").rows(CODEC)
    ours, theirs = (
        median(row["ratio"] for row in rows if (row["algorithm"], row["block_size"]) == pair)
        for pair in (("zstd", 16384), ("lz4", 4096))
    )
    return f"{ours:.2f} of the content of a Python image, in place of {theirs:.2f}"


# Of each number of children: the time that the working set takes over a child's share of its parent's link, the time
# that a unit takes down all hops, and the simulated slowest starts.
def _simulated_flat() -> str:
    rows = Results(MEASURED / "evaluation").rows(HYPER)
    options = last_spec(MEASURED / "evaluation" / HYPER.name).options
    arities = sorted({row["arity"] for row in rows})
    # Those that all numbers of children have.
    hosts = sorted(
        {
            row["hosts"]
            for row in rows
            if {each["arity"] for each in rows if each["hosts"] == row["hosts"]} == {*arities}
        }
    )
    lines = []
    for arity in arities:
        found = {count: [row for row in rows if (row["arity"], row["hosts"]) == (arity, count)] for count in hosts}
        deepest = max(row["depth"] for row in found[hosts[-1]])
        share = options["up_mbit"] / 8 / arity  # MB/s
        unit_s = options["rtt_ms"] / 2e3 + options["unit_kib"] * 1024e-6 / share
        cells = [f"{rows[0]['working_set'] / 1e6 / share:.3f}", f"{deepest:.0f}", f"{(deepest - 1) * unit_s:.3f}"]
        slowest = [median_interval([row["slowest_s"] for row in found[count]]).text(".3f") for count in hosts]
        lines.append([str(arity), *cells, *slowest])
    head = ("children", "working set over a child's share, s", f"hops, {hosts[-1]:,} hosts", "a unit down these, s")
    return _table((*head, *(f"slowest of {count:,}, s" for count in hosts)), lines)


def _simulated_scale() -> str:
    results = Results(MEASURED / "evaluation")
    cold, warm, control = (
        results.rows(SCALE, topology=topology, caches=caches)
        for topology, caches in (("rooted", "cold"), ("rooted", "warm"), ("direct", "cold"))
    )
    half = [median_interval([row["median_s"] for row in rows]).median for rows in (cold, warm, control)]
    ready_s = median_interval([row["all_ready_s"] for row in cold]).median
    return (
        f"of {cold[0]['containers_started']:,} containers on {cold[0]['hosts']:,} hosts half are ready within "
        f"{half[0]:.2f} s (all data local: {half[1]:.2f} s), all of them {ready_s:.2f} s after the first start; from "
        f"the registry alone half within {half[2]:.1f} s, and it sends {control[0]['origin_mb'] / 1000:.0f} GB, not "
        f"{cold[0]['origin_mb']:.0f} MB"
    )


def _simulated_trees() -> str:
    rows = Results(MEASURED / "evaluation").rows(FAASNET)
    hosts = sorted({row["hosts"] for row in rows})
    lines = []
    for topology in dict.fromkeys(sorted(row["topology"] for row in rows)):
        found = {n: [row for row in rows if (row["topology"], row["hosts"]) == (topology, n)] for n in hosts}
        half = [median_interval([row["median_s"] for row in found[n]]).text(".2f") for n in hosts]
        most = found[hosts[-1]]
        spread = median_interval([row["spread_s"] for row in most]).text(".2f")
        lines.append([topology, *half, spread, f"{median(row['origin_mb'] for row in most):,.0f}"])
    head = [f"half of {n}, s" for n in hosts]
    return _table(("topology", *head, f"first to last of {hosts[-1]}, s", "MB from the registry"), lines)


# Of emulated hosts, by topology and number of hosts: a number of the rows; "busy" marks rows that say more of the
# processors than of the links.
def _swarm(key: str, form: str) -> Callable[[], str]:
    def made() -> str:
        rows = Results(MEASURED / "evaluation").rows(SWARM)
        if not rows:
            return _NOT_YET
        hosts = sorted({row["hosts"] for row in rows})
        lines = []
        for topology in dict.fromkeys(sorted(row["topology"] for row in rows)):
            cells = [topology]
            for count in hosts:
                found = [row for row in rows if (row["topology"], row["hosts"]) == (topology, count)]
                busy = "" if all(row["links_decide"] for row in found) else " busy"
                cells.append(f"{median_interval([row[key] for row in found]).text(form)}{busy}" if found else "-")
            lines.append(cells)
        return _table(("topology", *(f"{count} host{'s' * (count > 1)}" for count in hosts)), lines)

    return made


# Bytes, which busy processors do not change.
def _swarm_bytes() -> str:
    rows = sorted(_rows("swarm"), key=lambda row: (row["topology"], row["hosts"]))
    lines = [
        [
            row["topology"],
            str(row["hosts"]),
            *(f"{row[key]:.3f}" for key in ("origin_sets", "peer_sets", "most_sent_sets")),
            f"{row['failovers']:.0f}",
            f"{row['cpu_share']:.0%}",
        ]
        for row in rows
    ]
    head = ("topology", "hosts", "from the registry", "from hosts", "most of one host", "left", "processors busy")
    return _table(head, lines)


def _swarm_conditions() -> str:
    rows = Results(MEASURED / "evaluation").rows(SWARM)
    if not rows:
        return _NOT_YET
    decided = sum(row["links_decide"] for row in rows)
    quiet = sum(row["quiet"] for row in rows)
    busiest = max(row["cpu_share"] for row in rows)
    return (
        f"{len(rows)} rows; in {decided} of them the processors were busy for less than 70 % of the time (at most "
        f"{busiest:.0%}), and {quiet} began on a quiet host"
    )


def _swarm_fit() -> str:
    fit = fit_of(Results(MEASURED / "evaluation"))
    if fit is None:
        return _NOT_YET
    lines = [
        [
            each.topology,
            f"{each.hosts}",
            "fitted" if each in fit.fitted else "asked",
            f"{each.measured_s:.2f}",
            f"{each.predicted_s:.2f}",
            f"{each.predicted_s / each.measured_s - 1:+.1%}",
        ]
        for each in sorted((*fit.fitted, *fit.asked), key=lambda each: (each.topology, each.hosts))
    ]
    return _table(("topology", "hosts", "", "emulated, s", "simulated, s", "error"), lines)


def _from_peers() -> str:
    results = Results(MEASURED / "evaluation")
    direct, peers = (results.rows(FROM_PEERS, topology=name) for name in ("direct", "rooted"))
    if not direct or not peers:
        return _NOT_YET
    times = [median_interval([row["median_s"] for row in rows]).text(".2f") for rows in (direct, peers)]
    ratio = ratio_interval([row["median_s"] for row in peers], [row["median_s"] for row in direct]).text(".2f")
    return f"{times[0]} s from the registry, {times[1]} s from the root ({ratio} of it; {len(peers)} starts each)"


def _churn() -> str:
    lines = []
    rows, without = Results(MEASURED / "evaluation").rows(CHURN), Results(MEASURED / "evaluation").rows(FAASNET)
    for topology in dict.fromkeys(sorted(row["topology"] for row in rows)):
        found = [row for row in rows if row["topology"] == topology]
        usual = [row["slowest_s"] for row in without if (row["topology"], row["hosts"]) == (topology, 128)]
        keys = {"median_s": ".2f", "slowest_s": ".2f", "moved_per_leave": ".1f", "peak_received_mb_s": ".0f"}
        keys |= {"peak_sent_mb_s": ".0f", "origin_mb": ",.0f"}
        numbers = {key: median_interval([row[key] for row in found]).text(form) for key, form in keys.items()}
        cells = [*numbers.values()]
        cells.insert(1, median_interval(usual).text(".2f"))
        lines.append([topology, *cells])
    head = ("topology", "half, s", "slowest if none leaves, s", "slowest, s", "moved by a leave", "most in, MB/s")
    return _table((*head, "most out, MB/s", "MB from the registry"), lines)


def _versions() -> str:
    environments = RowStore(MEASURED / "peers").environments()
    used = {row["environment"] for row in _rows("peers")}
    found: dict[str, dict[str, None]] = {}
    for key in sorted(used):
        for programs in environments[key].get("compared", {}).values():
            for program, version in programs.items():
                found.setdefault(program, {})[_short(version)] = None
        for program in ("kernel", "runc"):
            found.setdefault(program, {})[_short(environments[key][program])] = None
    return ", ".join(f"{program} {' and '.join(versions)}" for program, versions in sorted(found.items()))


# The last word of a line such as "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1".
def _short(version: str) -> str:
    words = [word for word in version.split() if any(character.isdigit() for character in word)]
    return words[-1] if words else version


def _all_columns(name: str) -> str:
    summaries = summarise(_rows(name))
    records = summary_records(summaries)
    columns = list(records[0])
    widths = {column: max(len(column), *(len(record[column]) for record in records)) for column in columns}
    lines = [{column: column for column in columns}, {column: "-" * widths[column] for column in columns}, *records]
    text = ["  ".join(line[column].ljust(widths[column]) for column in columns).rstrip() for line in lines]
    return "\n".join([*text, *findings(summaries), *caveats(list(_rows(name)))]) + "\n"


@cache
def _ledger() -> dict[str, str]:
    return {"counts": ledger.as_text(ledger.ledger(Results(MEASURED / "evaluation")))[-1]}


# Of starts of one repeat, which came after one another: the time of an arm over the first arm's.
def _verified() -> str:
    base, checked, lines = "obdlab", "obdlab-verified", []
    arms = (checked, base + AA_SUFFIX)
    for start in ("cold", "dropped", "warm"):
        times = {
            arm: {row["repeat"]: row["total_s"] for row in _starts("verified", arm=arm, start=start)}
            for arm in (base, *arms)
        }
        cells = [start, f"{median(times[base].values()):.2f}", f"{median(times[checked].values()):.2f}"]
        for arm in arms:
            pairs = sorted(times[base].keys() & times[arm].keys())
            ratio = median_interval([times[arm][repeat] / times[base][repeat] for repeat in pairs])
            cells.append(ratio.text(".2f"))
        lines.append([*cells, str(len(pairs))])
    head = ("start", "without trees, s", "with trees, s", "paired ratio", "of identical arms", "pairs")
    return _table(head, lines)


def _verified_traffic() -> str:
    said = []
    for arm in ("obdlab", "obdlab-verified"):
        rows = _starts("verified", arm=arm, start="cold")
        said.append(f"{_middle(rows, 'requests'):.0f} requests and {_middle(rows, 'bytes_received') / 1e6:.1f} MB")
    return f"{said[1]} until ready, without trees {said[0]}"


def _has_floor() -> str:
    with_floor = [name for name in ("peers", "hot", "extents") if any(AA_SUFFIX in row["arm"] for row in _rows(name))]
    return "measured in " + ", ".join(with_floor) if with_floor else "none of these sets has identical arms yet"


_ABSENT = (
    "Nydus",
    "Starlight-NSDI22",
    "AKS-Artifact-Streaming",
    "EROFS-snapshotter",
    "FlacIO-FAST25",
    "Slacker-FAST16",
)
_ABSENT += ("Cider-HPCC17", "AWS-Lambda-ATC23", "SOCI")


def _absent() -> str:
    lines = [
        [value.source, value.figure, value.series, f"{value.y} {value.unit}", value.certainty]
        for value in published()
        if value.source in _ABSENT
    ]
    return _table(("source", "where", "claim", "its figure", "how sure"), lines)


# The rows of the newest code alone: a changed rule or profile changes every number.
def _suggestion_rows() -> list[Row]:
    return one_per_attempt(newest_code(list(_rows("suggestion")), "image", "trace", "rate_mbit"))


_FIGURES: dict[str, Callable[[], str]] = {
    "peers-cold": _peers_cold,
    "peers-warm": _local("warm"),
    "peers-dropped": _local("dropped"),
    "peers-rows": _row_count("peers"),
    "peers-quiet": _counts("peers"),
    "peers-versions": _versions,
    "hot-bounds": _bounds("hot", ("redis", "nginx", "pydata", "wordpress", "torch")),
    "hot-rows": _row_count("hot"),
    "hot-quiet": _counts("hot"),
    "hot-against": _hot_against,
    "hot-pause-bounds": _bounds("hot-pause", ("redis", "nginx")),
    "hot-pause-rows": _row_count("hot-pause"),
    "extents": _extents,
    "extents-said": _extents_said,
    "readahead": _readahead,
    "absent-peers": _absent,
    "simulated-flat": _simulated_flat,
    "simulated-scale": _simulated_scale,
    "simulated-trees": _simulated_trees,
    "simulated-churn": _churn,
    "swarm-bytes": _swarm_bytes,
    "swarm-median": _swarm("median_s", ".2f"),
    "swarm-slowest": _swarm("slowest_s", ".2f"),
    "swarm-origin": _swarm("origin_sets", ".2f"),
    "swarm-busy": _swarm("cpu_share", ".2f"),
    "swarm-conditions": _swarm_conditions,
    "swarm-fit": _swarm_fit,
    "swarm-from-peers": _from_peers,
    "suggestion": lambda: _table(*suggestions.lines(_suggestion_rows())),
    "suggestion-said": lambda: suggestions.said(_suggestion_rows()),
    "first-set": lambda: first_set(MEASURED / "first_set"),
    "verified": _verified,
    "verified-rows": _row_count("verified"),
    "verified-traffic": _verified_traffic,
    "floors": _has_floor,
    "starts": _starts_table,
    "explained": _explained,
    "default-size": _default_size,
    "codec": _grid(
        CODEC,
        ("algorithm", "block_size"),
        {"read_mb_s": "read, MB/s", "write_mb_s": "write, MB/s", "ratio": "size, of the content"},
    ),
    "conversion": _grid(
        CONVERSION, ("image", "algorithm"), {"seconds": "seconds", "of_source": "of the gzip layers", "size_mb": "MB"}
    ),
    "misses": _grid(MISSES, ("rtt_ms",), {"p50_ms": "half of reads, ms", "p99_ms": "99 %, ms"}),
    "memory": _grid(MEMORY, ("devices",), {"device_mib": "MiB of one device, PSS"}),
}
