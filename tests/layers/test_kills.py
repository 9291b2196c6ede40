"""A process killed at any of its calls to the file system: what was flushed is there, and the layer opens."""

from __future__ import annotations

import math
import os
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from obdlab.layers import gc, layerfile, seal, stack
from obdlab.layers.append import AppendUpper
from obdlab.layers.layerfile import LayerFile
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.writable import Upper
from obdlab.localfile import LocalFile
from tests.layers.uppers import KINDS, Files, copy_sparse

DISK = 256 << 10
_DONE, _KILLED = 0, 9
_CALLS = ("write_some", "resize", "sync", "punch_hole", "rename", "lock")


def _kill_at(call: int) -> None:
    # In a child: every change of a file counts, and half of the counted write is still done.
    left = [call]
    stack._SHORT_FLUSH_S = math.inf  # each run makes the same calls, however long they take

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **options: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                if name == "write_some":
                    data = memoryview(args[2])  # type: ignore[arg-type]
                    half = len(data) // 2
                    cut = half if len(data) < 4096 else half // 4096 * 4096  # pages are written whole
                    real(args[0], args[1], data[:cut])
                os._exit(_KILLED)
            return real(*args, **options)

        return wrapper

    for name in _CALLS:
        setattr(LayerFile, name, counted(name, getattr(LayerFile, name)))
    for module in (layerfile, seal):
        module.sync_directory = counted("sync_directory", layerfile.sync_directory)
    for name in ("put", "remove"):
        setattr(seal.SwitchMark, name, counted(name, getattr(seal.SwitchMark, name)))


def kills(base: Path, work: Path, body: Callable[[Path], None]) -> Iterator[tuple[Path, bool]]:
    """Run ``body`` on copies of ``base``, killed at its first call, its second, ... and last not killed."""
    for call in range(10000):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for path in base.iterdir():
            copy_sparse(path, work / path.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests may still be ending
            child = os.fork()
        if not child:
            try:
                _kill_at(call)
                body(work)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(_DONE)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (_DONE, _KILLED)
        yield work, status == _DONE
        if status == _DONE:
            return
    raise AssertionError("never came to an end")


def prepared(folder: Path, kind: str) -> bytearray:
    """A layer with overwritten and discarded parts, all flushed; its content."""
    folder.mkdir()
    model = bytearray(DISK)
    with Files.named(folder, kind, "old").create(DISK) as upper:
        for turn in range(8):
            for at in range(turn % 3 * 512, DISK - 8192, 8192 * (turn + 1)):
                data = bytes([turn * 16 + at // 8192 + 1]) * (4096 if turn % 2 else 1536)
                upper.write_at(at, data)
                model[at : at + len(data)] = data
        upper.discard(16384, 12288)
        model[16384 : 16384 + 12288] = bytes(12288)
        upper.flush()
    return model


def test_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "_SHORT_LOG_RECORDS", 4)
    model = prepared(tmp_path / "base", "append")
    more = b"late" * 1024

    def body(folder: Path) -> None:
        with Files.named(folder, "append", "old").open() as upper:
            assert isinstance(upper, AppendUpper)
            upper.set_group_commit(4)
            upper.write_at(0, more)
            for _ in range(30):
                upper.write_at(65536, more)
            gc.collect(upper)

    ends = 0
    for folder, done in kills(tmp_path / "base", tmp_path / "work", body):
        ends += 1
        with Files.named(folder, "append", "old").open() as upper:
            content = upper.read_at(0, DISK)
            for at, size in ((0, 4096), (65536, 4096)):
                assert content[at : at + size] in (more, bytes(model[at : at + size]))
            assert content[4096:65536] == model[4096:65536]
            assert content[65536 + 4096 :] == model[65536 + 4096 :]
            if done:
                assert content[:4096] == more
                assert upper.data.allocated_size < DISK
    assert ends > 60


@pytest.mark.parametrize("kind", KINDS)
def test_seal(tmp_path: Path, kind: str) -> None:
    model = prepared(tmp_path / "base", kind)

    def body(folder: Path) -> None:
        Files.named(folder, kind, "old").open().seal()

    kept = 0
    for folder, done in kills(tmp_path / "base", tmp_path / "work", body):
        files = Files.named(folder, kind, "old")
        try:
            with files.open() as upper:
                content = upper.read_at(0, DISK)
                upper.write_at(0, b"goes on." * 512)
                upper.flush()
            with files.open() as upper:
                assert upper.read_at(0, 8192) == b"goes on." * 512 + model[4096:8192]
            assert not done
            kept += 1
        except Exception as error:
            if "was sealed" not in str(error):
                raise
            with LsmtLayer(LocalFile(files.data)) as layer, Stack([layer]) as stack:
                content = stack.read_at(0, DISK)
        assert content == model
    assert kept > 4


@pytest.mark.parametrize("kind", KINDS)
def test_restack(tmp_path: Path, kind: str) -> None:
    model = prepared(tmp_path / "base", kind)
    with Files.named(tmp_path / "base", kind, "new").create(0):
        pass
    late = b"late" * 1024

    def body(folder: Path) -> None:
        old, new = (Files.named(folder, kind, name) for name in ("old", "new"))
        stack = WritableStack(None, old.open())
        stack.restack(new.open(), (folder / "switched").touch)
        stack.write_at(0, late)
        stack.flush()
        (folder / "flushed").touch()

    for folder, done in kills(tmp_path / "base", tmp_path / "work", body):
        old, new = (Files.named(folder, kind, name) for name in ("old", "new"))
        wanted = bytearray(model)
        if (folder / "switched").exists():
            lower = Stack([LsmtLayer(LocalFile(old.data))])
            upper: Upper = new.open()
        else:
            lower, upper = None, old.open()
        with WritableStack(lower, upper) as stack:
            content = stack.read_at(0, DISK)
            if (folder / "flushed").exists():
                wanted[:4096] = late
                assert content == wanted
            assert content[4096:] == wanted[4096:]
            assert content[:4096] in (late, bytes(wanted[:4096]))
            stack.write_at(8192, late)
            stack.flush()
            assert stack.read_at(8192, 4096) == late
            assert not done or (folder / "flushed").exists()
