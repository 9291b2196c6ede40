"""Power lost at any moment: what was not synced may be there or not, in any mixture; what was flushed must be.

Every change of a file is recorded. A state after a loss is made of all changes up to some point that a sync followed,
and of any others the dice choose; of the directory's changes, of those before its last sync and some more in order.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from obdlab.errors import FormatError
from obdlab.layers import gc, indexlog, layerfile, seal
from obdlab.layers import stack as stack_module
from obdlab.layers.append import AppendUpper
from obdlab.layers.layerfile import LayerFile
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.upper import SparseUpper
from obdlab.localfile import LocalFile

DISK = 128 << 10


@dataclass
class Disk:
    """Files as they are on stable storage, and the changes that may not be."""

    content: dict[int, bytes] = field(default_factory=dict)  # by number of the file
    names: dict[str, int] = field(default_factory=dict)
    events: list[tuple[Any, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """The files of a folder, all of it stored."""
        disk = cls()
        for number, path in enumerate(sorted(folder.iterdir())):
            disk.content[number] = path.read_bytes()
            disk.names[path.name] = number
        return disk

    def after_loss(self, moment: int, rng: random.Random, keep: float, folder: Path) -> None:
        """Write the files as a loss after ``moment`` events may leave them."""
        events = self.events[:moment]
        names = dict(self.names)
        directory = [event for event in events if event[0] in ("create", "rename", "unlink", "sync names")]
        last_sync = max((i for i, event in enumerate(directory) if event[0] == "sync names"), default=-1)
        for event in directory[: rng.randint(last_sync + 1, len(directory))]:
            if event[0] == "create":
                names[event[2]] = event[1]
            elif event[0] == "rename":
                names[event[2]] = names.pop(event[1])
            elif event[0] == "unlink":
                names.pop(event[1], None)
        for name, number in names.items():
            (folder / name).write_bytes(self._content_of(number, events, rng, keep))

    def _content_of(self, number: int, events: list[tuple[Any, ...]], rng: random.Random, keep: float) -> bytes:
        own = [event for event in events if event[1] == number and event[0] in ("write", "resize", "punch", "sync")]
        last_sync = max((i for i, event in enumerate(own) if event[0] == "sync"), default=-1)
        content = bytearray(self.content.get(number, b""))
        for i, event in enumerate(own):
            if i > last_sync and rng.random() >= keep:
                continue
            if event[0] == "write":
                _, __, offset, data = event
                content.extend(bytes(max(0, offset + len(data) - len(content))))
                content[offset : offset + len(data)] = data
            elif event[0] == "resize":
                content = content[: event[2]].ljust(event[2], b"\0")
            elif event[0] == "punch":
                content[event[2] : event[2] + event[3]] = bytes(event[3])
        return bytes(content)

    def mark(self, what: str) -> None:
        """Remember that something was promised."""
        self.events.append(("mark", what))


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[Disk], None]:
    def start(disk: Disk) -> None:
        numbers: dict[LayerFile, int] = {}

        def patch(owner: object, name: str, before: Callable[..., tuple[Any, ...] | None]) -> None:
            real = getattr(owner, name)

            def changed(*args: Any, **options: Any) -> Any:
                answer = real(*args, **options)
                event = before(*args)
                if event is not None:
                    disk.events.append(event)
                return answer

            monkeypatch.setattr(owner, name, changed)

        def opened(file: LayerFile, path: Any, flags: int) -> tuple[Any, ...] | None:
            name = Path(path).name
            if flags & os.O_CREAT:
                numbers[file] = 1000 + len(numbers)
                return ("create", numbers[file], name)
            numbers[file] = disk.names[name]
            return None

        patch(LayerFile, "__init__", opened)
        patch(LayerFile, "write_some", lambda file, at, data: ("write", numbers[file], at, bytes(data)))
        patch(LayerFile, "resize", lambda file, size: ("resize", numbers[file], size))
        patch(LayerFile, "punch_hole", lambda file, at, length: ("punch", numbers[file], at, length))
        patch(LayerFile, "sync", lambda file: ("sync", numbers[file]))
        patch(layerfile, "sync_directory", lambda path: ("sync names", -1))
        patch(seal, "sync_directory", lambda path: ("sync names", -1))
        monkeypatch.setattr(
            LayerFile,
            "rename",
            lambda file, path, real=LayerFile.rename: (
                disk.events.append(("rename", Path(file.name).name, Path(path).name)),
                real(file, path),
            )[1],
        )
        real_unlink = os.unlink

        def unlink(path: Any, **options: Any) -> None:
            real_unlink(path, **options)
            disk.events.append(("unlink", Path(path).name))

        real_open = os.open

        def made(path: Any, flags: int, *args: Any, **options: Any) -> int:
            descriptor = real_open(path, flags, *args, **options)
            if flags & os.O_CREAT and str(path).endswith(".restacking"):
                disk.events.append(("create", 999, Path(path).name))
            return descriptor

        monkeypatch.setattr(os, "unlink", unlink)
        monkeypatch.setattr(os, "open", made)

    return start


def prepared(folder: Path) -> bytearray:
    """A layer with much that was overwritten, all of it flushed."""
    folder.mkdir()
    rng = random.Random(3)
    model = bytearray(DISK)
    with AppendUpper.create(folder / "data", folder / "index", DISK) as upper:
        for _ in range(60):
            at, length = rng.randrange(200) * 512, rng.randint(1, 40) * 512
            data = rng.randbytes(length)
            upper.write_at(at, data)
            model[at : at + length] = data
        upper.discard(0, 2048)
        model[:2048] = bytes(2048)
        upper.flush()
    return model


def losses(disk: Disk, tmp_path: Path, check: Callable[[Path, set[str]], None]) -> None:
    """Check the states that losses at all moments leave, for mixtures from nothing to all of what was not synced."""
    rng = random.Random(9)
    folder = tmp_path / "loss"
    for moment in range(len(disk.events) + 1):
        promised = {event[1] for event in disk.events[:moment] if event[0] == "mark"}
        for keep in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            folder.mkdir()
            disk.after_loss(moment, rng, keep, folder)
            check(folder, promised)
            shutil.rmtree(folder)


def test_collection(tmp_path: Path, record: Callable[[Disk], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "_SHORT_LOG_RECORDS", 4)
    model = prepared(tmp_path / "base")
    disk = Disk.of(tmp_path / "base")
    with monkeypatch.context():
        record(disk)
        with AppendUpper.open(tmp_path / "base" / "data", tmp_path / "base" / "index") as upper:
            upper.set_group_commit(3)
            upper.write_at(65536, b"first" * 512)
            upper.write_at(65536, b"later" * 512)
            done = gc.collect(upper)
            disk.mark("collected")
            upper.write_at(98304, b"last." * 512)
            upper.flush()
            disk.mark("flushed")
        assert done.records_after < done.records_before
    monkeypatch.undo()
    assert {"rename", "punch"} <= {event[0] for event in disk.events}

    def check(folder: Path, promised: set[str]) -> None:
        with AppendUpper.open(folder / "data", folder / "index") as upper:
            content = upper.read_at(0, DISK)
        assert content[:65536] == model[:65536]
        assert content[65536 + 2560 : 98304] == model[65536 + 2560 : 98304]
        assert content[98304 + 2560 :] == model[98304 + 2560 :]
        if promised:
            assert content[65536 : 65536 + 2560] == b"later" * 512
        if "flushed" in promised:
            assert content[98304 : 98304 + 2560] == b"last." * 512

    losses(disk, tmp_path, check)


@pytest.mark.parametrize("flushes", [True, False])
def test_writes_between_the_steps_of_a_collection(
    tmp_path: Path, record: Callable[[Disk], None], monkeypatch: pytest.MonkeyPatch, *, flushes: bool
) -> None:
    monkeypatch.setattr(gc, "_SHORT_LOG_RECORDS", 4)
    monkeypatch.setattr(gc, "_TOLERATED_WASTE", 10**6)  # moves whatever can be moved
    model = prepared(tmp_path / "base")
    base = tmp_path / "base"
    disk = Disk.of(base)
    # Sectors that were never flushed may be lost; those of `flushed` must not.
    flushed = b"kept." * 512
    with monkeypatch.context():
        record(disk)
        with AppendUpper.open(base / "data", base / "index") as upper:

            def write_first(real: Callable[..., Any]) -> Callable[..., Any]:
                def wrapper(*args: Any) -> Any:
                    upper.write_at(98304, b"lost?" * 512)
                    return real(*args)

                return wrapper

            real_sync, real_rewrite = upper.data.sync, indexlog.IndexLog.begin_rewrite

            def sync_then_write() -> None:
                real_sync()
                if not upper._writing.locked() and not upper._syncing.locked():
                    upper.write_at(98304, b"lost?" * 512)

            def rewrite_then_flush(*args: Any) -> Any:
                file = real_rewrite(*args)
                if flushes:
                    upper.write_at(65536, flushed)
                    upper.flush()
                    disk.mark("flushed")
                return file

            monkeypatch.setattr(upper.data, "sync", sync_then_write)
            monkeypatch.setattr(upper, "relocate", write_first(upper.relocate))
            monkeypatch.setattr(upper, "compact_log", write_first(upper.compact_log))
            monkeypatch.setattr(indexlog.IndexLog, "begin_rewrite", rewrite_then_flush)
            assert gc.collect(upper).moved_size
    monkeypatch.undo()
    assert flushes == ("flushed" in {event[1] for event in disk.events})

    def check(folder: Path, promised: set[str]) -> None:
        with AppendUpper.open(folder / "data", folder / "index") as upper:
            content = upper.read_at(0, DISK)
        assert content[:65536] == model[:65536]
        assert content[65536 + 2560 : 98304] == model[65536 + 2560 : 98304]
        assert content[98304 + 3072 :] == model[98304 + 3072 :]
        assert content[65536 : 65536 + 2560] == flushed or (not promised)

    losses(disk, tmp_path, check)


def test_seal(tmp_path: Path, record: Callable[[Disk], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(tmp_path / "base")
    disk = Disk.of(tmp_path / "base")
    with monkeypatch.context():
        record(disk)
        with AppendUpper.open(tmp_path / "base" / "data", tmp_path / "base" / "index") as upper:
            upper.seal()
            disk.mark("sealed")
    monkeypatch.undo()

    def check(folder: Path, promised: set[str]) -> None:
        try:
            with AppendUpper.open(folder / "data", folder / "index") as upper:
                content = upper.read_at(0, DISK)
            assert not promised
        except FormatError as error:
            assert "was sealed" in str(error)
            with Stack([LsmtLayer(LocalFile(folder / "data"))]) as stack:
                content = stack.read_at(0, DISK)
        assert content == model

    losses(disk, tmp_path, check)


def test_restack(tmp_path: Path, record: Callable[[Disk], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(tmp_path / "base")
    base = tmp_path / "base"
    disk = Disk.of(base)
    with monkeypatch.context():
        record(disk)
        stack = WritableStack(None, AppendUpper.open(base / "data", base / "index"))
        stack.write_at(98304, b"last." * 512)
        stack.flush()
        disk.mark("flushed")
        fresh = AppendUpper.create(base / "new", base / "new.index", 0)
        stack.restack(fresh, lambda: disk.mark("switched"))
        disk.mark("restacked")
        stack.write_at(65536, b"later" * 512)
        stack.flush()
        disk.mark("flushed again")
        stack.close()
    monkeypatch.undo()

    def check(folder: Path, promised: set[str]) -> None:
        wanted = bytearray(model)
        if "switched" in promised:
            stack = WritableStack(
                Stack([LsmtLayer(LocalFile(folder / "data"))]), AppendUpper.open(folder / "new", folder / "new.index")
            )
        else:
            stack = WritableStack(None, AppendUpper.open(folder / "data", folder / "index"))
        with stack:
            content = stack.read_at(0, DISK)
        if "flushed" in promised:
            wanted[98304 : 98304 + 2560] = b"last." * 512
        else:
            wanted[98304 : 98304 + 2560] = content[98304 : 98304 + 2560]
        if "flushed again" in promised:
            wanted[65536 : 65536 + 2560] = b"later" * 512
        elif "switched" in promised:
            wanted[65536 : 65536 + 2560] = content[65536 : 65536 + 2560]
        assert content == wanted

    losses(disk, tmp_path, check)


def test_a_flush_during_a_restack(
    tmp_path: Path, record: Callable[[Disk], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seal may be undone: what was flushed after it must be in the log."""
    model = prepared(tmp_path / "base")
    base = tmp_path / "base"
    disk = Disk.of(base)
    with monkeypatch.context() as patched:
        record(disk)
        stack = WritableStack(None, AppendUpper.open(base / "data", base / "index"))
        fresh = AppendUpper.create(base / "new", base / "new.index", 0)
        flush_until_short = stack_module._flush_until_short

        def flush_and_write(upper: AppendUpper) -> None:
            flush_until_short(upper)
            stack.write_at(98304, b"last." * 512)

        def switch() -> None:
            stack.flush()
            disk.mark("flushed")
            disk.mark("switched")

        patched.setattr(stack_module, "_flush_until_short", flush_and_write)
        stack.restack(fresh, switch)
        stack.close()
    monkeypatch.undo()
    assert "flushed" in {event[1] for event in disk.events}

    def check(folder: Path, promised: set[str]) -> None:
        if "switched" in promised:
            return
        with WritableStack(None, AppendUpper.open(folder / "data", folder / "index")) as stack:
            content = stack.read_at(0, DISK)
        assert content[:98304] == model[:98304]
        if "flushed" in promised:
            assert content[98304 : 98304 + 2560] == b"last." * 512

    losses(disk, tmp_path, check)


def test_growth_of_a_sparse_layer(
    tmp_path: Path, record: Callable[[Disk], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    with SparseUpper.create(base / "data", DISK) as upper:
        upper.write_at(4096, b"data." * 512)
        upper.flush()
    disk = Disk.of(base)
    with monkeypatch.context():
        record(disk)
        with SparseUpper.open(base / "data") as upper:
            upper.set_virtual_size(2 * DISK)
            disk.mark("grown")
            upper.flush()
            disk.mark("flushed")
    monkeypatch.undo()

    def check(folder: Path, promised: set[str]) -> None:
        with SparseUpper.open(folder / "data") as upper:
            assert upper.virtual_size == 2 * DISK or "flushed" not in promised
            assert upper.read_at(4096, 2560) == b"data." * 512

    losses(disk, tmp_path, check)


def test_dropped_records_stay_dropped(
    tmp_path: Path, record: Callable[[Disk], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loss, an opening that cuts the log, a write to where the cut records pointed, and another loss.
    model = prepared(tmp_path / "base")
    base = tmp_path / "base"
    end = (base / "data").stat().st_size
    with AppendUpper.open(base / "data", base / "index") as upper:
        upper.write_at(0, b"gone." * 512)
    os.truncate(base / "data", end)
    disk = Disk.of(base)
    with monkeypatch.context():
        record(disk)
        with AppendUpper.open(base / "data", base / "index") as upper:
            assert upper.dropped.records == 1
            upper.write_at(65536, b"later" * 512)
    monkeypatch.undo()

    def check(folder: Path, _: set[str]) -> None:
        with AppendUpper.open(folder / "data", folder / "index") as upper:
            content = upper.read_at(0, DISK)
        assert content[:65536] == model[:65536]

    losses(disk, tmp_path, check)
