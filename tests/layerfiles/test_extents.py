"""Where disks hold data, against what is read there."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import OutOfRangeError
from obdlab.image.open import open_stack
from obdlab.layerfiles import extents as module
from obdlab.layerfiles.extents import extents
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.upper import SparseUpper
from tests.layers.golden import GOLDEN

LAYER = GOLDEN / "lsmt" / "l1.lz4.lsmt"


def check(disk: Stack | WritableStack, offset: int, length: int) -> list[tuple[int, bool]]:
    found, at = extents(disk, offset, length), offset
    for size, data in found:
        assert size > 0
        if not data:
            assert not any(disk.read_at(at, size))
        at += size
    assert at == offset + length
    assert all(one[1] != next_one[1] for one, next_one in pairwise(found))
    return found


@given(st.data())
def test_what_is_no_data_is_zeros(data: st.DataObject) -> None:
    with open_stack([LAYER]) as disk:
        offset = data.draw(st.integers(0, disk.size - 1))
        check(disk, offset, data.draw(st.integers(1, disk.size - offset)))
        with pytest.raises(OutOfRangeError):
            extents(disk, offset, disk.size - offset + 1)


def test_a_writable_layer_over_others(tmp_path: Path) -> None:
    lowers = open_stack([LAYER])
    size = lowers.size + (1 << 20)
    with WritableStack(lowers, SparseUpper.create(tmp_path / "upper", size)) as disk:
        before = check(disk, 0, size)
        assert before[-1][0] >= 1 << 20
        assert not before[-1][1]
        disk.write_at(size - 4096, b"x" * 4096)
        assert check(disk, 0, size)[-1] == (4096, True)
        held = next(sum(piece[0] for piece in before[:n]) for n, piece in enumerate(before) if piece[1])
        disk.discard(held, 4096)
        assert not any(disk.read_at(held, 4096))
        check(disk, 0, size)


def test_a_large_range_is_answered_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 4096)
    with open_stack([LAYER]) as disk:
        assert sum(length for length, _ in extents(disk, 512, disk.size - 512)) == 4096
