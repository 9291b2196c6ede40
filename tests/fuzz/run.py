"""Feed changed files to one parser, in a process whose memory is limited.

Run: python -m tests.fuzz.run TARGET AMOUNT SEED, the amount being seconds, or like ``300x`` a number of inputs.

Ends with a traceback, and the offending input in a file, if anything but an ObdlabError comes out, an input needs
more than 64 MiB beside what the parser had before, or takes longer than 20 seconds. Prints how many inputs there
were, and how many of them were refused.
"""

from __future__ import annotations

import faulthandler
import logging
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.mutate import mutate
from tests.fuzz.targets import ALLOWED, TARGETS, Target

MEMORY = 64 << 20
#: A span of 16 MiB of a gzip layer is held up to four times while it is inflated and joined.
MORE_MEMORY = {"gzip-target": 128 << 20}
PATIENCE_S = 60.0


def limit_memory(most: int = MEMORY) -> None:
    # Address space beyond what is in use now; an allocation that the header talked us into fails.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + most
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def inputs(target: Target, source: random.Random) -> Iterator[bytes]:
    seeds = target.seeds()
    yield from seeds
    while True:
        yield mutate(source, source.choice(seeds), seeds)


def fuzz(name: str, amount: str, seed: int) -> tuple[int, int]:
    target = TARGETS[name]
    most = int(amount[:-1]) if amount.endswith("x") else sys.maxsize
    end = time.monotonic() + (1e9 if amount.endswith("x") else float(amount))
    for data in target.seeds():  # imports and caches are not what is limited
        target.parse(data)
    limit_memory(MORE_MEMORY.get(name, MEMORY))
    refused = 0
    for number, data in enumerate(inputs(target, random.Random(seed))):
        if number == most or time.monotonic() > end:
            return number, refused
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
        try:
            target.parse(data)
        except ALLOWED:
            refused += 1
        except BaseException:
            with tempfile.NamedTemporaryFile(prefix=f"fuzz-{name}-", delete=False) as file:
                file.write(data)
            print(f"{name}: input {number} of seed {seed} is kept as {file.name}", file=sys.stderr)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
    raise AssertionError


if __name__ == "__main__":
    logging.disable()
    print(*fuzz(sys.argv[1], sys.argv[2], int(sys.argv[3])))
