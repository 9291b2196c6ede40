"""A blob as a SCSI disk: takes commands and data, returns data or an error. Knows nothing of rings or the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.blob import WritableBlob
from obdlab.call import UNBOUND
from obdlab.devices.tcmu import scsi
from obdlab.devices.tcmu.scsi import Op, ScsiError, Sense, Transfer, Unit

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.call import Call

_MIB = 1 << 20
#: Flags of a WRITE SAME (byte 1 of the command).
_WRITE_SAME_UNMAP = 0x08
_WRITE_SAME_ANCHOR = 0x10
_WRITE_SAME_NO_DATA = 0x01


class ScsiDisk:
    """Answers SCSI commands from ``blob``; writable if the blob is, unless ``read_only``."""

    def __init__(
        self, blob: Blob, *, serial: str, description: str, block_size: int = 512, read_only: bool = False
    ) -> None:
        self.blob = blob
        self._writable = blob if isinstance(blob, WritableBlob) and not read_only else None
        self._serial = serial
        self._description = description
        #: Bytes of a logical block.
        self.block_size = block_size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._writable is None

    @property
    def unit(self) -> Unit:
        """The disk's present description of itself."""
        return Unit(
            self.blob.size // self.block_size,
            self.block_size,
            read_only=self.read_only,
            serial=self._serial,
            description=self._description,
            write_cache=not self.read_only,
        )

    def read(self, lba: int, blocks: int, room: int, call: Call = UNBOUND) -> bytes:
        """Answer a READ whose buffer holds ``room`` bytes. Raises the blob's errors, also past its end."""
        offset, wanted = lba * self.block_size, blocks * self.block_size
        length = wanted if wanted <= room else room  # noqa: FURB136 - five times faster than min()
        data = self.blob.read_at(offset, length, call)
        if len(data) != length:
            raise RuntimeError(f"read_at returned {len(data)} of {length} bytes")
        return data

    def write(self, cdb: bytes, data: bytes | memoryview, call: Call = UNBOUND) -> None:
        """Do a WRITE. Raises ScsiError, or the blob's errors."""
        blob, transfer = self._writable_or_refuse(), scsi.transfer_of(cdb)
        scsi.check_inside(transfer, self.unit)
        length = transfer.blocks * self.block_size
        if len(data) < length:
            raise ScsiError(Sense.INVALID_CDB, f"WRITE of {length} bytes, but {len(data)} came with it")
        if length:
            blob.write_at(transfer.lba * self.block_size, data if len(data) == length else data[:length], call)
        if transfer.force_unit_access and len(cdb) > 6:
            self._flush(call)

    def execute(self, cdb: bytes, data: bytes, call: Call = UNBOUND) -> bytes:
        """Do any command but READ and WRITE; return the answer's data. Raises ScsiError, or the blob's errors."""
        op = cdb[0]
        if op == Op.TEST_UNIT_READY:
            return b""
        if op == Op.INQUIRY:
            return scsi.inquiry(cdb, self.unit)
        if op == Op.READ_CAPACITY_10:
            return scsi.read_capacity_10(self.unit)
        if op == Op.SERVICE_ACTION_IN_16:
            return scsi.read_capacity_16(cdb, self.unit)
        if op in (Op.MODE_SENSE_6, Op.MODE_SENSE_10):
            return scsi.mode_sense(cdb, self.unit)
        if op in (Op.MODE_SELECT_6, Op.MODE_SELECT_10):
            scsi.mode_select(cdb, data, self.unit)
        elif op in (Op.SYNCHRONIZE_CACHE_10, Op.SYNCHRONIZE_CACHE_16):
            self._flush(call)
        elif op == Op.UNMAP:
            self._unmap(cdb, data, call)
        elif op in (Op.WRITE_SAME_10, Op.WRITE_SAME_16):
            self._write_same(cdb, data, call)
        else:
            raise ScsiError(Sense.INVALID_COMMAND, f"no such command ({op:#04x})")
        return b""

    def _writable_or_refuse(self) -> WritableBlob:
        if self._writable is None:
            raise ScsiError(Sense.INCOMPATIBLE_FORMAT, "the device is read-only")
        return self._writable

    def _flush(self, call: Call) -> None:
        if self._writable is not None:
            call.about_to_wait()
            self._writable.flush()

    # Checks all ranges before it changes any.
    def _unmap(self, cdb: bytes, data: bytes, call: Call) -> None:
        self._writable_or_refuse()
        ranges = scsi.unmap_ranges(cdb, data)
        for transfer in ranges:
            scsi.check_inside(transfer, self.unit)
        for transfer in ranges:
            self._discard(transfer, call)

    def _write_same(self, cdb: bytes, data: bytes, call: Call) -> None:
        blob, transfer, how = self._writable_or_refuse(), scsi.transfer_of(cdb), cdb[1]
        no_data = bool(how & _WRITE_SAME_NO_DATA) and len(cdb) == 16
        if transfer.blocks == 0 or how & _WRITE_SAME_ANCHOR:
            raise ScsiError(Sense.INVALID_CDB, f"WRITE SAME of {transfer.blocks} blocks, flags {how:#x}")
        scsi.check_inside(transfer, self.unit)
        if not no_data and len(data) < self.block_size:
            raise ScsiError(Sense.INVALID_CDB, f"WRITE SAME: a block of {len(data)} bytes came with it")
        block = bytes(self.block_size) if no_data else data[: self.block_size]
        # UNMAP is a wish and applies to blocks of zeros only; other blocks have to be written all the same.
        if not any(block):
            self._discard(transfer, call)
            return
        end = transfer.lba + transfer.blocks
        step = _MIB // self.block_size
        for lba in range(transfer.lba, end, step):
            blob.write_at(lba * self.block_size, block * min(step, end - lba), call)

    def _discard(self, transfer: Transfer, call: Call) -> None:
        if transfer.blocks:
            offset, length = transfer.lba * self.block_size, transfer.blocks * self.block_size
            self._writable_or_refuse().discard(offset, length, call)
