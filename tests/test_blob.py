"""Blobs measured and sliced like bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob

_BOUND = st.none() | st.integers(-40, 40)


@given(data=st.binary(max_size=30), begin=_BOUND, end=_BOUND, step=st.none() | st.integers(-5, 5).filter(bool))
def test_slices_are_those_of_bytes(data: bytes, begin: int | None, end: int | None, step: int | None) -> None:
    blob = MemoryBlob(data)
    assert len(blob) == len(data)
    assert blob[begin:end:step] == data[begin:end:step]


@given(data=st.binary(max_size=5), offset=st.integers(-7, 7))
def test_single_bytes_are_numbers(data: bytes, offset: int) -> None:
    if -len(data) <= offset < len(data):
        assert MemoryBlob(data)[offset] == data[offset]
    else:
        with pytest.raises(IndexError, match=r"memory: no byte"):
            MemoryBlob(data)[offset]


def test_an_empty_blob_is_still_one() -> None:
    assert MemoryBlob(b"")
    assert list(MemoryBlob(b"abc")) == [97, 98, 99]
