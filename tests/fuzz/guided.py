"""The same parsers, fuzzed with feedback on which lines an input reached, by atheris.

Run: pip install atheris, then python -m tests.fuzz.guided TARGET SECONDS [CORPUS DIRECTORY]

atheris is no dependency of the tests, as it comes to new Pythons late. What it found worth keeping is in the corpus
directory afterwards; an input that ends a run is written to the working directory.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["obdlab"]):
    from tests.fuzz.mutate import mutate
    from tests.fuzz.targets import ALLOWED, TARGETS


def main() -> None:
    target = TARGETS[sys.argv[1]]
    corpus = Path(sys.argv[3] if len(sys.argv) > 3 else tempfile.mkdtemp(prefix=f"fuzz-{sys.argv[1]}-"))
    seeds = target.seeds()
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def parse(data: bytes) -> None:
        try:
            target.parse(data)
        except ALLOWED:
            pass

    def change(data: bytes, most: int, seed: int) -> bytes:
        source = random.Random(seed)
        if data and source.random() < 0.5:
            return mutate(source, data, seeds)[:most]
        return bytes(atheris.Mutate(data, most))

    logging.disable()
    limits = [f"-max_total_time={sys.argv[2]}", "-max_len=600000", "-rss_limit_mb=1500", "-timeout=20"]
    atheris.Setup([sys.argv[0], str(corpus), *limits], parse, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
