"""The metadata file: transactions, ids, rules of kinds, and what a crash leaves."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from obdlab.snapshotter.store import Kind, Store, StoreError, Usage


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path / "metadata.sqlite")
    yield store
    store.close()


def test_a_failed_transaction_changes_nothing(store: Store) -> None:
    undone = []
    with pytest.raises(ZeroDivisionError), store.write() as writer:  # noqa: PT012 - the order is what is tested
        writer.create(Kind.ACTIVE, "a", "", {})
        writer.on_rollback(lambda: undone.append(1))
        writer.on_rollback(lambda: undone.append(2))
        raise ZeroDivisionError
    assert undone == [2, 1]
    with store.read() as reader:
        assert reader.all() == []
    with store.write() as writer:
        writer.create(Kind.ACTIVE, "a", "", {})
    assert undone == [2, 1]


def test_a_change_that_cannot_be_undone_does_not_keep_the_others(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    undone = []

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(ZeroDivisionError), store.write() as writer:  # noqa: PT012 - the order is what is tested
        writer.on_rollback(lambda: undone.append(1))
        writer.on_rollback(lambda: fail(OSError("disk full")))
        writer.on_rollback(lambda: undone.append(2))
        writer.on_rollback(lambda: fail(StoreError("no room")))
        raise ZeroDivisionError
    assert undone == [2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "a failed change was not undone whole: no room",
        "a failed change was not undone whole: disk full",
    ]


def test_ids_are_never_given_twice(store: Store) -> None:
    seen = []
    for _ in range(3):
        with store.write() as writer:
            seen.append(writer.create(Kind.ACTIVE, "key", "", {}).id)
        with store.write() as writer:
            writer.remove("key")
    assert seen == sorted(set(seen))


def test_chain_is_nearest_first(store: Store) -> None:
    ids, parent = [], ""
    for number in range(5):
        with store.write() as writer:
            ids.append(writer.create(Kind.ACTIVE, "key", parent, {}).id)
            parent = writer.commit("key", f"name{number}", {}, Usage(number, number)).key
    with store.read() as reader:
        assert reader.chain("name4") == tuple(reversed(ids))
        assert reader.get("name3").usage == Usage(3, 3)
        with pytest.raises(NotFoundError):
            reader.chain("name5")


def test_readers_do_not_see_what_is_being_written(store: Store) -> None:
    with store.write() as writer:
        writer.create(Kind.ACTIVE, "a", "", {})
        with store.read() as reader:
            assert reader.all() == []
    with store.read() as reader:
        assert [snapshot.key for snapshot in reader.all()] == ["a"]


def test_empty_names_are_refused(store: Store) -> None:
    with pytest.raises(InvalidArgumentError), store.write() as writer:
        writer.create(Kind.ACTIVE, "", "", {})
    with store.write() as writer:
        writer.create(Kind.ACTIVE, "a", "", {})
    with pytest.raises(InvalidArgumentError), store.write() as writer:
        writer.commit("a", "", {}, Usage())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metadata.sqlite"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="metadata"):
        Store(path)


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metadata.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="newer"):
        Store(path)


def test_a_killed_writer_leaves_whole_transactions(tmp_path: Path) -> None:
    path = tmp_path / "metadata.sqlite"
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from obdlab.snapshotter.store import Kind, Store, Usage
        store = Store(Path(sys.argv[1]))
        number = 0
        while True:
            with store.write() as writer:
                writer.create(Kind.ACTIVE, f"key{number}", f"name{number - 1}" if number else "", {})
                writer.commit(f"key{number}", f"name{number}", {}, Usage())
            print(number, flush=True)
            number += 1
    """)
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = [int(process.stdout.readline()) for _ in range(20)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    seen = max([seen, *map(int, process.stdout.read().split("\n")[:-1])])
    process.stdout.close()
    store = Store(path)
    with store.read() as reader:
        names = [snapshot.key for snapshot in reader.all()]
        assert len(reader.chain(names[-1])) == len(names)
    store.close()
    assert names == [f"name{number}" for number in range(len(names))]
    assert len(names) >= seen + 1


NAMES = st.sampled_from(["a", "b", "c", "d", "e"])


class StoreModel(RuleBasedStateMachine):
    """The store against a dictionary."""

    snapshots = Bundle("snapshots")

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.directory.name) / "metadata.sqlite")
        self.model: dict[str, tuple[Kind, str]] = {}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()

    @rule(key=NAMES, parent=st.one_of(st.just(""), NAMES), kind=st.sampled_from([Kind.ACTIVE, Kind.VIEW]))
    def create(self, key: str, parent: str, kind: Kind) -> None:
        wanted = None
        if parent and parent not in self.model:
            wanted = NotFoundError
        elif parent and self.model[parent][0] is not Kind.COMMITTED:
            wanted = InvalidArgumentError
        elif key in self.model:
            wanted = AlreadyExistsError
        if wanted is None:
            self.model[key] = (kind, parent)
        self.change(lambda writer: writer.create(kind, key, parent, {}), wanted)

    @rule(key=NAMES, name=NAMES)
    def commit(self, key: str, name: str) -> None:
        wanted = None
        if name in self.model:
            wanted = AlreadyExistsError
        elif key not in self.model:
            wanted = NotFoundError
        elif self.model[key][0] is not Kind.ACTIVE:
            wanted = FailedPreconditionError
        if wanted is None:
            self.model[name] = (Kind.COMMITTED, self.model.pop(key)[1])
        self.change(lambda writer: writer.commit(key, name, {}, Usage()), wanted)

    @rule(key=NAMES)
    def remove(self, key: str) -> None:
        wanted = None
        if key not in self.model:
            wanted = NotFoundError
        elif any(parent == key for _, parent in self.model.values()):
            wanted = FailedPreconditionError
        if wanted is None:
            del self.model[key]
        self.change(lambda writer: writer.remove(key), wanted)

    def change(self, action, wanted: type[Exception] | None) -> None:
        if wanted is None:
            with self.store.write() as writer:
                action(writer)
        else:
            with pytest.raises(wanted), self.store.write() as writer:
                action(writer)
        with self.store.read() as reader:
            assert {s.key: (s.kind, s.parent) for s in reader.all()} == self.model


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
