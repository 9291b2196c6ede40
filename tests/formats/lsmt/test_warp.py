"""Records of warp layers: tags, and what they may map."""

from __future__ import annotations

import pytest

from obdlab.errors import FormatError
from obdlab.formats.lsmt.layout import Segments
from obdlab.formats.lsmt.warp import check_warp_segments, in_one_file, remote_end

INDEX = 16 * 512  # the layer's data is in the sectors 8 to 15
TARGET = 100 * 512
Row = tuple[int, int, int, bool, int]


def checked(rows: list[Row], target_size: int = TARGET) -> list[Row]:
    return check_warp_segments(Segments.from_rows(rows), INDEX, target_size, blob="meta", target="tar").rows()


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [((0, 1), (0, 1)), ((0, 0), (0, 0)), ((1, 1), (1, 1)), ((1, 2), (0, 1)), ((7, 8), (0, 1)), ((8, 7), (1, 0))],
)
def test_tags_are_lowered_but_a_lone_one_means_the_target(tags: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert [row[4] for row in checked([(0, 1, 8, False, tags[0]), (1, 1, 9, False, tags[1])])] == list(wanted)


@pytest.mark.parametrize("tags", [(0, 2), (2, 2), (3, 5), (255, 0), (0, 255)])
def test_tags_that_do_not_tell_are_refused(tags: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match=r"^meta: tags .* at offset 8192 \(got tags from"):
        checked([(0, 1, 8, False, tags[0]), (1, 1, 9, False, tags[1])])


def test_tags_of_zeroed_records_do_not_count() -> None:
    rows = [(0, 1, 99_999, True, 9), (1, 1, 8, False, 0), (2, 1, 3, False, 1), (3, 1, 0, True, 1)]
    assert checked(rows) == [(*row[:4], tag) for row, tag in zip(rows, (0, 0, 1, 0), strict=True)]


def test_each_kind_of_record_has_its_own_bounds() -> None:
    checked([(0, 8, 8, False, 0), (8, 100, 0, False, 1)])
    for row in ((0, 1, 7, False, 0), (0, 9, 8, False, 0), (0, 1, 50, False, 0)):
        with pytest.raises(FormatError, match=r"^meta: LSMT index record 0 points outside of the layer's data"):
            checked([row, (9, 1, 0, False, 1)])


@pytest.mark.parametrize("row", [(0, 101, 0, False, 1), (0, 1, 100, False, 1), (0, 16383, (1 << 55) - 1, False, 1)])
def test_a_target_that_is_too_short_is_refused_and_named(row: Row) -> None:
    wanted = (row[1] + row[2]) * 512
    with pytest.raises(FormatError, match=rf"^tar: meta needs .* \(got 51200 bytes .* wanted at least {wanted}\)"):
        checked([row])
    assert len(checked([(0, 1, 5, False, 1)], 6 * 512)) == 1
    with pytest.raises(FormatError):
        checked([(0, 1, 5, False, 1)], 6 * 512 - 1)


def test_order_is_checked_over_both_kinds() -> None:
    with pytest.raises(FormatError, match="record 1 is out of order"):
        checked([(0, 5, 8, False, 0), (4, 1, 0, False, 1)])


def test_one_file_of_both() -> None:
    rows = Segments.from_rows([(0, 2, 8, False, 0), (2, 3, 5, False, 1), (5, 1, 4, True, 1)])
    assert in_one_file(rows, 1000).rows() == [(0, 2, 8, False, 0), (2, 3, 1005, False, 0), (5, 1, 4, True, 0)]
    assert remote_end(rows[1:]) == 8 * 512
    assert remote_end(rows[:0]) == 0
