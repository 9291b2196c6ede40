from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.patches import Rectangle

from obdlab.lab.paper.published import paper_values
from obdlab.lab.run.rows import Row
from obdlab.lab.run.starts import summaries_of
from obdlab.lab.run.summary import findings, summarise
from obdlab.lab.show.figures import startup_figure
from tests.lab.declared import declared
from tests.lab.run.test_statistics import _row


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    mpl.use("Agg")
    yield
    plt.close("all")


def _rows() -> list[Row]:
    rows = []
    for start, seconds, factor in (("cold", 4.0, 0.25), ("warm", 0.3, 1.05)):
        for repeat in range(5):
            drift = 1 + repeat / 50
            rows.append(_row("overlayfs", start, seconds * drift))
            rows.append(_row("overlayfs (A/A)", start, seconds * drift * 1.01))
            rows.append(_row("obdlab", start, seconds * drift * factor))
    return rows


def test_bars_are_medians_and_the_papers_ratios_share_an_axis() -> None:
    figure = startup_figure(_rows())
    cold, cold_ratios, warm, warm_ratios = figure.axes
    texts = [text.get_text() for text in cold.texts]
    assert texts[0] == "4.16 s"
    assert texts[2] == "1.04 s, ×0.25"
    assert "×1.05" in warm.texts[2].get_text()
    # 2.15 s of 11.06 s, 0.427 s of 0.487 s.
    assert {"0.25", "0.19", "1.71"} <= {text.get_text() for text in cold_ratios.texts}
    assert {"1.05", "0.88"} <= {text.get_text() for text in warm_ratios.texts}
    names = [label.get_text() for label in cold_ratios.get_yticklabels()]
    assert names[:3] == ["overlayfs", "overlayfs again", "obdlab"]
    # The stack of one bar ends at the median total.
    bars = [patch for patch in cold.patches if isinstance(patch, Rectangle)]
    ends = [bar.get_x() + bar.get_width() for bar in bars if bar.get_y() < 0]
    assert max(ends) == pytest.approx(4.16)


def test_each_image_has_a_baseline_of_its_own() -> None:
    others = [{**row, "image": "other", "total_s": 2 * row["total_s"]} for row in _rows()]
    ratios = startup_figure([*_rows(), *others]).axes[1]
    found = {str(line.get_label()): np.median(np.asarray(line.get_xdata(), dtype=float)) for line in ratios.lines}
    assert found["other: obdlab"] == pytest.approx(0.25)
    assert found["other: overlayfs"] == pytest.approx(1.0)
    # The paper has neither of them.
    assert "0.19" not in {text.get_text() for text in ratios.texts}


def test_whiskers_of_a_run_that_could_stop_early_are_those_of_the_table() -> None:
    spec = declared(a_a=False, repeats=10, precision=0.1)
    rows = [
        _row(arm, "cold", total_s + noise, repeat=repeat, disk="native", recipe="redis")
        for arm, total_s in (("overlayfs", 4.0), ("obdlab", 3.0))
        for repeat, noise in enumerate((0.1, -0.1, 0.05, 0.2))
    ]
    summaries = summaries_of(spec, rows)
    (ratio,) = [each.ratio for each in summaries if each.ratio is not None]
    axes = startup_figure(rows, "overlayfs", summaries).axes[1]
    whiskers = [
        [float(end) for end in np.asarray(line.get_xdata(), dtype=float)]
        for line in axes.lines
        if np.asarray(line.get_ydata()).tolist() == [1, 1] and line.get_color() == "black"
    ]
    assert whiskers == [[ratio.low, ratio.high]]
    (plain,) = [each.ratio for each in summarise(rows) if each.ratio is not None]
    assert (plain.low, plain.high) != (ratio.low, ratio.high)


def test_one_start_has_no_error_bar() -> None:
    one, several = (
        startup_figure([row for row in _rows() if row["start"] == "cold"][:count]).axes[0] for count in (3, 6)
    )
    assert not [each for each in one.containers if isinstance(each, ErrorbarContainer)]
    assert len([each for each in several.containers if isinstance(each, ErrorbarContainer)]) == 3


def test_two_networks_do_not_share_a_figure() -> None:
    rows = [*_rows(), _row("obdlab", "cold", 1.0, rtt_ms=20.0)]
    with pytest.raises(ValueError, match="one network a figure"):
        startup_figure(rows)


def test_cold_only_is_drawn_too() -> None:
    figure = startup_figure([row for row in _rows() if row["start"] == "cold"])
    assert figure.axes[2].texts[0].get_text() == "not measured"


def test_findings_name_winner_ratio_and_reason() -> None:
    cold, warm = findings(summarise(_rows()))
    assert "obdlab is faster than overlayfs" in cold
    assert "×0.25" in cold
    assert "received" in cold
    assert "received" not in warm


def test_paper_values_are_of_that_figure_only() -> None:
    values = paper_values("Fig14")
    assert len(values) >= 7
    assert {value.figure.split()[0] for value in values} == {"Fig14"}
    assert paper_values("Fig1") == []
