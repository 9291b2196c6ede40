"""Calls in any order against a model, over gRPC, with the service killed at any moment; and the same rules, without
the kills, against containerd's overlayfs snapshotter, to prove the model.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from obdlab.containerd.client import Containerd
from obdlab.errors import ObdlabError
from obdlab.formats import oci
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from obdlab.snapshotter.store import Kind
from tests import capabilities
from tests.containerd.host import running_containerd
from tests.containerd_host import SnapshotterProcess
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from obdlab.snapshotter.store import Snapshot

# Layers may be pulled under any name that the original's converter could have given.
_PULLED = ["overlaybd-conv-a", "overlaybd-conv-b c"]
PULLED = st.sampled_from(_PULLED)
NAMES = st.sampled_from(["a", "b", "/ü:1", "x" * 300, *_PULLED])
LABELS = st.dictionaries(st.sampled_from(["one", "two.b/c", "ü"]), st.sampled_from(["", "1", "v" * 50]), max_size=3)
PATHS = st.lists(st.sampled_from(["labels", "labels.one", "labels.two.b/c", "labels.ü"]), max_size=2)
MODES = st.sampled_from([Kind.ACTIVE, Kind.VIEW])


@dataclass(frozen=True)
class Known:
    """What the model knows of a snapshot."""

    kind: Kind
    parent: str
    labels: Mapping[str, str]
    created_ns: int = 0
    updated_ns: int = 0


class Calls(RuleBasedStateMachine):
    """The contract as a dictionary. Where two errors are due, either will do."""

    client: WireSnapshotter

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, Known] = {}

    @rule(key=NAMES, parent=st.one_of(st.just(""), NAMES), labels=LABELS, kind=MODES)
    def create(self, key: str, parent: str, labels: dict[str, str], kind: Kind) -> None:
        """Prepare or View."""
        call = self.client.prepare if kind is Kind.ACTIVE else self.client.view
        errors = self.errors_of_creating(key, parent)
        made = self.expect(errors, lambda: call(key, parent, labels))
        if made is not None:
            assert self.client.mounts(key) == made
            self.learn(key, Known(kind, parent, filled(labels)))

    @rule(key=NAMES, name=NAMES, labels=LABELS)
    def commit(self, key: str, name: str, labels: dict[str, str]) -> None:
        """Commit."""
        errors = self.errors_of_committing(key, name)
        self.expect(errors, lambda: self.client.commit(name, key, labels))
        if not errors:
            parent = self.model.pop(key).parent
            self.learn(name, Known(Kind.COMMITTED, parent, filled(labels)))

    @rule(key=NAMES)
    def remove(self, key: str) -> None:
        """Remove."""
        errors = self.errors_of_removing(key)
        self.expect(errors, lambda: self.client.remove(key))
        if not errors:
            del self.model[key]

    @rule(key=NAMES, labels=LABELS, paths=PATHS)
    def update(self, key: str, labels: dict[str, str], paths: list[str]) -> None:
        """Update, all labels or some."""
        errors = set() if key in self.model else {NotFoundError}
        updated = self.expect(errors, lambda: self.client.update(key, labels, paths))
        if updated is not None:
            before = self.model[key]
            result = dict(before.labels)
            for path in paths or ["labels"]:
                name = path.removeprefix("labels").removeprefix(".")
                result = {**result, name: labels.get(name, "")} if name else dict(labels)
            assert updated.created_ns == before.created_ns
            assert updated.updated_ns >= before.updated_ns
            self.model[key] = replace(before, labels=filled(result), updated_ns=updated.updated_ns)
            self.agrees(updated)

    @rule(key=NAMES)
    def look(self, key: str) -> None:
        """Stat, Usage, Mounts."""
        missing = set() if key in self.model else {NotFoundError}
        found = self.expect(missing, lambda: self.client.stat(key))
        if found is not None:
            self.agrees(found)
        self.expect(missing, lambda: self.client.usage(key))
        if not missing and self.model[key].kind is Kind.COMMITTED:
            missing = {FailedPreconditionError}
        self.expect(missing, lambda: self.client.mounts(key))

    @rule(parent=NAMES, kind=st.sampled_from(list(Kind)))
    def filtered(self, parent: str, kind: Kind) -> None:
        """List."""
        for text, wanted in (
            (f"kind=={kind.name.lower()}", {key for key, known in self.model.items() if known.kind is kind}),
            (f'parent=="{parent}"', {key for key, known in self.model.items() if known.parent == parent}),
            ('labels."two.b/c"', {key for key, known in self.model.items() if "two.b/c" in known.labels}),
        ):
            assert {snapshot.key for snapshot in self.client.walk([text])} == wanted, text

    @invariant()
    def all_is_there(self) -> None:
        """What is listed is what the model knows."""
        listed = self.client.walk()
        assert {snapshot.key for snapshot in listed} == self.model.keys()
        for snapshot in listed:
            self.agrees(snapshot)

    def errors_of_creating(self, key: str, parent: str) -> set[type[ObdlabError]]:
        errors: set[type[ObdlabError]] = {AlreadyExistsError} if key in self.model else set()
        if parent and parent not in self.model:
            errors.add(NotFoundError)
        elif parent and self.model[parent].kind is not Kind.COMMITTED:
            errors.add(InvalidArgumentError)
        return errors

    def errors_of_committing(self, key: str, name: str) -> set[type[ObdlabError]]:
        errors: set[type[ObdlabError]] = {AlreadyExistsError} if name in self.model else set()
        if key not in self.model:
            errors.add(NotFoundError)
        elif self.model[key].kind is not Kind.ACTIVE:
            errors.add(FailedPreconditionError)
        return errors

    def errors_of_removing(self, key: str) -> set[type[ObdlabError]]:
        if key not in self.model:
            return {NotFoundError}
        has_children = any(known.parent == key for known in self.model.values())
        return {FailedPreconditionError} if has_children else set()

    @staticmethod
    def expect(errors: set[type[ObdlabError]], call: Callable[[], Any]) -> Any:
        if not errors:
            return call()
        with pytest.raises(tuple(errors)):
            call()
        return None

    def learn(self, key: str, known: Known) -> None:
        found = self.client.stat(key)
        self.model[key] = replace(known, created_ns=found.created_ns, updated_ns=found.updated_ns)
        assert abs(found.created_ns - time.time_ns()) < 600 * 10**9
        self.agrees(found)

    def agrees(self, found: Snapshot) -> None:
        known = self.model[found.key]
        assert (found.kind, found.parent) == (known.kind, known.parent)
        assert (found.created_ns, found.updated_ns) == (known.created_ns, known.updated_ns)
        assert found.labels == known.labels


def filled(labels: Mapping[str, str]) -> dict[str, str]:
    return {label: value for label, value in labels.items() if value}


class OurService(Calls):
    """With the process killed: between calls, and within."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="m"))
        self.process = SnapshotterProcess(self.directory)
        try:
            self.process.start()
        except BaseException:
            self.process.take_down()
            raise
        self.client = WireSnapshotter(str(self.process.address))

    def teardown(self) -> None:
        self.client.close()
        self.process.take_down()
        end_hosts(self.process.run_dir)
        shutil.rmtree(self.directory, ignore_errors=True)

    @rule(key=NAMES, name=PULLED, parent=st.one_of(st.just(""), NAMES))
    def pull(self, key: str, name: str, parent: str) -> None:
        """A layer that stays in its registry; only on others of its kind, or on nothing."""
        below = self.model.get(parent)
        if (parent and below is None) or (below is not None and "containerd.io/snapshot/remote" not in below.labels):
            return
        labels = {
            "containerd.io/snapshot.ref": name,
            "containerd.io/snapshot/image-ref": "registry.test/a/b:1",
            oci.BLOB_DIGEST: "sha256:" + "1" * 64,
            oci.BLOB_SIZE: "1000",
        }
        known = name in self.model
        if key == name:
            self.expect({InvalidArgumentError}, lambda: self.client.prepare(key, parent, labels))
            return
        if key in self.model and not known:
            return
        with pytest.raises(AlreadyExistsError):
            self.client.prepare(key, parent, labels)
        if not known:
            remote = {"containerd.io/snapshot/remote": "remote snapshot"}
            self.learn(name, Known(Kind.COMMITTED, parent, {**labels, **remote}))

    # On an image nothing is prepared here: its registry is not there.
    def errors_of_creating(self, key: str, parent: str) -> set[type[ObdlabError]]:
        errors = super().errors_of_creating(key, parent)
        at: str = parent
        while not errors and at:
            if "containerd.io/snapshot/remote" in self.model[at].labels or at in self.images:
                return {ObdlabError}
            at = self.model[at].parent
        return errors

    @property
    def images(self) -> set[str]:
        """Snapshots that are images although an update has taken their labels away."""
        return {key for key in self.model if self._was_pulled(key)}

    def _was_pulled(self, key: str) -> bool:
        rows = [path.parent.parent.name for path in (self.process.root / "snapshots").glob("*/block/config.v1.json")]
        return bool(rows) and self._id_of(key) in rows

    def _id_of(self, key: str) -> str:
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(self.process.root / "metadata.sqlite", timeout=30)) as connection:
            row = connection.execute("SELECT id FROM snapshot WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else ""

    @rule()
    def cleanup(self) -> None:
        """Cleanup; afterwards there is a directory for each snapshot, and no other."""
        self.client.cleanup()
        directories = {path.name for path in (self.process.root / "snapshots").iterdir()}
        assert directories == {self._id_of(key) for key in self.model}

    @rule()
    def restart(self) -> None:
        """The service ends in good order."""
        self.crash(signal.SIGTERM)

    @rule(key=NAMES, name=NAMES, delay_s=st.floats(0, 0.01), action=st.sampled_from(["prepare", "commit", "remove"]))
    def kill(self, key: str, name: str, delay_s: float, action: str) -> None:
        """The service is killed in the middle of a call: that is done whole, or not at all."""
        calls: dict[str, tuple[set[type[ObdlabError]], Callable[[], object]]] = {
            "prepare": (self.errors_of_creating(key, ""), lambda: self.client.prepare(key, "", {"one": "1"})),
            "commit": (self.errors_of_committing(key, name), lambda: self.client.commit(name, key, {"one": "2"})),
            "remove": (self.errors_of_removing(key), lambda: self.client.remove(key)),
        }
        errors, call = calls[action]

        def quietly() -> None:
            with suppress(ObdlabError):
                call()

        caller = threading.Thread(target=quietly)
        caller.start()
        time.sleep(delay_s)
        self.crash(signal.SIGKILL)
        caller.join(60)
        assert not caller.is_alive()
        if errors:
            return
        there = {snapshot.key for snapshot in self.client.walk()}
        if action == "prepare" and key in there:
            self.learn(key, Known(Kind.ACTIVE, "", {"one": "1"}))
        elif action == "commit" and name in there:
            parent = self.model.pop(key).parent
            self.learn(name, Known(Kind.COMMITTED, parent, {"one": "2"}))
        elif action == "remove" and key not in there:
            del self.model[key]

    def crash(self, number: signal.Signals) -> None:
        self.process.stop(number)
        self.client.close()
        self.process.start()
        self.client = WireSnapshotter(str(self.process.address))


# A service that is killed may have been starting its device host, which comes up when nobody waits for it any more.
def end_hosts(run_dir: Path) -> None:
    deadline = time.monotonic() + 60
    quiet = 0
    while quiet < 3:
        assert time.monotonic() < deadline
        found = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if str(run_dir) in command_line(entry)]
        quiet = 0 if found else quiet + 1
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


class ContainerdsOverlayfs(Calls):
    """The same rules; a containerd for all runs, a namespace for each."""

    address = ""
    number = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).number += 1
        namespace = f"n{self.number}"
        self.opened = ExitStack()
        client = self.opened.enter_context(Containerd(self.address, namespace))
        lease = self.opened.enter_context(client.lease(expire_s=600))
        names = (("containerd-namespace", namespace), ("containerd-lease", lease.lease_id))
        self.client = WireSnapshotter(self.address, "overlayfs", *names)
        self.opened.callback(self.client.close)

    def teardown(self) -> None:
        self.opened.close()


def sized(examples: int, steps: int) -> settings:
    suppressed: Sequence[HealthCheck] = list(HealthCheck)
    return settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=suppressed)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("examples", "steps"), [(1, 20), pytest.param(60, 60, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_calls_in_any_order_with_kills(examples: int, steps: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(OurService, settings=sized(examples, steps))


@pytest.mark.containerd
@pytest.mark.parametrize(("examples", "steps"), [(5, 30), pytest.param(200, 60, marks=pytest.mark.slow)])
def test_the_model_is_containerds(tmp_path: Path, examples: int, steps: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    capabilities.require("containerd")
    with running_containerd(tmp_path) as host:
        ContainerdsOverlayfs.address = host.address
        run_state_machine_as_test(ContainerdsOverlayfs, settings=sized(examples, steps))
