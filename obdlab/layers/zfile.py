"""ZFiles for reading and writing: the names that other packages import."""

from __future__ import annotations

from obdlab.layers.zfile_reader import ZFileReader, open_zfile
from obdlab.layers.zfile_writer import FITTING_BLOCK_SIZE, IncompressibleError, ZFileWriteError, ZFileWriter

__all__ = ["FITTING_BLOCK_SIZE", "IncompressibleError", "ZFileReader", "ZFileWriteError", "ZFileWriter", "open_zfile"]
