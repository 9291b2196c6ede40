"""A model server that is ready once its weights are in memory: serve.py FILE PERCENT.

It maps the file, as model servers do, and reads PERCENT of the tensors, spread over the file, each checked against
its CRC-32.
"""

from __future__ import annotations

import json
import mmap
import signal
import struct
import sys
import zlib


def main() -> None:
    path, percent = sys.argv[1], int(sys.argv[2])
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as weights:
        (length,) = struct.unpack_from("<Q", weights)
        header, base = json.loads(weights[8 : 8 + length]), 8 + length
        read = 0
        for number, (name, about) in enumerate(header.items()):
            # Of each hundred tensors in a row the wanted number, evenly spread.
            if (number + 1) * percent // 100 == number * percent // 100:
                continue
            with memoryview(weights)[base + about["begin"] : base + about["end"]] as view:
                if zlib.crc32(view) != about["crc32"]:
                    raise SystemExit(f"{name}: damaged weights")
                read += len(view)
        print(f"{read >> 20} MiB of {len(weights) >> 20} MiB read")
        print("READY", flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
