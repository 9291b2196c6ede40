"""Scores of the last run, as a page, and its survivors, as a list."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.mutants.running import digest_of, equivalents, is_open, outcome_key, read, results_of
from tests.mutants.sample import ROOMS, sample

_SEED, COUNT = 1, 200

_HEAD = """# Mutants

Do the tests notice a wrong line? `make mutants` draws 200 places of each room (seeded), changes one operator, number,
condition or loop there ([cosmic-ray](https://cosmic-ray.readthedocs.io)'s operators) and runs the tests that ran that
line before. A mutant that makes no test fail survives. A survivor that behaves like the original (a tuning value one
larger) is equivalent: `tests/mutants/equivalent.toml` has the reason, and the score leaves it out. Lines that only
annotate, log or document are not drawn.

<!-- test: skip hours -->
```
make mutants                   # all rooms; hours. ROOMS="formats layers" takes some
```

A first pass gives a mutant ten seconds of tests and 25 examples of each property; `python -m tests.mutants run
--again` gives the survivors all. Mutants of lines that have changed since are left out; `run --top-up ROOM` draws as
many from the code as it is then, in a row of their own ("added").

* Tests that take long are not tried. The rows of cache and devices are of runs without the tests that need a kernel's
  devices, that of "snapshotter, added" is of a run with them.
* The row of cache is of that commit's code with later tests: 142 of its 200 were caught before.
* 33 survivors of snapshotter were tried by hand, alone with one test: a test that was there caught 13, and tests were
  written for 20.
* Many tests of cache and snapshotter were written for survivors of this sample, so another seed would give a lower
  score. Samples of other seeds, before tests were written for their survivors:

| seed | room | mutants | caught | equivalent | score |
|---|---|---|---|---|---|
| 2 | snapshotter | 40 | 34 | 3 | 92 % |
| 2 | devices | 50 | 33 | 7 | 77 % |
| 3 | devices | 57 | 37 | 0 | 65 % |
| 4 | devices, after tests of each file, line by line | 40 | 33 | 4 | 92 % |
| 5 | devices, likewise | 40 | 35 | 3 | 95 % |
| 7 | registry | 40 | 30 | 7 | 91 % |

## Scores

"""


def main(root: Path, *, write: bool) -> int:
    """Print page and list, or write them to their files. Return 1 if a room's score is below 85 %."""
    page, survivors, worst = _page(root)
    if write:
        _path(root).write_text(page)
        _survivors_path(root).write_text(survivors)
    else:
        print(page, survivors, sep="\n")
    return int(worst < 0.85)


def missing_of(room: str, root: Path) -> int:
    """Return how many mutants the room's row of the page lacks. Raises ValueError without such a row."""
    for line in _known(room, _path(root)):
        return max(0, COUNT - int(line.split("|")[2]))
    raise ValueError(f"{_path(root)}: no row of {room}")


def _path(root: Path) -> Path:
    return root / "docs" / "develop" / "mutants.md"


def _survivors_path(root: Path) -> Path:
    return root / "tests" / "mutants" / "survivors.md"


# The room's row of the page as it is, or its survivors of the list: those of a run elsewhere.
def _known(room: str, path: Path) -> list[str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(f"| {room} |")]


def _page(root: Path) -> tuple[str, str, float]:
    equivalent = equivalents(root)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    table = ["| room | mutants | caught | equivalent | survived | score | commit |", "|---|---|---|---|---|---|---|"]
    survivors: list[str] = []
    worst = 1.0
    for room in ROOMS:
        added = f"{room}, added"
        for name, results in ((room, results_of(room, root)), (added, results_of(room, root, added=True))):
            if not results.exists():  # as run elsewhere
                known = _known(name, _path(root))
                table += known or ([] if name == added else [f"| {room} | not run yet | | | | | |"])
                survivors += _known(name, _survivors_path(root))
                continue
            entries = of_sample(room, root, results) if name == room else _still_there(root, results)
            row, score, found = _row(name, entries, equivalent, commit)
            worst = min(worst, score) if name == room else worst  # of a few mutants, a share says little
            table.append(row)
            survivors += found
    page = [*table, "", f"The seed is {_SEED}. [The survivors](../../tests/mutants/survivors.md)."]
    listed = ["# Survivors", "", "| room | file | line | mutant |", "|---|---|---|---|", *survivors]
    return _HEAD + "\n".join(page) + "\n", "\n".join(listed) + "\n", worst


def _row(
    name: str, entries: list[dict[str, object]], equivalent: set[tuple[object, ...]], commit: str
) -> tuple[str, float, list[str]]:
    counts: Counter[str] = Counter()
    survivors = []
    for entry in entries:
        outcome = "survived" if is_open(entry, equivalent) else "equivalent"
        outcome = "caught" if entry["outcome"] == "caught" else outcome
        counts[outcome] += 1
        if outcome == "survived":
            note = " (no test runs it)" if entry["outcome"] == "not run" else ""
            survivors.append(
                f"| {name} | `{entry['file']}`{note} | `{_cell(entry['was'])}` | `{_cell(entry['now'])}` |"
            )
    score = counts["caught"] / max(1, len(entries) - counts["equivalent"])
    row = (
        f"| {name} | {len(entries)} | {counts['caught']} | {counts['equivalent']} | {counts['survived']} "
        f"| {score:.0%} | {commit} |"
    )
    return row, score, survivors


def _still_there(root: Path, results: Path) -> list[dict[str, object]]:
    latest = {outcome_key(entry): entry for entry in read(results)}.values()
    texts = {file: (root / file).read_text() for file in {str(entry["file"]) for entry in latest}}
    return [entry for entry in latest if str(entry["was"]) in texts[str(entry["file"])]]


def of_sample(room: str, root: Path, results: Path) -> list[dict[str, object]]:
    """Return the outcomes of the room's sample (seed 1) that are of its files as they are now."""
    latest = {outcome_key(entry): entry for entry in read(results)}
    wanted = [latest.get(outcome_key(asdict(mutant))) for mutant in sample(room, root, seed=_SEED, count=COUNT)]
    return [
        entry for entry in wanted if entry is not None and entry["digest"] == digest_of(root / str(entry["file"]))
    ]


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("`", "'")
