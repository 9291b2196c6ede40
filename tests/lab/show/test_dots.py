"""Rows of samples and ratios, and lines: the numbers that end up in a picture."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes

from obdlab.lab.run.statistics import Estimate
from obdlab.lab.show.dots import draw_lines, draw_ratios, draw_samples


@pytest.fixture
def axes() -> Iterator[Axes]:
    mpl.use("Agg")
    figure, found = plt.subplots()
    yield found
    figure.canvas.draw()
    plt.close(figure)


def values(axes: Axes, name: str) -> list[float]:
    (line,) = [line for line in axes.lines if line.get_label() == name]
    return [float(value) for value in np.asarray(line.get_xdata(), dtype=float)]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_every_sample_is_a_ratio_to_the_baselines_median(axes: Axes) -> None:
    draw_ratios(axes, {"obdlab": [1.0, 2.0, 3.0], "overlayfs": [3.0, 4.0, 6.0]}, "", baseline="overlayfs")
    assert values(axes, "obdlab") == [0.25, 0.5, 0.75]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["overlayfs", "obdlab"]
    assert texts(axes) == ["1.00", "0.50"]
    assert axes.get_xlabel() == "time, ratio to overlayfs"


def test_the_papers_ratios_stand_in_the_rows_of_their_arms(axes: Axes) -> None:
    paper = {"obdlab": 0.19, "CRFS": 1.71}
    draw_ratios(axes, {"overlayfs": [2.0], "obdlab": [1.0]}, "", baseline="overlayfs", paper=paper)
    assert texts(axes) == ["1.00", "0.50", "0.19", "1.71"]
    marks = {
        float(line.get_xdata()[0]): round(float(line.get_ydata()[0]), 6)
        for line in axes.lines
        if line.get_marker() == "D"
    }
    assert marks == {0.19: 1.28, 1.71: 2.28}


def test_an_interval_far_beyond_the_samples_does_not_squeeze_them(axes: Axes) -> None:
    draw_ratios(axes, {"overlayfs": [2.0, 2.1], "obdlab": [1.0, 3.0]}, "", baseline="overlayfs")
    (arrow,) = [line for line in axes.lines if line.get_marker() == ">"]
    assert float(np.asarray(arrow.get_xdata())[0]) == pytest.approx(1.5 * 3.0 / 2.05)
    assert axes.get_xlim()[1] < 4


def test_a_given_ratio_is_drawn_in_place_of_the_samples_own(axes: Axes) -> None:
    measured = {"overlayfs": [2.0, 2.1, 2.2], "obdlab": [1.0, 1.1, 1.2], "soci": [1.0, 1.1, 1.2]}
    draw_ratios(axes, measured, "", baseline="overlayfs", found={"obdlab": Estimate(0.45, 0.3, 0.6, 3)})
    assert texts(axes) == ["1.00", "0.45", "0.52"]
    whiskers = [
        np.asarray(line.get_xdata()).tolist()
        for line in axes.lines
        if np.asarray(line.get_ydata()).tolist() == [1, 1]
    ]
    assert [0.3, 0.6] in whiskers


def test_one_sample_has_no_whisker(axes: Axes) -> None:
    draw_samples(axes, {"a": [1.0], "b": [1.0, 2.0]}, "", "s")
    whiskers = [
        list(line.get_xdata()) for line in axes.lines if line.get_color() == "black" and line.get_marker() == "None"
    ]
    assert whiskers == [[1.0, 2.0]]


def test_without_a_baseline_there_is_no_ratio(axes: Axes) -> None:
    draw_ratios(axes, {"obdlab": [1.0]}, "t", baseline="overlayfs")
    assert texts(axes) == ["not measured"]


def test_lines_go_through_medians_and_show_the_papers_limit(axes: Axes) -> None:
    draw_lines(axes, {"a": {1: [1.0, 5.0, 3.0], 4: [2.0]}}, "", x="x", y="y", limit=(6.0, "paper"))
    (line,) = [line for line in axes.lines if line.get_label() == "a"]
    assert list(line.get_ydata()) == [3.0, 2.0]
    assert texts(axes) == ["paper"]
    assert axes.get_ylim()[1] == pytest.approx(6.9)


def test_simulated_lines_look_like_no_measured_ones(axes: Axes) -> None:
    draw_lines(axes, {"a": {1: [1.0, 5.0, 3.0], 4: [2.0]}}, "", x="x", y="y")
    measured = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
    axes.clear()
    draw_lines(axes, {"a": {1: [1.0, 5.0, 3.0], 4: [2.0]}}, "", x="x", y="y", origin="simulated")
    drawn = [line for line in axes.lines if line.get_marker() != "None"]
    assert drawn
    assert not measured & {(line.get_linestyle(), line.get_marker()) for line in drawn}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a (simulated)"]
