"""``overlaybd-zfile``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, BinaryIO, cast

from obdlab.cli.dropin.grammar import Operand, Style, Tool, ToolError, option, switch
from obdlab.cli.dropin.layer_tools import packing_of

if TYPE_CHECKING:
    import argparse


def _zfile(values: argparse.Namespace) -> int:
    from obdlab.image.open import open_zfile
    from obdlab.layerfiles.zfilemaking import compress_stream, extract
    from obdlab.system.newfile import new_file

    source, target = values.source_file, values.target_file
    if values.verify:
        return _verify(source)
    if not target:  # one operand: the output; the input is standard input
        source, target = "-", source
    elif not os.path.isfile(source):
        raise ToolError(f"failed to open file {source}")
    if values.x:
        print(f"decompress file {source} as {target}")
        with open_zfile(source) as content, new_file(target, force=values.f) as output:
            extract(content, output, sparse=True)
        print("decompress file done.")
        return 0
    packing = packing_of(values.algorithm, values.bs, tar=values.t, rewrite_header=False)
    print(f"compress file {source} as {target}")
    with new_file(target, force=values.f) as output:
        if source == "-":
            compress_stream(sys.stdin.buffer, output, packing, name="standard input")
        else:
            with open(source, "rb", buffering=0) as file:
                compress_stream(cast("BinaryIO", file), output, packing, name=source)
    print("compress file done.")
    return 0


def _verify(path: str) -> int:
    from obdlab.image.open import open_zfile
    from obdlab.layerfiles.description import verify

    open_zfile(path).close()  # refuses files that are no ZFiles
    for _ in verify(path):
        pass
    print(f"{path} is a valid zfile blob.")
    return 0


ZFILE = Tool(
    "overlaybd-zfile",
    "Makes or extracts a ZFile.",
    Style.CLI11,
    _zfile,
    (
        switch("-t", help="in a tar"),
        switch("-x", help="extract"),
        switch("-f", help="replace the output"),
        switch("--verify", help="read all of source_file and check every checksum"),
        option("--algorithm", help="lz4 or zstd", default="lz4"),
        option("--bs", help="compressed blocks in KB", default=4),
    ),
    (
        Operand("source_file", "file to read; without a target, the ZFile to make of standard input"),
        Operand("target_file", "file to make", required=False),
    ),
)
