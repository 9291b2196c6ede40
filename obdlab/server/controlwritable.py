"""Control socket actions for a writable image: flush, collection, growth, live snapshot."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.blob import find
from obdlab.errors import DeviceError
from obdlab.image.config import read_config
from obdlab.layerfiles.snapshot import snapshot
from obdlab.layers.append import AppendUpper
from obdlab.layers.gc import collect
from obdlab.layers.stack import WritableStack
from obdlab.server.rundir import DeviceRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob
    from obdlab.devices.device import Device

    Answer = dict[str, Any]
    Tell = Callable[[dict[str, Any]], None]


class Changes:
    """Changes a running device of one server, in the requesting thread."""

    def __init__(self, device: Device, blob: Blob, directory: Path) -> None:
        self._device = device
        self._blob = blob
        self._directory = directory
        #: By the name of the request. An action gets the request, and a function that reports progress.
        self.actions: dict[str, Callable[[dict[str, Any], Tell], Answer]] = {
            "flush": self._flush,
            "gc": self._collect,
            "resize": self._resize,
            "snapshot": self._snapshot,
        }

    def _flush(self, _: dict[str, Any], __: Tell) -> Answer:
        self._stack.flush()
        return {}

    def _collect(self, _: dict[str, Any], tell: Tell) -> Answer:
        upper = self._stack.upper
        if not isinstance(upper, AppendUpper):
            return {}
        return asdict(collect(upper, lambda step, done, total: tell({"step": step, "done": done, "total": total})))

    def _resize(self, request: dict[str, Any], _: Tell) -> Answer:
        size = request.get("size")
        if not isinstance(size, int):
            raise DeviceError(f"no size to grow to (got {size!r})")
        before = self._stack.size
        self._stack.set_virtual_size(size)
        self._stack.flush()
        self._device.take_on_size()
        self._change_record(size=size)
        return {"before": before}

    def _snapshot(self, request: dict[str, Any], tell: Tell) -> Answer:
        config = Path(self._record().config)
        new_config = Path(str(request.get("config", "")))
        for path in (config, new_config):
            self._refuse_own_disk(path)
        tell({"step": "begun"})  # raises OSError if the client went away while it waited its turn
        done = snapshot(self._stack, config, new_config)
        self._change_record(config_sha256=hashlib.sha256(read_config(config)).hexdigest())
        return asdict(done)

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
        replace(self._record(), **changed).save(self._directory)
