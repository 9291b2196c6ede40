"""The explorer over stored starts: what there is, what is chosen, and what is drawn of it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from obdlab.lab.paper.questions import INDEX
from obdlab.lab.paper.results import Results
from obdlab.lab.paper.tables import as_html, table
from obdlab.lab.run.rows import Row, RowStore
from obdlab.lab.run.spec import Spec
from obdlab.lab.show.explorer import Explorer, ExplorerError, Starts
from obdlab.lab.show.waterfall import traffic, waterfall
from tests.lab.declared import declared
from tests.lab.paper.rows import TOTALS, start_rows, store_grid, store_starts

_ARMS = ("overlayfs", "obdlab", "obdlab-prefetch", "obdlab-hot")
SPEC = declared(
    "start", images=("nginx", "redis"), snapshotters=_ARMS, a_a=False, repeats=3, disks=("native", "cloud")
)


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    mpl.use("Agg")
    yield
    plt.close("all")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An evaluation's results: starts of two images, and an index."""
    totals = {key: 2 * seconds for key, seconds in TOTALS.items()}
    rows = start_rows() + start_rows(totals, image="nginx")
    store_starts(tmp_path / "evaluation-quick" / "start", SPEC, rows)
    store_grid(tmp_path / "evaluation-quick" / "index", Spec.from_values({"name": "x", "kind": "index"}), {})
    return tmp_path


def samples(figure: Figure) -> dict[str, list[float]]:
    """The samples of each arm."""
    lines = figure.axes[0].get_lines()
    return {str(line.get_label()): np.asarray(line.get_xdata(), dtype=float).tolist() for line in lines}


def test_experiments_of_starts_are_found_wherever_the_directory_begins(root: Path) -> None:
    assert list(Explorer(root).experiments) == ["evaluation-quick/start"]
    assert list(Explorer(root / "evaluation-quick").experiments) == ["start"]
    explorer = Explorer(root / "evaluation-quick" / "start")
    assert explorer.name == "start"
    contents = explorer.contents()
    assert contents["starts"].sum() == len(explorer.starts.rows) == 2 * 2 * len(TOTALS) * 3
    assert set(contents["image"]) == {"redis", "nginx"}


def test_what_is_not_there_is_said_and_nothing_is_made(root: Path) -> None:
    with pytest.raises(ExplorerError, match="no results of container starts"):
        Explorer(root / "absent")
    assert not (root / "absent").exists()
    with pytest.raises(ExplorerError, match="of kind index, not container starts"):
        Starts(root / "evaluation-quick" / "index")
    with pytest.raises(ExplorerError, match=r"got 'quick', wanted one of evaluation-quick/start"):
        Explorer(root, "quick")
    explorer = Explorer(root)
    with pytest.raises(ExplorerError, match=r"image: not measured \(got 'mysql', wanted one of nginx, redis\)"):
        explorer.distribution(image="mysql")
    with pytest.raises(ExplorerError, match="no such axis"):
        explorer.table(rate=100)
    with pytest.raises(ExplorerError, match=r"arm: not measured \(got 'soci'"):
        explorer.waterfall("soci")
    with pytest.raises(ExplorerError, match=r"rank: wanted 1 to 3 \(got 4\)"):
        explorer.waterfall("obdlab", 4)


def test_failed_starts_are_left_out_and_counted(tmp_path: Path) -> None:
    spec = declared("s", a_a=False, repeats=2)
    rows = start_rows({("obdlab", "cold"): 2.0}, repeats=2)
    rows[0]["error"] = "not ready"
    starts = Starts(store_starts(tmp_path, spec, rows))
    assert (len(starts.rows), starts.failed) == (1, 1)
    RowStore(tmp_path).path.write_text("")
    with pytest.raises(ExplorerError, match="no good start"):
        Starts(tmp_path)


def test_a_choice_is_completed_by_what_was_measured_with_it(tmp_path: Path) -> None:
    spec = declared("s", a_a=False, repeats=1, rates_mbit=(100.0, 1000.0), rtts_ms=(5.0, 20.0))
    cold = {("obdlab", "cold"): 2.0}
    rows = start_rows(cold, 1) + start_rows(cold, 1, rate_mbit=1000.0, rtt_ms=20.0)
    starts = Starts(store_starts(tmp_path, spec, rows))
    assert starts.choose()["rate_mbit"] == 100
    assert starts.choose(rtt_ms=20)["rate_mbit"] == 1000
    assert starts.choices("rtt_ms", rate_mbit=1000) == [20]
    with pytest.raises(
        ExplorerError, match=r"rate_mbit: not measured with 5 ms \(got 1000, wanted one of 100 Mbit/s\)"
    ):
        starts.choose(rate_mbit=1000, rtt_ms=5)


def test_distributions_and_bars_are_of_the_chosen_rows(root: Path) -> None:
    figure = Explorer(root).distribution(image="redis", disk="cloud")
    shown = samples(figure)
    assert shown["obdlab"] == pytest.approx([2.1 * 1.5, 2.1 * 1.5 * 1.01, 2.1 * 1.5 * 1.02])
    assert figure.axes[1].texts[0].get_text() == "16.66 s"
    assert figure.get_suptitle() == (
        "evaluation-quick/start: redis, cold start over 100 Mbit/s, 5 ms round trip, cloud disk"
    )
    assert samples(Explorer(root).distribution())["overlayfs"] == pytest.approx([22.0, 22.22, 22.44])


def test_the_table_has_the_intervals_that_a_run_stopped_on(tmp_path: Path) -> None:
    # Each pair has the same ratio: an interval of pairs has no width, one of medians has.
    arms = ("overlayfs", "obdlab")
    for precision, shown in ((0.1, "0.19 [0.19, 0.19]"), (0.0, "0.19 [0.19, 0.20]")):
        spec = declared("s", images=("redis",), snapshotters=arms, a_a=False, repeats=4, precision=precision)
        store_starts(tmp_path / f"{precision}", spec, start_rows(repeats=4))
        explorer = Explorer(tmp_path / f"{precision}")
        assert list(explorer.table(start="cold")["vs baseline"]) == ["", shown]
    title = explorer.distribution(start="cold").axes[1].get_title("left")
    assert title == "medians with 95 % intervals (below six: range), by phase"


def test_a_waterfall_is_one_start_phase_after_phase(root: Path) -> None:
    figure = Explorer(root).waterfall("obdlab", 1, image="redis")
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert [bar.get_width() for bar in bars] == pytest.approx([0.01, 0.418, 0.418, 1.254])
    for before, after in pairwise(bars):
        assert after.get_x() == pytest.approx(before.get_x() + before.get_width())
        assert after.get_y() > before.get_y()
    assert figure.axes[0].get_title("left") == "redis, obdlab #1, cold: ready after 2.10 s"
    assert "1.0 MB received until ready\n10 requests" in figure.axes[1].texts[0].get_text()
    # The middle one of three, and of the arm after the baseline, if nothing is said.
    assert "obdlab #2" in Explorer(root).waterfall(image="redis").axes[0].get_title("left")


def test_a_waterfall_of_what_rows_may_lack_or_have() -> None:
    bare: Row = {"image": "i", "arm": "a", "start": "warm", "total_s": 0.0}
    assert traffic(bare) == []
    waterfall(bare).canvas.draw()
    row = start_rows({("obdlab", "cold"): 2.0}, 1)[0] | {"completion_s": 5.0, "completion_bytes": 9e6, "quiet": False}
    figure = waterfall(row)
    assert figure.axes[0].get_xlim()[1] > 5
    assert "registry still" in figure.axes[0].texts[-1].get_text()
    assert "9.0 MB with what came after" in traffic(row)
    assert traffic(row)[-1].startswith("busy host")


def test_the_panel_shows_what_is_chosen_and_narrows_the_rest(root: Path) -> None:
    from obdlab.contrib.widgets import Panel

    panel = Panel(Explorer(root))
    assert panel.chosen == {"image": "nginx", "rate_mbit": 100, "rtt_ms": 5, "disk": "native", "start": "cold"}
    assert [name for name, _ in panel.axes["rate_mbit"].options] == ["100 Mbit/s"]
    assert panel.arm.value == "obdlab"
    assert panel.rank.options[1][0] == "2 of 3: 4.24 s"
    seen = {panel.distribution.value}
    panel.axes["image"].value = "redis"
    panel.axes["start"].value = "warm"
    assert panel.chosen["image"] == "redis"
    assert panel.distribution.value not in seen
    assert ">0.41 " in panel.table.value or "0.40" in panel.table.value
    before = panel.waterfall.value
    panel.rank.value = 3
    assert panel.waterfall.value != before
    pixels = matplotlib.image.imread(io.BytesIO(panel.waterfall.value))
    assert (pixels[:, :, :3].min(axis=2) < 0.5).mean() > 0.01
    assert len(panel.widget().children) == 6


def test_tables_have_numbers_right_and_say_once_what_is_the_same(root: Path) -> None:
    index = as_html(table(Results(root / "evaluation-quick"), INDEX))
    assert "All rows: 5 of each." in index
    assert re.search(r"<th style='text-align:right[^']*'>lookup, µs</th>", index)
    assert re.search(r"<td style='text-align:right[^']*'>100,000</td>", index)
    text = as_html(Explorer(root).table(image="redis"))
    assert re.search(r"<th style='text-align:left[^']*'>arm</th>", text)
    assert "All rows" not in text
    assert re.search(r"<td style='text-align:right[^']*'>2.12 <span ", text)


MEASURED = Path(__file__).parents[3] / "experiments" / "measured"
DOCS = Path(__file__).parents[3] / "docs" / "explanation" / "evaluation.md"


def test_all_that_was_measured_is_shown_and_what_is_not_is_said() -> None:
    explorer = Explorer(MEASURED, "peers")
    assert explorer.starts.note().startswith("1,363 of 1,367 stored rows; left out: 4 failed")
    assert explorer.contents()["starts"].sum() == 1363
    for name in explorer.experiments:
        starts = explorer.open(name)
        assert len(starts.rows) + starts.failed == starts.stored, name
    # Settings that were compared are arms, not one arm's mixture.
    assert explorer.open("extents").choices("arm") == ["obdlab", "obdlab (cache_extent_max=0)"]


def test_older_code_is_left_out_under_the_same_conditions(tmp_path: Path) -> None:
    rows = start_rows({("obdlab", "cold"): 2.0}, repeats=2)
    directory = store_starts(tmp_path, declared("s", a_a=False, repeats=2), rows)
    newer = [{**row, "cell": f"new-{number}", "context": "new", "attempt": 10**18 + number}
             for number, row in enumerate(start_rows({("obdlab", "cold"): 1.0}, repeats=2))]  # fmt: skip
    RowStore(directory).append(newer)
    starts = Starts(directory)
    assert {row["context"] for row in starts.rows} == {"new"}
    assert "4 of 6 stored rows; left out: 2 were measured again" in starts.note()


def test_two_builds_of_an_image_are_never_one_arm(tmp_path: Path) -> None:
    rows = start_rows({("obdlab", "cold"): 2.0}, repeats=2, image_digest="sha256:aa")
    directory = store_starts(tmp_path, declared("s", a_a=False, repeats=2), rows)
    context = RowStore(directory).rows()[0]["context"]
    newer = start_rows({("obdlab", "cold"): 1.0}, repeats=2, image_digest="sha256:bb", context=context)
    RowStore(directory).append({**row, "cell": f"b{n}", "attempt": 10**18 + n} for n, row in enumerate(newer))
    starts = Starts(directory)
    assert {row["image_digest"] for row in starts.rows} == {"sha256:bb"}
    assert "left out: 2 were measured again" in starts.note()


def test_two_workloads_are_never_one_arm(tmp_path: Path) -> None:
    spec = declared("s", a_a=False, repeats=2)
    directory = store_starts(tmp_path, spec, start_rows({("obdlab", "cold"): 2.0}, repeats=2))
    stored = RowStore(directory).rows()[0]
    same = {key: stored[key] for key in ("context", "algorithm", "block_size")}
    newer = start_rows({("obdlab", "cold"): 9.0}, repeats=2, workload="du", **same)
    RowStore(directory).append({**row, "cell": f"du{n}", "attempt": 10**18 + n} for n, row in enumerate(newer))
    starts = Starts(directory)
    assert {row["workload"] for row in starts.rows} == {"du"}
    assert "left out: 2 were measured again, or of an older image, code, workload or compression" in starts.note()


def test_before_any_experiment_it_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obdlab.lab.show.explorer.default_results", lambda: tmp_path / "results")
    assert Explorer().root == MEASURED
    assert not (tmp_path / "results").exists()


def test_the_calls_in_the_documentation_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert block is not None
    assert "Explorer(" in block[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(MEASURED.parent)
    exec(compile(block[1], str(DOCS), "exec"), {})
    assert (tmp_path / "fastest.png").stat().st_size > 5000
