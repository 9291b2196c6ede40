"""Commands have a bound on their memory: an image that needs more is refused, and the host keeps its memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.cli.memorybound import DEFAULT_MEMORY, VARIABLE
from obdlab.image.config import ImageConfig, LowerConfig
from tests.contrib.traces_extra.test_blockevents import TRACEFS
from tests.convert.layouts import make_layout, member
from tests.image.test_hostile_stack import many_segments
from tests.layers.zfile_samples import compress

MIB = 1 << 20
BOUND = 96 * MIB
GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"

# Runs the command; its last line of output: exit status, most memory of the process beyond that of its imports.
_RUN = """
import json, resource, sys
import numpy, tqdm
import obdlab.image.open, obdlab.convert.image, obdlab.convert.endpoints.names, obdlab.registry.client
from obdlab.cli.main import build_parser, main
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
build_parser()
before = peak()
status = main(sys.argv[1:])
print(json.dumps([status, peak() - before]))
"""


def run(*argv: str | Path, bound: int = BOUND) -> tuple[int, int, str]:
    command = [sys.executable, "-c", _RUN, *map(str, argv)]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", VARIABLE: str(bound)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    status, peak = json.loads(done.stdout.splitlines()[-1])
    return status, peak, done.stderr


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of four layers, each of less than 1 MiB and a million segments: as many as are allowed."""
    place = tmp_path_factory.mktemp("tables")
    lowers = []
    for number in range(4):
        path = place / f"layer{number}"
        path.write_bytes(compress(many_segments(number), algorithm="zstd", block_size=65536))
        assert path.stat().st_size < MIB
        lowers.append(LowerConfig(file=str(path)))
    ImageConfig(lowers=tuple(lowers)).save(place / "config.v1.json")
    return place / "config.v1.json"


@pytest.mark.parametrize(
    "argv",
    [
        "ls {image}:/",
        "cat {image}:/file",
        "cp {image}:/file {place}/file",
        "verify {image}",
        "inspect --verify {layers}",
        "diff --old {golden} --new {image}",
        "merge {image} -o {place}/merged",
        "trace import {place}/events {image} -o {place}/trace",
    ],
    ids=lambda argv: "-".join(word for word in argv.split()[:2] if word.isalpha()),
)
def test_an_image_that_needs_too_much_is_refused(argv: str, tables: Path, tmp_path: Path) -> None:
    (tmp_path / "events").write_text(TRACEFS)
    layers = " ".join(str(tables.parent / f"layer{number}") for number in range(4))
    values = {"layers": layers, "image": tables, "place": tmp_path, "golden": GOLDEN / "layer1.obd"}
    status, peak, error = run(*argv.format(**values).split())
    assert status == 1, error
    assert f"needs more memory than it may take (96 MiB; ${VARIABLE} changes it)" in error
    assert "Traceback" not in error
    assert peak < BOUND


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout whose layer is small and has 20,000 files, each with an attribute of its own."""
    members = (member(f"{number:0200d}", xattrs={"user.x": f"{number:01000d}".encode()}) for number in range(20_000))
    root = tmp_path_factory.mktemp("crowd") / "layout"
    make_layout(root, [members], how="gzip")
    return root


@pytest.mark.parametrize(
    "argv", ["convert {image} oci:{place}/converted", "compare {image} {image}", "verify {image} {image}"]
)
def test_a_layer_of_a_crowd_is_refused(argv: str, crowd: Path, tmp_path: Path) -> None:
    status, peak, error = run(*argv.format(image=f"oci:{crowd}", place=tmp_path).split(), bound=24 * MIB)
    assert status == 1, error
    assert f"needs more memory than it may take (24 MiB; ${VARIABLE} changes it)" in error
    assert peak < 24 * MIB


def test_the_bound_is_there_without_a_word_and_ends_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), threading.stack_size()
    assert main(["image", "inspect", str(GOLDEN / "layer1.obd")]) == 0
    assert (resource.getrlimit(resource.RLIMIT_DATA), threading.stack_size()) == before
    assert capsys.readouterr().err == ""
    assert DEFAULT_MEMORY >= 2 << 30


@pytest.mark.parametrize("text", ["", "much", "-1", "1.5G"])
def test_a_malformed_bound(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert main(["image", "inspect", str(GOLDEN / "layer1.obd")]) == 1
    assert f"${VARIABLE}: not a size" in capsys.readouterr().err
