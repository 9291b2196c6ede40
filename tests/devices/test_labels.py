"""Labels of loop devices, by the directories that they belong to."""

from __future__ import annotations

from pathlib import Path

from obdlab.devices.fuse_loop import label_below


def test_a_link_to_itself_has_a_label_too(tmp_path: Path) -> None:
    # A container can make such a link below a directory that is searched for devices.
    (tmp_path / "loop").symlink_to("loop")
    assert label_below(tmp_path / "loop") == label_below(tmp_path / "loop")


def test_a_link_and_its_target_have_the_same_label(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    assert label_below(tmp_path / "link" / "disk") == label_below(tmp_path / "run" / "disk")
    assert label_below(tmp_path / "run" / "other") != label_below(tmp_path / "run" / "disk")
