"""What a device's server finds of its image through a wrapper around the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import obdlab
from obdlab.blob import Blob, Joint, Wrapper, WritableBlob, WritableWrapper
from obdlab.errors import DeviceError
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.layers.append import AppendUpper
from obdlab.layers.gc import Collected
from obdlab.server.controltrace import Tracing
from obdlab.server.controlwritable import Changes
from obdlab.server.graduation import graduates
from obdlab.server.messages import Collect, Done, Flush, Step, TraceStart, TraceStop
from obdlab.server.server import _say_busy
from obdlab.settings.settings import Settings
from tests.image.test_open_remote import EXT4

LOWERS = tuple(LowerConfig(file=str(path)) for path in EXT4)


def wrapped(joint: Joint, blob: Blob) -> Blob:
    if joint != "stack":
        return blob
    return WritableWrapper(blob) if isinstance(blob, WritableBlob) else Wrapper(Wrapper(blob))


def nothing(_: Step) -> None:
    pass


def no_helpers(*_: object) -> list[Any]:
    return []


class Keeper:
    said = False

    def say_busy(self) -> None:
        self.said = True


def test_reads_are_recorded(tmp_path: Path) -> None:
    with obdlab.open_image(ImageConfig(lowers=LOWERS), around=wrapped) as image:
        keeper = Keeper()
        _say_busy(keeper, image)  # type: ignore[arg-type]
        assert keeper.said
        tracing = Tracing(image, tmp_path, no_helpers, helper=False)
        tracing.actions[TraceStart](TraceStart(), nothing)
        busy = Keeper()
        _say_busy(busy, image)  # type: ignore[arg-type]
        assert not busy.said, "a helper's reads would not be in the trace"
        image.read_at(1024, 4096)
        tracing.actions[TraceStop](TraceStop(str(tmp_path / "trace")), nothing)
    assert len(Trace.from_bytes((tmp_path / "trace").read_bytes())) > 0


def test_a_helpers_late_answer_is_not_in_the_next_trace(tmp_path: Path) -> None:
    asked: list[object] = []

    def helpers(request: Callable[[int], object], _: object, silence_s: float) -> list[Any]:
        asked.append((type(request(0)), silence_s, [path.name for path in tmp_path.glob("noted-*")]))
        return []

    (tmp_path / "noted-3").write_bytes(b"of the trace before")
    with obdlab.open_image(ImageConfig(lowers=LOWERS)) as image:
        tracing = Tracing(image, tmp_path, helpers, helper=False)
        tracing.actions[TraceStart](TraceStart(), nothing)
        tracing.actions[TraceStop](TraceStop(str(tmp_path / "trace")), nothing)
    # A busy helper's reads belong to the trace: the wait for it is long.
    assert asked == [(TraceStart, 30.0, []), (TraceStop, 30.0, [])]


def test_it_graduates_if_it_was_opened_to_do_so() -> None:
    for wanted in (True, False):
        settings = Settings(graduation=wanted)
        with obdlab.open_image(ImageConfig(lowers=LOWERS), settings=settings, around=wrapped) as image:
            assert isinstance(image, Wrapper)
            assert graduates(image) == wanted


def test_a_writable_image_is_flushed_and_collected(tmp_path: Path) -> None:
    AppendUpper.create(tmp_path / "data", tmp_path / "index", 0).close()
    config = ImageConfig(lowers=LOWERS, upper=UpperConfig(data=str(tmp_path / "data"), index=str(tmp_path / "index")))
    with obdlab.open_image(config, around=wrapped) as image:
        assert isinstance(image, WritableWrapper)
        changes = Changes(None, image, tmp_path)  # type: ignore[arg-type] - these two need no device
        for number in range(4):
            image.write_at(0, bytes([number]) * 65536)
        assert changes.actions[Flush](Flush(), nothing) == Done()
        collected = changes.actions[Collect](Collect(), nothing)
        assert isinstance(collected, Collected)
        assert collected.allocated_after < collected.allocated_before
        assert image.read_at(0, 65536) == bytes([3]) * 65536
    with (
        obdlab.open_image(ImageConfig(lowers=LOWERS), around=wrapped) as image,
        pytest.raises(DeviceError, match="no writable layer"),
    ):
        Changes(None, image, tmp_path).actions[Flush](Flush(), nothing)  # type: ignore[arg-type]
