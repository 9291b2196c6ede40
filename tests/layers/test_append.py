"""Reading the original's append-mode layers, and what crashes and damage leave of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obdlab.errors import FormatError, ObdlabError
from obdlab.formats.lsmt.layout import Segments, encode_segments, filler_records
from obdlab.layers.append import AppendUpper
from obdlab.layers.stack import Stack
from tests.layers.golden import LSMT, entry, sha256_of


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_append_layers_read_as_the_originals(name: str) -> None:
    with AppendUpper.open(LSMT / f"{name}.data", LSMT / f"{name}.index") as upper:
        assert upper.uuid[0] == name[1]
        assert sha256_of(Stack([upper])) == entry(f"{name}.data")["decoded_sha256"]


def _append_layer(folder: Path, log: bytes, data_sectors: int = 8) -> AppendUpper:
    (folder / "data").write_bytes((LSMT / "c1.data").read_bytes() + b"d" * 512 * data_sectors)
    (folder / "index").write_bytes((LSMT / "c1.index").read_bytes() + log)
    return AppendUpper.open(folder / "data", folder / "index")


def _log(*rows: tuple[int, int, int, bool, int]) -> bytes:
    return encode_segments(Segments.from_rows(list(rows)))


def test_later_records_win_and_fillers_are_skipped(tmp_path: Path) -> None:
    log = _log((0, 4, 8, False, 0)) + filler_records(3) + _log((2, 4, 12, False, 5), (3, 1, 16, True, 0))
    with _append_layer(tmp_path, log) as upper:
        assert upper.index.segments().rows() == [
            (0, 2, 8, False, 0),
            (2, 1, 12, False, 0),
            (3, 1, 16, True, 0),
            (4, 2, 14, False, 0),
        ]


def test_what_a_crash_leaves_at_the_end_is_dropped(tmp_path: Path) -> None:
    log = _log((0, 4, 8, False, 0), (8, 4, 14, False, 0), (9, 4, 16, False, 0)) + b"torn"
    with _append_layer(tmp_path, log) as upper:
        assert upper.index.segments().rows() == [(0, 4, 8, False, 0)]


def test_a_bad_record_elsewhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"index: LSMT index record 0 points outside .*got sectors \[14, 18\)"):
        _append_layer(tmp_path, _log((0, 4, 14, False, 0), (0, 4, 8, False, 0)))


def test_a_data_file_is_no_index() -> None:
    with pytest.raises(FormatError, match=r"not the index of a writable layer \(got flags 0x3, index at 0"):
        AppendUpper.open(LSMT / "c1.data", LSMT / "c1.data")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_damaged_files_give_an_error_or_a_readable_layer(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for name in ("data", "index"):
        content = bytearray((LSMT / f"l1.{name}").read_bytes())
        for _ in range(rng.randint(0, 4)):
            content[rng.choice((rng.randrange(390), 4096 + rng.randrange(960)))] = rng.choice((0, 0xFF, 1, 0x80))
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        (tmp_path / name).write_bytes(content)
    try:
        with Stack([AppendUpper.open(tmp_path / "data", tmp_path / "index")]) as stack:
            stack.read_at(0, min(stack.size, 1 << 20))
    except ObdlabError:
        pass
