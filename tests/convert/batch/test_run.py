"""Lists of images, against a real registry: some broken, some interrupted."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.image.convert_list import _failure_text
from obdlab.cli.main import main
from obdlab.convert.batch.job import Job, Outcome, run_job
from obdlab.convert.batch.pool import LocalPool
from obdlab.convert.batch.run import Pair, Run, read_list
from obdlab.convert.batch.state import BatchInUseError, BatchState
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.errors import FormatError, SourceError
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from tests.convert.layouts import Layout, make_layout, member, tar_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.registry.server import RegistryServer

_WAIT_S = 90.0


def image(root: Path, number: int) -> str:
    make_layout(root, [[member(f"file{number}", b"x" * 1000 * number)], [member("second", b"y")]])
    return f"oci:{root}"


def broken(root: Path) -> str:
    layout = Layout(root)
    layout.write_index([layout.add_image([tar_bytes([member("../out", b"x")])])])
    return f"oci:{root}"


@pytest.fixture(scope="module")
def long_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that takes a while."""
    root = tmp_path_factory.mktemp("long") / "layout"
    make_layout(root, [[member(f"{n % 100}/{n}", b"x" * 5000) for n in range(20_000)]], how="plain")
    return root


def digests_at(server: RegistryServer, destinations: list[str]) -> list[str]:
    found = []
    with closing(RegistryClient()) as client:
        for destination in destinations:
            try:
                found.append(client.get_manifest(Reference.parse(destination)).digest)
            except SourceError:
                found.append("")
    return found


@pytest.mark.registry
@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_list_with_broken_images(
    count: int, registry_server: RegistryServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = f"{registry_server.host}/batch{count}"
    names = [f"{host}/image{number}:v1" for number in range(count)]
    lines = [f"{image(tmp_path / str(number), number)} {name}" for number, name in enumerate(names)]
    bad = [f"{broken(tmp_path / 'broken')} {host}/broken:v1", f"oci:{tmp_path / 'absent'} {host}/absent:v1"]
    listed, report = tmp_path / "list", tmp_path / "report.csv"
    listed.write_text("\n".join(["# images", lines[0], *bad, *lines[1:], ""]))
    command = ["image", "convert-list", str(listed), "--work-dir", str(tmp_path), "--report", str(report), "-j", "2"]
    assert main(command) == 1
    with report.open() as file:
        rows = {row["destination"]: row for row in csv.DictReader(file)}
    assert [rows[name]["digest"] for name in names] == digests_at(registry_server, names)
    assert "leads out of the layer's root" in rows[f"{host}/broken:v1"]["error"]
    assert "no OCI layout" in rows[f"{host}/absent:v1"]["error"]
    assert {row["tries"] for row in rows.values()} == {"1"}  # these failures will not pass
    assert f"{count + 2} images: {count} done, 2 failed" in capsys.readouterr().out
    assert not list(tmp_path.glob("obdlab-convert-*"))

    # Again, one of them being mended: nothing else is done anew.
    image(tmp_path / "absent", 3)
    ended = {name: row["seconds"] for name, row in rows.items() if row["state"] == "done"}
    assert main([*command[:-4], "--report", str(tmp_path / "report.json"), "-q"]) == 1
    again = {row["destination"]: row for row in json.loads((tmp_path / "report.json").read_text())}
    assert {name: str(again[name]["seconds"]) for name in ended} == ended
    assert again[f"{host}/absent:v1"]["state"] == "done"
    assert main([*command, "--algorithm", "lz4"]) == 1
    assert "begun with other options" in capsys.readouterr().err


def test_interrupted_and_resumed(long_image: Path, tmp_path: Path) -> None:
    image(tmp_path / "0", 1)
    (tmp_path / "long").symlink_to(long_image)
    listed, out = tmp_path / "list", tmp_path / "out"
    listed.write_text("".join(f"oci:{tmp_path / name} oci:{out}:v{name}\n" for name in ("0", "long")))
    work = tmp_path / "work"
    work.mkdir()
    command = [
        sys.executable,
        "-m",
        "obdlab",
        "image",
        "convert-list",
        str(listed),
        "--work-dir",
        str(work),
        "-j",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: tags(out) == {"v0"} and bool(list(work.glob("*/*.writable"))))
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=_WAIT_S)
    assert process.returncode == 130
    assert "2 images: 1 done, 1 open" in said
    assert errors.strip().splitlines()[-1] == "obdlab image convert-list: interrupted"
    assert list(work.iterdir()) == []
    assert tags(out) == {"v0"}
    (tmp_path / "long").unlink()  # so that the rest of this test does not take long
    image(tmp_path / "long", 2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 images are done already" in done.stderr
    assert tags(out) == {"v0", "vlong"}


def test_what_a_killed_run_started_ends(long_image: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"oci:{long_image} oci:{tmp_path / 'out'}\n")
    work = tmp_path / "work"
    work.mkdir()
    command = [
        sys.executable,
        "-m",
        "obdlab",
        "image",
        "convert-list",
        str(tmp_path / "list"),
        "--work-dir",
        str(work),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: bool(list(work.glob("*/*.writable"))))
        process.kill()
    wait_for(lambda: not list(work.iterdir()))
    assert tags(tmp_path / "out") == set()


def tags(layout: Path) -> set[str]:
    if not (layout / "index.json").exists():
        return set()
    names = [
        entry.annotations.get("org.opencontainers.image.ref.name") for entry in ImageLayout(layout).index().manifests
    ]
    return {name for name in names if name}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


class Told:
    """What a run told its watcher, and the jobs' outcomes in the order that a test gives."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str]] = []
        self.pauses: list[float] = []

    def finished(self, pair: Pair, outcome: Outcome) -> None:
        self.ended.append((pair.source, outcome.error))

    def postponed(self, pair: Pair, outcome: Outcome, pause_s: float) -> None:
        self.pauses.append(pause_s)


def test_temporary_failures_are_tried_again_and_hold_nobody_up(tmp_path: Path) -> None:
    # The process really runs, and fails twice: it counts by a file.
    count = tmp_path / "count"
    module = tmp_path / "batch_sample.py"
    module.write_text(
        "import sys, pathlib\n"
        "size = int.from_bytes(sys.stdin.buffer.read(8), 'big'); name = sys.stdin.buffer.read(size)\n"
        f"count = pathlib.Path({str(count)!r})\n"
        "if name == b'flaky':\n"
        "    tries = int(count.read_text()) if count.exists() else 0\n"
        "    count.write_text(str(tries + 1))\n"
        "    if tries < 2:\n"
        '        print(\'{"error": "busy", "temporary": true}\'); sys.exit(1)\n'
        "if name == b'dies': import os; os.kill(os.getpid(), 9)\n"
        "if name == b'raises': raise RuntimeError('a bug')\n"
        'print(\'{"digest": "d", "layers": 1}\')\n'
    )
    pairs = [Pair(name, f"to-{name}") for name in ("flaky", "dies", "raises", "good")]
    told = Told()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        with BatchState(tmp_path / "state", "{}") as state:
            with LocalPool(1) as pool:
                job = lambda pair: Job("batch_sample", pair.source.encode())  # noqa: E731
                Run(pairs, state, pool, job, told).work_off(tries=3, first_pause_s=0.5)
            rows = {row.source: row for row in state.rows(pairs)}
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    assert {source: (row.state, row.tries) for source, row in rows.items()} == {
        "flaky": ("done", 3), "dies": ("failed", 3), "raises": ("failed", 1), "good": ("done", 1),
    }  # fmt: skip
    assert "SIGKILL" in dict(told.ended)["dies"]
    assert "RuntimeError: a bug" in dict(told.ended)["raises"]
    assert told.pauses == [0.5, 0.5, 1.0, 1.0]
    assert told.ended.index(("good", "")) < told.ended.index(("flaky", ""))


def test_a_conversion_that_takes_too_long(tmp_path: Path) -> None:
    outcome = run_job(Job("timeit", b"", timeout_s=0.0), lambda: False)
    assert outcome.temporary
    assert "not done in 0 s" in outcome.error


@pytest.mark.parametrize(
    ("text", "template", "what"),
    [
        ("a b c\n", "", "line 1: line does not make sense"),
        ("# only\n\na\n", "", "line 3: line does not make sense"),
        ("a x\nb x\n", "", "line 2: destination is that of line 1"),
        ("# nothing\n", "", "names no image"),
        ("oci:dir\n", "r.example/{name}", "destination must be given"),
        ("r.example/a:1\n", "r.example/{nam}", "destination cannot be filled in"),
    ],
)
def test_lists_that_make_no_sense(text: str, template: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(FormatError, match=what):
        read_list(tmp_path / "list", template)


def test_destinations_by_template(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("docker://r.example/team/app:1\nr.example:5000/x/y:2 own/place:1 # kept\n")
    found = read_list(tmp_path / "list", "m.example/{repository}:{tag}-obd")
    assert [pair.destination for pair in found] == ["m.example/team/app:1-obd", "own/place:1"]


def test_one_run_at_a_time_and_no_other_file(tmp_path: Path) -> None:
    with BatchState(tmp_path / "state", "{}"), pytest.raises(BatchInUseError):
        BatchState(tmp_path / "state", "{}")
    (tmp_path / "text").write_text("no database, only text " * 100)
    with pytest.raises(SourceError, match="cannot keep the state"):
        BatchState(tmp_path / "text", "{}")
    with BatchState(tmp_path / "text", "{}", restart=True) as state:
        assert state.rows([Pair("a", "b")])[0].state == "open"


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (SourceError("no answer", blob="host/app:1"), "host/app:1: no answer"),
        (FormatError("no tar", blob="host/app:1, layer 2", offset=512), "host/app:1, layer 2: no tar at offset 512"),
        (FormatError("no tar", blob="layer.tar"), "host/app:1: layer.tar: no tar"),
    ],
)
def test_a_failure_names_its_image_once(error: SourceError | FormatError, printed: str) -> None:
    outcome = Outcome(error=str(error), blob=error.blob)
    assert _failure_text(Pair("host/app:1", "host/app:obd"), outcome) == printed
