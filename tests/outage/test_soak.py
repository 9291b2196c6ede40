"""Many images read at once by several processes while one request in twenty fails: all right, nothing piles up."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from obdlab.image.config import ImageConfig
from obdlab.layerfiles.rawdisk import RawDisk
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.settings.settings import Settings
from tests.outage.cases import CASES
from tests.outage.lab import Lab, push
from tests.outage.soaking import BLOCKS, Outcome, Task, block

pytestmark = pytest.mark.registry

MIB = 1 << 20
SHARE = 0.05
DEADLINE_S = 60.0
THREADS = 6
#: Those that trying again gets over.
FAULTS = [
    one
    for one in CASES
    if one.once is None and (one.lasts is None or not one.lasts.at_once or one.name.startswith("wrong bytes"))
]


@pytest.mark.parametrize(
    ("images", "processes", "seconds"),
    [
        pytest.param(12, 2, 4.0, id="12 images, 4 s"),
        pytest.param(200, 4, 60.0, id="200 images, 60 s", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_soak(
    lab: Lab,
    tmp_path: Path,
    images: int,
    processes: int,
    seconds: float,
) -> None:
    configs = _make_images(lab, tmp_path, images)
    lab.tokens.promised_s = 10.0  # renewed again and again
    settings = Settings(
        cache_dir=tmp_path / "cache",
        cache_quota=images * MIB // 4,  # so that most reads ask the registry
        cache_min_free=0,
        request_timeout_s=1.0,
        read_deadline_s=DEADLINE_S,
        open_deadline_s=DEADLINE_S,
    )
    lab.proxy.injected.clear()
    lab.proxy.asked = 0
    lab.proxy.sometimes(SHARE, FAULTS)
    tasks = [
        Task({n: configs[n] for n in range(p, images, processes)}, settings.to_json(), THREADS, seconds, 1000 * p)
        for p in range(processes)
    ]
    with ThreadPoolExecutor(processes) as pool:
        outcomes = list(pool.map(lambda task: _run(task, seconds), tasks))
    asked, injected = lab.proxy.asked, dict(lab.proxy.injected)
    lab.proxy.good()
    for line in _report(outcomes, asked, injected):
        print(line)

    assert [outcome.errors for outcome in outcomes] == [[]] * processes
    assert [outcome.wrong for outcome in outcomes] == [0] * processes
    assert max(outcome.slowest_s for outcome in outcomes) < DEADLINE_S
    assert sum(outcome.reads for outcome in outcomes) > 10 * images
    assert sum(injected.values()) > asked * SHARE / 2
    for outcome in outcomes:
        _assert_nothing_grows(outcome, long=seconds >= 30)


def _make_images(lab: Lab, directory: Path, count: int) -> dict[int, str]:
    layers = []
    for number in range(count):
        raw, layer = directory / "raw", directory / f"{number}.obd"
        raw.write_bytes(b"".join(block(number, index) for index in range(BLOCKS)))
        write_layer(RawDisk(raw), layer, Packing(tar=True))
        layers.append(layer)
    pushed = push(lab.registry.host, f"outage/soak{count}", layers)
    url = f"http://{lab.proxy.host}/v2/outage/soak{count}/blobs"
    configs = {}
    for number, lower in enumerate(pushed.lowers):
        path = directory / f"{number}.json"
        ImageConfig(url, lowers=(lower,)).save(path)
        configs[number] = str(path)
    return configs


def _run(task: Task, seconds: float) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "tests.outage.soaking"],
        input=json.dumps(asdict(task)),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=seconds + 4 * DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Outcome(**json.loads(done.stdout))


def _assert_nothing_grows(outcome: Outcome, *, long: bool) -> None:
    resident, files, threads = ([sample[column] for sample in outcome.samples] for column in (1, 2, 3))
    # Every image had its connections before the first sample; those that broke were replaced.
    assert max(files) <= files[0] + THREADS + 8
    assert max(threads) <= THREADS + 16
    assert outcome.left_open <= 4  # the files of Python's own
    if long:
        quarter = len(resident) // 4
        early, late = statistics.median(resident[quarter : 2 * quarter]), statistics.median(resident[-quarter:])
        assert late < early * 1.1 + 8 * MIB


def _report(outcomes: list[Outcome], asked: int, injected: dict[str, int]) -> list[str]:
    lines = [f"requests for blobs {asked}, spoiled {sum(injected.values())}: {injected}"]
    for outcome in outcomes:
        samples = outcome.samples
        chosen = [samples[len(samples) * tenth // 10] for tenth in range(10)] + [samples[-1]]
        lines.append(
            f"reads {outcome.reads}, wrong {outcome.wrong}, errors {len(outcome.errors)}, slowest "
            f"{outcome.slowest_s:.1f} s, left open {outcome.left_open}, {outcome.statistics}"
        )
        lines.append("  MiB, files, threads: " + ", ".join(f"{s[1] / MIB:.0f}/{s[2]}/{s[3]}" for s in chosen))
    return lines
