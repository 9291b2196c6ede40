"""Writable layers and stacks of both kinds under random changes, snapshots, collections and crashes.

The model is a bytearray and shares nothing with the package: what may be read after a crash follows from the copies
of it that were taken at every change since the last flush.
"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from obdlab.blob import MemoryBlob
from obdlab.call import Call
from obdlab.layers.append import AppendUpper
from obdlab.layers.commit import ZeroBlocks, commit
from obdlab.layers.gc import collect
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.stack import Stack, WritableStack
from obdlab.localfile import LocalFile
from tests.layers.uppers import KINDS, Files

SECTORS = 93  # ends inside a 4 KiB block
DISK = SECTORS * 512
PARTS = (0, 0.25, 0.5, 0.75, 1)


class WritableMachine(RuleBasedStateMachine):
    """A disk of several layers against a bytearray."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.made = 0
        self.lowers: list[LsmtLayer] = []
        self.model = bytearray(DISK)
        self.states: list[bytes] = []  # the disk at the last flush, and after each change since
        self.flushed_sizes = (0, 0)
        self.started = False

    @initialize(kind=st.sampled_from(KINDS), lower=st.booleans(), group=st.sampled_from((0, 0, 3)))
    def start(self, kind: str, lower: bool, group: int) -> None:
        self.kind, self.group = kind, group
        if lower:
            self.model[0 : DISK // 2] = os.urandom(DISK // 2)
            with self._next_files().create(DISK) as upper:
                upper.write_at(0, self.model[: DISK // 2 // 512 * 512])
                self._lower_of(upper)
            self.model[DISK // 2 // 512 * 512 :] = bytes(DISK - DISK // 2 // 512 * 512)
        self._go_on_in_new_upper()
        self.started = True

    def _next_files(self) -> Files:
        self.made += 1
        return Files.named(Path(self.folder.name), self.kind, f"layer{self.made}")

    def _lower_of(self, source: AppendUpper | Stack | WritableStack, **options: object) -> None:
        out = io.BytesIO()
        commit(source, out, **options)  # type: ignore[arg-type]
        self.lowers.append(LsmtLayer(MemoryBlob(out.getvalue(), "committed")))

    def _go_on_in_new_upper(self) -> None:
        self.files = self._next_files()
        self._stack_on(self.files.create(0 if self.lowers else DISK))
        self._flushed()

    def _stack_on(self, upper: object) -> None:
        if isinstance(upper, AppendUpper):
            upper.set_group_commit(self.group)
        self.stack = WritableStack(Stack(self.lowers) if self.lowers else None, upper)  # type: ignore[arg-type]

    def _changed(self) -> None:
        self.states.append(bytes(self.model))

    def _flushed(self) -> None:
        self.stack.flush()
        self._all_is_stored()

    def _all_is_stored(self) -> None:
        self.states = [bytes(self.model)]
        self.flushed_sizes = (self.files.data.stat().st_size, self.files.index.stat().st_size)

    @rule(offset=st.integers(0, DISK), data=st.binary(min_size=1, max_size=20), times=st.integers(1, 800))
    def write(self, offset: int, data: bytes, times: int) -> None:
        data = (data * times)[: DISK - offset]
        self.stack.write_at(offset, data)
        self.model[offset : offset + len(data)] = data
        self._changed()

    @rule(sector=st.integers(0, SECTORS - 1), count=st.integers(1, 20), fill=st.integers(0, 255))
    def write_sectors(self, sector: int, count: int, fill: int) -> None:
        self.write(sector * 512, bytes([fill]), count * 512)

    @rule(offset=st.integers(0, DISK), length=st.integers(0, DISK))
    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        length = min(length, DISK - offset)
        self.stack.discard(offset, length)
        self.model[offset : offset + length] = bytes(length)
        self._changed()

    @rule(sector=st.integers(0, SECTORS - 1), count=st.integers(1, 40))
    def discard_sectors(self, sector: int, count: int) -> None:
        self.discard(sector * 512, count * 512)

    @rule()
    def flush(self) -> None:
        self._flushed()

    @rule()
    def reopen(self) -> None:
        self.stack.upper.close()
        self._stack_on(self.files.open())

    @rule(data_part=st.sampled_from(PARTS), index_part=st.sampled_from(PARTS), odd=st.integers(0, 600))
    def crash(self, data_part: float, index_part: float, odd: int) -> None:
        """Lose any part of what the files gained since the last flush."""
        if self.kind == "sparse":  # nothing grows: whatever was not flushed may or may not be there
            self.reopen()
            return
        copy = self.files.copy_to(Path(self.folder.name) / "crashed")
        for path, kept, part in ((copy.data, 0, data_part), (copy.index, 1, index_part)):
            least, size = self.flushed_sizes[kept], path.stat().st_size
            os.truncate(path, max(least, size - odd) if part > 0.7 else least + int((size - least) * part))
        self.stack.upper.close()
        copy.data.replace(self.files.data)
        copy.index.replace(self.files.index)
        self._stack_on(self.files.open())
        now = self.stack.read_at(0, DISK)
        for at in range(0, DISK, 512):
            assert now[at : at + 512] in {state[at : at + 512] for state in self.states}
        self.model[:] = now
        self._flushed()

    @precondition(lambda self: self.started and self.kind == "append")
    @rule()
    def collect(self) -> None:
        upper = self.stack.upper
        assert isinstance(upper, AppendUpper)
        collect(upper)
        self._all_is_stored()  # or its data would be gone after a crash

    @rule(zeros=st.sampled_from((ZeroBlocks.KEEP, ZeroBlocks.MARK)))
    def commit_and_go_on(self, zeros: ZeroBlocks) -> None:
        self._lower_of(self.stack.upper, zero_blocks=zeros)  # type: ignore[arg-type]
        self.stack.upper.close()
        assert Stack(self.lowers).read_at(0, DISK) == self.model
        self._go_on_in_new_upper()

    @rule()
    def seal_and_go_on(self) -> None:
        with self.stack.upper.seal():
            self.stack.upper.retire()
        self.lowers.append(LsmtLayer(LocalFile(self.files.data)))
        assert Stack(self.lowers).read_at(0, DISK) == self.model
        self._go_on_in_new_upper()

    @rule(kind=st.sampled_from(KINDS), crash=st.booleans())
    def restack(self, kind: str, crash: bool) -> None:
        self.kind = kind
        fresh = self._next_files()
        sealed = self.stack.restack(fresh.create(0)).layer
        assert self.stack.lowers is not None
        self.lowers = [*self.lowers, sealed]
        self.files = fresh
        if isinstance(self.stack.upper, AppendUpper):
            self.stack.upper.set_group_commit(self.group)
        self._flushed()
        if crash:
            sealed.close()
            self.lowers[-1] = LsmtLayer(LocalFile(sealed.data.name))
            self.reopen()

    @rule(zeros=st.sampled_from(ZeroBlocks))
    def flatten(self, zeros: ZeroBlocks) -> None:
        out = io.BytesIO()
        commit(self.stack, out, zero_blocks=zeros)
        flat = LsmtLayer(MemoryBlob(out.getvalue(), "flat"))
        assert flat.virtual_size == DISK
        assert Stack([flat]).read_at(0, DISK) == self.model
        if zeros is ZeroBlocks.KEEP:
            self.stack.upper.close()
            self.lowers = [flat]
            self._go_on_in_new_upper()

    @rule()
    def seen_as_the_original_sees_it(self) -> None:
        """A plain merge of what an opening finds over the lowers."""
        self.stack.upper.close()
        with self.files.open() as upper:
            assert Stack([*self.lowers, upper]).read_at(0, DISK) == self.model
        self._stack_on(self.files.open())

    @rule(begin=st.integers(0, DISK), length=st.integers(0, DISK))
    def read(self, begin: int, length: int) -> None:
        length = min(length, DISK - begin)
        assert self.stack.read_at(begin, length) == self.model[begin : begin + length]

    @invariant()
    def same(self) -> None:
        if self.started:
            assert self.stack.read_at(0, DISK) == self.model

    def teardown(self) -> None:
        if self.started:
            self.stack.upper.close()
            for lower in self.lowers:
                lower.close()
        self.folder.cleanup()


TestWritable = WritableMachine.TestCase
TestWritable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class LongWritableMachine(WritableMachine):
    """The same, with many more steps."""


TestWritableLong = pytest.mark.timeout(1800)(pytest.mark.slow(LongWritableMachine.TestCase))
TestWritableLong.settings = settings(max_examples=2000, stateful_step_count=60, deadline=None)
