"""The Debian archive moves on, or cannot be reached: what is measured and built goes on all the same.

The commands are the real ones at their real places: in a mount namespace, where the checkout's datasets have locks
that are out of date and ``/var/lib/obdlab`` is the test's own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from obdlab.lab.images.lock import LOCK_NAME
from obdlab.lab.run.rows import RowStore
from obdlab.lab.run.summary import summarise
from obdlab.lab.workbench import folder

_ENTER = """
mkdir -p /var/lib/obdlab
mount --bind "$1" /var/lib/obdlab
mount --bind "$2" "$3"
shift 3
exec "$@"
"""
_NO_NETWORK = ("unshare", "--net", "--", "sh", "-euc", 'ip link set lo up; exec "$@"', "sh")
_TIMEOUT_S = 900.0

#: What measures little of each experiment: one start of every arm, one point of the grid.
_LITTLE = ("--set", "repeats=1", "--set", "load_limit=1000.0")
_EVALUATE = (
    "lab",
    "evaluate",
    "cold_start",
    "--no-report",
    "--set",
    "start.repeats=1",
    "--set",
    "start.load_limit=1000.0",
)
_EVALUATE_LESS = ("--set", 'start.snapshotters=["overlayfs", "obdlab"]', "--set", 'start.disks=["native"]')


class Machine:
    """The host with its own ``/var/lib/obdlab`` and its own datasets, with or without a network."""

    def __init__(self, directory: Path, image: str) -> None:
        self.results = directory / "results"
        self.network = True
        self._image = image
        self._library = directory / "library"
        self._library.mkdir()
        self._datasets = directory / "datasets"
        shutil.copytree(folder("datasets"), self._datasets)

    def make_locks_stale(self) -> None:
        """Give every dataset a lock that no archive satisfies."""
        for recipe in self._datasets.glob("*/recipe.toml"):
            lock = recipe.with_name(LOCK_NAME)
            lines = lock.read_text().split() if lock.is_file() else []
            lock.write_text("".join(f"{line}.1obsolete\n" for line in lines or ["libc6:amd64=1"]))

    def append_to_recipe(self, text: str) -> None:
        """Change the image's recipe: TOML tables put in before its configuration."""
        path = self._datasets / self._image / "recipe.toml"
        path.write_text(path.read_text().replace("[config]\n", f"{text}\n[config]\n"))

    def layouts(self, digest: str) -> list[Path]:
        """Return the layouts of a digest among the built images."""
        return [path.parent for path in self._library.glob("images/*/index.json") if digest in path.read_text()]

    def run(self, *words: str, status: int = 0) -> str:
        """Run ``obdlab`` to its end and return what it said; its exit status must be this."""
        places = [str(self._library), str(self._datasets), str(folder("datasets"))]
        command = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-euc", _ENTER, "sh", *places]
        command += [] if self.network else _NO_NETWORK
        command += [sys.executable, "-m", "obdlab", *words]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_TIMEOUT_S, check=False
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def experiment(self, name: str, *words: str, status: int = 0) -> str:
        """Run a declared experiment at its smallest."""
        return self.run("lab", "run", name, *_LITTLE, "--results", str(self.results), *words, status=status)

    def demo(self, *words: str, status: int = 0) -> str:
        """Run what ``make demo`` does, at its smallest."""
        less = ("--set", f'images=["{self._image}"]', "--set", "warm_starts=0", "--set", "a_a=false")
        return self.experiment("quick.toml", *less, *words, status=status)

    def codec(self, *words: str) -> str:
        """Run a grid at its smallest."""
        sizes = ("--set", "options.size_mib=2", "--set", "axes.block_size=[4096]", "--set", "axes.workers=[1]")
        return self.experiment("codec.toml", "--set", f'options.image="{self._image}"', *sizes, *words)

    def evaluate(self, *words: str, status: int = 0) -> str:
        """Run one question of the evaluation at its smallest."""
        images = ("--set", f'start.images=["{self._image}"]', "--results", str(self.results / "evaluation"))
        return self.run(*_EVALUATE, *_EVALUATE_LESS, *images, *words, status=status)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of an experiment."""
        return RowStore(self.results / name).rows()


@pytest.mark.containerd
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("image", ["tiny", pytest.param("redis", marks=pytest.mark.slow)])
def test_locks_out_of_date_and_then_no_network(image: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, image)
    machine.make_locks_stale()
    difference = re.compile(
        rf"{image}: .*sha256:[0-9a-f]{{12}}, \d+ packages, \d+ differs? from packages\.lock: \S+ "
    )

    assert difference.search(machine.run("lab", "dataset", "build", image))
    assert difference.search(machine.demo("--report"))
    assert (machine.results / "quick" / "report.html").is_file()
    assert difference.search(machine.codec())
    assert difference.search(machine.evaluate())
    rows = [*machine.rows("quick"), *machine.rows("codec"), *machine.rows("evaluation/start")]
    assert not [row["error"] for row in rows if row.get("error")]
    # Each row names its image; what the image holds is kept with the environment that the row names.
    (digest,) = {row["image_digest"] for row in rows}
    for name in ("quick", "codec", "evaluation/start"):
        known = RowStore(machine.results / name).environments()
        for row in machine.rows(name):
            built = known[row["environment"]]["built"][image]
            assert built["digest"] == digest
            assert "from packages.lock" in built["lock"]
            assert bool(built["packages"]) == (image != "tiny")

    # Strict is strict: nothing is measured, and the first package that differs is named.
    assert "--locked: " in machine.demo("--locked", "--again", status=1)
    assert "--locked: " in machine.run("lab", "dataset", "build", image, "--locked", status=1)
    assert "--locked: " in machine.evaluate("--locked", status=1)
    machine.network = False
    assert "built before" in machine.run("lab", "dataset", "build", image)
    assert "everything was measured already" in machine.demo()
    machine.demo("--again")
    machine.codec("--again")
    machine.evaluate()
    again = [*machine.rows("quick"), *machine.rows("codec")]
    assert not [row["error"] for row in again if row.get("error")]
    assert {row["image_digest"] for row in again} == {digest}


@pytest.mark.containerd
@pytest.mark.timeout(900)
def test_an_experiment_keeps_its_image_and_rows_of_two_are_not_mixed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "tiny")
    # Each build gives another image, as with an archive that moves.
    machine.append_to_recipe('[[layer]]\nrun = ["cat /proc/uptime > /srv/uptime"]\n')
    machine.demo()
    machine.run("lab", "dataset", "build", "tiny", "--newest")
    machine.demo("--set", "repeats=2")
    (first,) = {row["image_digest"] for row in machine.rows("quick")}
    count = len(machine.rows("quick"))

    (layout,) = machine.layouts(first)
    shutil.rmtree(layout)
    assert "everything was measured already" in machine.demo("--set", "repeats=2")
    told = machine.demo("--set", "repeats=3")
    assert re.search(r"tiny: the rows so far are of sha256:\w+, which is not kept here any more; the rows of", told)
    (second,) = {row["image_digest"] for row in machine.rows("quick")[count:]}
    assert second != first
    # Every cell was measured again, and the table has the new ones alone: n is what was declared.
    assert len(machine.rows("quick")) == count // 2 * 5
    assert f"Image tiny is {second[:19]}" in told
    assert first[:19] not in told.partition("\nimage ")[2]
    rows = re.findall(r"(?m)^(?:cold|warm) +\S+ +[\d.]+ (?:[\[(].*?[\])])? +(\d+) ", told)
    assert set(rows) == {"3"}, told
    # Grouped by hand they stay apart.
    names = {summary.image for summary in summarise(machine.rows("quick"))}
    assert names == {f"tiny ({first[:19]})", f"tiny ({second[:19]})"}
