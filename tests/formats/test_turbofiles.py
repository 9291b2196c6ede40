"""The file that names a turboOCI layer's target."""

from __future__ import annotations

import pytest

from obdlab.errors import FormatError
from obdlab.formats.turbofiles import MAX_TARGET_FILE, NamedTarget

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize("size", [0, 4096, (1 << 63) - 1])
def test_what_is_written_is_read(size: int) -> None:
    data = NamedTarget(DIGEST, size).to_bytes()
    assert data == f"{DIGEST},{size}\n".encode()
    assert len(data) < MAX_TARGET_FILE
    assert NamedTarget.parse(data, "blob") == (DIGEST, size)


@pytest.mark.parametrize(
    "text",
    ["", "\n", DIGEST, f"{DIGEST}\n", f"{DIGEST},1", f"{DIGEST},-1\n", f"{DIGEST},1\n\n", f"{DIGEST.upper()},1\n"],
)
def test_texts_that_name_none(text: str) -> None:
    with pytest.raises(FormatError, match=r"^blob: (\.turbo\.target: not a target|not a digest)"):
        NamedTarget.parse(text.encode(), "blob")


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(FormatError, match="not a target"):
        NamedTarget.parse(b"\xff" * MAX_TARGET_FILE, "blob")
