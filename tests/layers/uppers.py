"""Writable layers of both kinds for tests that must hold for either."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obdlab.layers.append import AppendUpper
from obdlab.layers.upper import SparseUpper, open_upper
from obdlab.layers.writable import Upper

KINDS = ("append", "sparse")


@dataclass(frozen=True)
class Files:
    """The two files of a layer and its kind."""

    kind: str
    data: Path
    index: Path

    @classmethod
    def named(cls, folder: Path, kind: str, name: str = "upper") -> Files:
        """Files of this name in a folder."""
        return cls(kind, folder / f"{name}.data", folder / f"{name}.index")

    def create(self, virtual_size: int, **options: Any) -> Upper:
        """Make the layer."""
        if self.kind == "append":
            return AppendUpper.create(self.data, self.index, virtual_size, **options)
        return SparseUpper.create(self.data, virtual_size, index_path=self.index, **options)

    def open(self) -> Upper:
        """Open it for writing."""
        return open_upper(self.data, self.index)

    def copy_to(self, folder: Path) -> Files:
        """The files as they are now, holes included, in another folder."""
        folder.mkdir(exist_ok=True)
        copy = Files.named(folder, self.kind, self.data.stem)
        copy_sparse(self.data, copy.data)
        shutil.copyfile(self.index, copy.index)
        return copy


def copy_sparse(source: Path, target: Path) -> None:
    """Copy the data of a file, and keep its holes."""
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as out:
        size = os.fstat(file.fileno()).st_size
        out.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            os.pwrite(out.fileno(), os.pread(file.fileno(), end - at, at), at)
            at = end
