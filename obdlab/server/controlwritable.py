"""Control socket actions for a writable image: flush, collection, growth, live snapshot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.blob import find
from obdlab.errors import DeviceError
from obdlab.image.config import digest_of_config
from obdlab.layerfiles.snapshot import Snapshot, snapshot
from obdlab.layers.append import AppendUpper
from obdlab.layers.gc import Collected, collect
from obdlab.layers.stack import WritableStack
from obdlab.server.messages import Collect, ControlRequest, Done, Flush, Resize, Resized, Step, TakeSnapshot
from obdlab.server.rundir import DeviceRecord, record_locked

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob
    from obdlab.devices.device import Device

    Tell = Callable[[Step], None]


class Changes:
    """Changes a running device of one server, in the requesting thread."""

    def __init__(self, device: Device, blob: Blob, directory: Path) -> None:
        self._device = device
        self._blob = blob
        self._directory = directory
        #: By the request's class. An action gets the request, and a function that reports progress.
        self.actions: dict[type[ControlRequest], Callable[[Any, Tell], object]] = {
            Flush: self._flush,
            Collect: self._collect,
            Resize: self._resize,
            TakeSnapshot: self._snapshot,
        }

    def _flush(self, _: Flush, __: Tell) -> Done:
        self._stack.flush()
        return Done()

    def _collect(self, _: Collect, tell: Tell) -> Collected | Done:
        upper = self._stack.upper
        if not isinstance(upper, AppendUpper):
            return Done()
        return collect(upper, lambda step, done, total: tell(Step(step, done, total)))

    def _resize(self, request: Resize, _: Tell) -> Resized:
        before = self._stack.size
        self._stack.set_virtual_size(request.size)
        self._stack.flush()
        self._device.take_on_size()
        self._change_record(size=request.size)
        return Resized(before)

    def _snapshot(self, request: TakeSnapshot, tell: Tell) -> Snapshot:
        config = Path(self._record().config)
        new_config = Path(request.config)
        for path in (config, new_config):
            self._refuse_own_disk(path)
        tell(Step("begun"))  # raises OSError if the client went away while it waited its turn
        done = snapshot(self._stack, config, new_config)
        self._change_record(config_sha256=digest_of_config(config))
        return done

    @property
    def _stack(self) -> WritableStack:
        stack = find(self._blob, WritableStack)
        if stack is None:
            raise DeviceError("its image has no writable layer")
        return stack

    # Storing a file on the device itself takes writes, which wait until the layers have changed.
    def _refuse_own_disk(self, path: Path) -> None:
        try:
            found = path.stat().st_dev
        except OSError as error:
            raise DeviceError(f"{path}: {error.strerror}") from error
        if found == self._device.path.stat().st_rdev:
            raise DeviceError(f"{path}: lies on the device itself")

    def _record(self) -> DeviceRecord:
        record = DeviceRecord.load(self._directory)
        if record is None:
            raise DeviceError("it is being taken down")
        return record

    # By the record, an attach detects that the same image is attached already.
    def _change_record(self, **changed: Any) -> None:
        with record_locked(self._directory):
            replace(self._record(), **changed).save(self._directory)
