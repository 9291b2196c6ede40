"""Asking NetworkManager if the link is metered; its answers as busctl prints them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from obdlab.system.metered import Metered


def answering(text: str, status: int = 0) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import sys; print({text!r}); sys.exit({status})")


@pytest.mark.parametrize(
    ("text", "metered"), [("u 0", False), ("u 1", True), ("u 2", False), ("u 3", True), ("u 4", False), ("", False)]
)
def test_its_answers(tmp_path: Path, text: str, metered: bool) -> None:
    assert Metered(answering(text), tmp_path)() is metered


def test_without_a_bus_or_a_command(tmp_path: Path) -> None:
    assert not Metered(answering("u 1"), tmp_path / "missing")()
    assert not Metered((str(tmp_path / "missing"),), tmp_path)()
    assert not Metered(answering("", 1), tmp_path)()
