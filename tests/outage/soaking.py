"""A process that reads many images at once for a while: ``python -m tests.outage.soaking`` with a task on stdin.

The task is JSON (fields of :class:`Task`), what came of it is JSON on stdout (fields of :class:`Outcome`).
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from obdlab.errors import ObdlabError
from obdlab.image.config import ImageConfig
from obdlab.image.open import Image, open_image
from obdlab.settings.settings import Settings

BLOCK = 4096
BLOCKS = 256
_LENGTHS = (1, 1, 4, 16, 32)
_SAMPLES = 40


@dataclass
class Task:
    """Open the images of ``configs`` (path by number) and read them in ``threads`` for ``seconds``."""

    configs: dict[int, str]
    settings: str
    threads: int
    seconds: float
    seed: int


@dataclass
class Outcome:
    """What came of it. A sample: seconds since the beginning, resident bytes, open files, threads."""

    reads: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    statistics: dict[str, int] = field(default_factory=dict)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    left_open: int = 0


def block(image: int, number: int) -> bytes:
    """What block ``number`` of an image's disk holds."""
    return hashlib.shake_128(f"{image}:{number}".encode()).digest(BLOCK // 2) * 2


def soak(task: Task) -> Outcome:
    """Do what the task says."""
    outcome = Outcome()
    before = _open_files()
    settings = Settings.from_json(task.settings)
    with ExitStack() as opened:
        images: dict[int, Image] = {}
        for number, path in task.configs.items():
            image = open_image(ImageConfig.load(Path(path)), settings)
            assert isinstance(image, Image)
            images[int(number)] = opened.enter_context(image)
            _connect_all(image, task.threads)
        _read_all(task, images, outcome)
        statistics: Counter[str] = Counter()
        for image in images.values():
            statistics.update(image.statistics())
        outcome.statistics = dict(statistics)
    gc.collect()
    outcome.left_open = _open_files() - before
    return outcome


def _connect_all(image: Image, threads: int) -> None:
    # As many connections as there will ever be readers, so that more of them later are a leak.
    def read(number: int) -> None:
        image.read_at(number * (BLOCKS // threads) * BLOCK, 16 * BLOCK)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))


def _read_all(task: Task, images: dict[int, Image], outcome: Outcome) -> None:
    lock = threading.Lock()
    began = time.monotonic()
    end = began + task.seconds

    def read(seed: int) -> None:
        chooser = random.Random(seed)
        numbers = list(images)
        while time.monotonic() < end:
            number = chooser.choice(numbers)
            count = chooser.choice(_LENGTHS)
            first = chooser.randrange(BLOCKS - count + 1)
            started = time.monotonic()
            error, data = "", b""
            try:
                data = images[number].read_at(first * BLOCK, count * BLOCK)
            except ObdlabError as caught:
                error = f"{type(caught).__name__}: {caught}"
            took_s = time.monotonic() - started
            right = data == b"".join(block(number, first + index) for index in range(count))
            with lock:
                outcome.reads += 1
                outcome.slowest_s = max(outcome.slowest_s, took_s)
                if error:
                    outcome.errors.append(error)
                elif not right:
                    outcome.wrong += 1

    threads = [threading.Thread(target=read, args=(task.seed + index,)) for index in range(task.threads)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(task.seconds / _SAMPLES)
        outcome.samples.append((time.monotonic() - began, _resident(), _open_files(), threading.active_count()))
    for thread in threads:
        thread.join()


def _resident() -> int:
    # Without what is shared with other processes: the mapped sums of the cache come and go.
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    print(json.dumps(asdict(soak(Task(**json.load(sys.stdin))))))
