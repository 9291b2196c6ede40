"""What README and docs say was measured is in the rows of the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obdlab.lab.images.recipe import find_recipe
from obdlab.lab.run.declaration import load
from obdlab.lab.workbench import folder
from tests.figures import benchmarks, blocks, page, picture
from tests.lab.paper.rows import start_rows, store_starts

#: Quantities that may stand outside figures: conditions, limits, settings and what other programs do, by page.
#: Another one is a measurement, which comes from rows (``tests/figures/blocks.py``).
CONDITIONS = {
    "README.md": {"20 ms"},
    "experiments/measured/README.md": {"20 ms"},
    "docs/explanation/cold-starts.md": {"20 ms"},
    "docs/explanation/devices.md": {"150 s"},
    "docs/explanation/ledger.md": {"5 %", "95 %"},
    "docs/explanation/outages.md": {"2 s", "5 s", "10 s", "30 s", "60 s", "120 s", "150 s"},
    "docs/explanation/paper-differences.md": {"2,000 IOPS", "100 MB/s"},
    "docs/explanation/peers.md": {"0.8 s", "1.5 s", "8 s", "60 s", "20 minutes", "10 µs", "15 MB", "122 MB"},
    "docs/explanation/performance.md": {"20 ms", "95 %", "2 ms"},
    "docs/explanation/threads-and-locks.md": {"0.25 s", "2 s", "5 s", "5 %"},
    "docs/how-to/convert-many.md": {"2 s", "4 s"},
    "docs/how-to/experiments.md": {"60 s", "2,000 IOPS", "100 MB/s", "95 %", "5 %", "10 %", "30 %"},
    "docs/how-to/nbd.md": {"10 s", "30 s"},
    "docs/how-to/prefetch.md": {"2 ms"},
    "docs/how-to/tcmu.md": {"5 s"},
    "docs/reference/configuration.md": {"5 s", "10 s", "30 s"},
    "docs/reference/differences.md": {"2 s", "5 s", "10 s", "120 s"},
    "docs/reference/formats.md": {"0.2 %", "0.4 %"},
    "docs/reference/metrics.md": {"16 µs", "1 ms", "10 ms", "10 s", "137 s"},
}
#: On every page: the round trips of links, the level of intervals.
EVERYWHERE = {"5 ms", "20 ms", "95 %"}
#: Pages whose figures other commands write: ``python -m tests.mutants report``, ``make test-long``.
WRITTEN_BY_OTHERS = {"docs/develop/mutants.md", "docs/develop/long-tests.md"}


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return blocks.figures()


@pytest.mark.parametrize("path", page.pages(), ids=lambda path: str(path.relative_to(page.ROOT)))
def test_a_page_says_what_the_rows_say(path: Path, made: dict[str, str]) -> None:
    text = path.read_text()
    assert page.written(text, made, path.name) == text, "run: make figures"
    name = str(path.relative_to(page.ROOT))
    if name in WRITTEN_BY_OTHERS:
        return
    found = {each.partition(":")[0]: each for each in page.unsupported(text)}
    more = [each for quantity, each in found.items() if quantity not in CONDITIONS.get(name, set()) | EVERYWHERE]
    assert not more, "quantities outside figures: write them from rows, or add a limit or setting to CONDITIONS"


def test_tables_and_picture_are_those_of_the_rows() -> None:
    for path, text in blocks.files().items():
        assert path.read_text() == text, f"{path}: run: make figures"
    assert picture.drawn_from(picture.PATH) == picture.digest(), "run: make figures"
    assert picture.is_whole(picture.PATH)


def test_every_figure_is_shown_somewhere(made: dict[str, str]) -> None:
    shown = {name for path in page.pages() for name in page.names(path.read_text())}
    assert shown == set(made)


def test_a_changed_number_is_noticed(made: dict[str, str]) -> None:
    text = "a <!-- figures: peers-rows -->9 rows<!-- end of figures --> b"
    assert page.written(text, made) == f"a <!-- figures: peers-rows -->{made['peers-rows']}<!-- end of figures --> b"
    table = "<!-- figures: x --><!-- end of figures -->"
    assert page.written(table, {"x": "| a |\n|---|"}) == "<!-- figures: x -->\n| a |\n|---|\n<!-- end of figures -->"
    for wrong in ("<!-- figures: x -->", "<!-- figures: y -->1<!-- end of figures -->", "<!-- end of figures -->"):
        with pytest.raises(page.PageError):
            page.written(wrong, {"x": "1"})


@pytest.mark.parametrize(
    ("text", "quantities"),
    [
        ("takes 4.05 s here", ["4.05 s"]),
        ("12 % and 1,234 IOPS", ["12 %", "1,234 IOPS"]),
        ("100 Mbit/s, `5 s`, [x](a/3 s)", []),
        ("    5 s in code\n", []),
        ("<!-- figures: x -->5 s<!-- end of figures --> 7 ms", ["7 ms"]),
        ("51 MB of 151 MB", ["51 MB", "151 MB"]),
        ("layers 5 such", []),
    ],
)
def test_quantities_outside_figures(text: str, quantities: list[str]) -> None:
    assert [each.partition(":")[0] for each in page.unsupported(text)] == quantities


def test_what_a_benchmark_printed_is_the_median_of_its_runs(tmp_path: Path) -> None:
    assert benchmarks.table("merge", tmp_path) == "`python -m tests.benchmarks.merge`: no run is kept yet."
    times = (171.2, 180.0, 173.5)
    rows = [
        {
            "git_commit": "abcdef0123" if number else "0ld0123456",
            "started": f"2026-12-02T10:0{number}:00",
            "load_1m": 0.5 * number,
            "printed": [f"merge of 10 layers x 1000: {ms} ms", "a | b    3"],
        }
        for number, ms in enumerate((9.9, *times))
    ]
    (tmp_path / "merge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head, _, first, second = benchmarks.table("merge", tmp_path).splitlines()
    assert head.endswith("medians of 3 runs, commit abcdef0, 2026-12-02, load 0.5 to 1.5 |")
    assert first == "| merge of 10 layers x 1000: 173.5 ms |"
    assert second == "| a \\| b  3 |"


def test_kept_benchmarks_are_those_that_there_are() -> None:
    scripts = {path.stem for path in (page.ROOT / "tests" / "benchmarks").glob("*.py")}
    assert set(benchmarks.SHOWN) <= scripts
    assert {path.stem for path in benchmarks.PLACE.glob("*.jsonl")} <= scripts


def test_the_first_set_is_published_once_it_is_measured(tmp_path: Path) -> None:
    assert blocks.first_set(tmp_path) == "Not measured yet."
    spec = load(folder("experiments") / "first_set.toml").with_values(
        images=["redis"], snapshotters=["overlayfs", "obdlab-hot", "soci"], rates_mbit=[100], rtts_ms=[5], repeats=4
    )
    seconds = {"overlayfs": 4.0, "overlayfs (A/A)": 4.02, "obdlab-hot": 1.0, "soci": 4.0}
    rows = start_rows({(arm, "cold"): total_s for arm, total_s in seconds.items()}, repeats=4)
    for number, row in enumerate(rows):
        row["total_s"] += 0.003 * (number * 7 % 5)
    table = blocks.first_set(store_starts(tmp_path / "first_set", spec, rows))
    lines = {line.split(" | ")[2]: line for line in table.splitlines() if line.startswith("| redis")}
    assert set(lines) == set(seconds)
    assert " rec | faster | " in lines["obdlab-hot"]
    assert " | - | " in lines["soci"]
    assert "rec" not in lines["soci"]
    assert all(line.endswith(" | 4 |") for line in lines.values())


def test_the_first_set_has_its_images_and_arms() -> None:
    spec = load(folder("experiments") / "first_set.toml")
    assert spec.a_a
    assert spec.precision
    assert len(spec.benches()) == 4
    for name in spec.images():
        assert find_recipe(name, [folder("datasets")]).layers
