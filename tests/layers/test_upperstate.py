"""Walks through the states of writable layers: calls that the table does not allow change nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import SourceError
from obdlab.layers.upper import open_upper
from obdlab.layers.upperstate import TRANSITIONS, State
from obdlab.layers.writable import Upper
from obdlab.states import IllegalTransitionError
from tests.layers.uppers import KINDS, Files

DISK = 1 << 20
MOVES: dict[str, tuple[Callable[[Upper], object], State]] = {
    "seal": (lambda upper: upper.seal_file(), State.SEALED),
    "unseal": (lambda upper: upper.unseal(), State.WRITABLE),
    "retire": (lambda upper: upper.retire(), State.RETIRED),
    "close": (lambda upper: upper.close(), State.CLOSED),
}


class Walk:
    """A layer on its way, and the disk that it must show."""

    def __init__(self, files: Files, *, read_only: bool) -> None:
        upper = files.create(DISK)
        upper.write_at(4096, b"a" * 4096)
        self.content = bytearray(upper.read_at(0, DISK))
        if read_only:
            upper.close()
            upper = open_upper(files.data, files.index, read_only=True)
        self.upper = upper
        self.writes = 0

    def move(self, name: str) -> None:
        call, wanted = MOVES[name]
        before = self.upper.state
        # Sealing twice is refused as writing is. The other calls may be repeated.
        legal = wanted in TRANSITIONS[before] or (wanted is before and name != "seal")
        if legal:
            call(self.upper)
            assert self.upper.state is wanted
        else:
            with pytest.raises((IllegalTransitionError, SourceError)):
                call(self.upper)
            assert self.upper.state is before

    def write(self) -> None:
        self.writes += 1
        data = bytes([self.writes % 251]) * 4096
        offset = 4096 * (self.writes % 200)
        if self.upper.state is State.WRITABLE:
            self.upper.write_at(offset, data)
            self.content[offset : offset + 4096] = data
        else:
            for call in (
                lambda: self.upper.write_at(offset, data),
                lambda: self.upper.discard(offset, 4096),
                lambda: self.upper.set_virtual_size(2 * DISK),
            ):
                with pytest.raises(SourceError, match=r"layer was sealed or opened|layer file is closed"):
                    call()

    def check(self) -> None:
        if self.upper.state is State.CLOSED:
            with pytest.raises(SourceError, match="layer file is closed"):
                self.upper.read_at(0, DISK)
        else:
            assert self.upper.read_at(0, DISK) == bytes(self.content)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    read_only=st.booleans(),
    steps=st.lists(st.sampled_from(["write", "write", *MOVES]), max_size=10),
)
def test_a_layer_follows_its_table(kind: str, read_only: bool, steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        walk = Walk(Files.named(Path(folder), kind), read_only=read_only)
        try:
            for step in steps:
                if step == "write":
                    walk.write()
                else:
                    walk.move(step)
                walk.check()
        finally:
            walk.upper.close()


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_a_layer_begins_in(kind: str, tmp_path: Path) -> None:
    files = Files.named(tmp_path, kind)
    with files.create(DISK) as upper:
        assert upper.state is State.WRITABLE
    with files.open() as upper:
        assert upper.state is State.WRITABLE
    with open_upper(files.data, files.index, read_only=True) as upper:
        assert upper.state is State.READ_ONLY
    assert upper.state is State.CLOSED


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_retired_stays_sealed(kind: str, tmp_path: Path) -> None:
    """Its log is closed: before the table, unsealing cut off the index of a layer that others read."""
    files = Files.named(tmp_path, kind)
    upper = files.create(DISK)
    upper.write_at(0, b"x" * 4096)
    sealed = upper.seal()
    upper.retire()
    size = files.data.stat().st_size
    with pytest.raises(IllegalTransitionError, match=r"no way from State\.RETIRED to State\.WRITABLE"):
        upper.unseal()
    assert files.data.stat().st_size == size
    assert upper.state is State.RETIRED
    sealed.close()
