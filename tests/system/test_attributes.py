"""Attributes of the kernel: one write is one order, whatever the kernel answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from obdlab.system.attributes import write_attribute


def test_the_attribute_holds_the_text(tmp_path: Path) -> None:
    path = tmp_path / "attribute"
    path.write_text("longer than before")
    write_attribute(path, "1")
    assert path.read_text() == "1"


def test_a_refused_order_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[bytes] = []
    write, close, closed = os.write, os.close, []
    monkeypatch.setattr(os, "write", lambda fd, data: (texts.append(bytes(data)), write(fd, data))[1])
    monkeypatch.setattr(os, "close", lambda fd: (closed.append(fd), close(fd)))
    with pytest.raises(OSError, match="No space left"):
        write_attribute(Path("/dev/full"), "1")
    assert (texts, len(closed)) == ([b"1"], 1)
