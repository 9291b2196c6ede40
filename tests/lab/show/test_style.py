"""The look that all figures share."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from obdlab.lab.show import style


def test_an_arm_has_one_colour_under_every_label() -> None:
    assert style.colour("obdlab") == style.colour("obdlab (A/A)") == style.colour("obdlab, cold")
    assert style.colour("obdlab") == style.colour("redis: obdlab") == style.COLOURS["obdlab"]
    assert style.colour("another", 1) != style.colour("another", 2)


def test_a_caption_tells_samples_host_commit_and_day() -> None:
    rows = [{"started": "2026-11-27T02", "repeat": 0, "quiet": True}, {"started": "2026-11-29T02", "repeat": 1}]
    host = {"cores": 2, "cpu_model": "Box", "kernel": "6.12.1-x", "memory_bytes": 2**34, "git_commit": "a" * 40}
    wanted = "n = 2 at each point (2 rows), Box, 2 cores, 16 GiB, Linux 6.12.1, commit aaaaaaaaaaaa"
    assert style.caption(rows, [host]) == f"{wanted}, 2026-11-27 to 2026-11-29."
    assert style.caption([{"quiet": False}], []).endswith("busy host.")
    assert style.caption([], [host]) == ""


def test_a_caption_counts_the_repeats_of_points() -> None:
    few = [{"kind": "index", "segments": 100, "layers": layers, "repeat": n} for layers in (1, 4) for n in range(3)]
    many = [{"kind": "start", "arm": "obdlab", "start": start, "repeat": n} for start in ("cold", "warm")
            for n in range(10)]  # fmt: skip
    assert style.caption(few, []) == "n = 3 at each point (6 rows)."
    assert style.caption([*few, *many, *many], []) == "n = 3 to 10 by point (46 rows)."


def test_origins_share_neither_line_style_nor_marker_nor_label() -> None:
    assert set(style.ORIGINS) == {"measured", "emulated", "simulated"}
    for column in zip(*style.ORIGINS.values(), strict=True):
        assert len(set(column)) == len(style.ORIGINS)
    assert style.origin_look("simulated", "rooted")["label"] == "rooted (simulated)"
    assert style.origin_look("measured", "rooted") == {"linestyle": "-", "marker": "o", "label": "rooted"}
    caption = style.caption([{"label": "simulated", "repeat": 0}], [])
    assert caption.startswith("Simulated n = 1")
    assert "imulated" not in style.caption([{"repeat": 0}], [])


def test_a_figure_is_kept_as_vectors_and_pixels_the_same_twice(tmp_path: Path) -> None:
    mpl.use("Agg")
    kept = []
    for name in ("first", "second"):
        figure, axes = plt.subplots()
        axes.plot([1, 2], [3, 4])
        (tmp_path / name).mkdir()
        style.publish(figure, tmp_path / name / "figure", "a caption")
        plt.close(figure)
        kept.append({path.suffix: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert kept[0] == kept[1]
    assert set(kept[0]) == {".pdf", ".svg", ".png", ".txt"}
    assert b"a caption" in kept[0][".txt"]
