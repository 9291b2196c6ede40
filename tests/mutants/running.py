"""Record which tests run which lines, then run those tests over each mutant."""

from __future__ import annotations

import compileall
import hashlib
import json
import os
import py_compile
import queue
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from tests.mutants.covering import CONTEXT, RCFILE, TIMES, Covering
from tests.mutants.sample import ROOMS, Mutant, sample
from tests.mutants.zygote import ALL_EXAMPLES

_NOT_SOURCES = shutil.ignore_patterns("__pycache__")
HOST = "kernel or containerd or vm"
#: At least this long, or three times what the chosen tests took when they were recorded.
_LEAST_S = 30.0
#: Tests of a mutant are cut off here: a survivor of the quickest ones counts as a survivor. Most mutants that are
#: caught at all are caught within seconds: only the survivors of those (--again) pay for more tests and examples.
_MOST_S = 45.0
_FIRST_S = 10.0


def results_dir(root: Path) -> Path:
    """Return the folder of all that is recorded; git ignores it."""
    directory = root / "results" / "mutants"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def record(root: Path, tests: list[str], *, host: bool) -> int:
    """Run the tests under coverage, one context each. Adds to what an earlier call recorded."""
    directory = results_dir(root)
    with tempfile.TemporaryDirectory(dir=directory) as raw:  # two calls at once would combine each other's halves
        rcfile = Path(raw) / "coveragerc"
        rcfile.write_text(RCFILE.format(root=root, data=Path(raw) / "coverage", context=CONTEXT))
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={rcfile}", "-m", "pytest", "-q"]
        command += ["-p", "tests.mutants.covering", "-p", "no:cacheprovider", "-o", "addopts=", "--hypothesis-seed=0"]
        command += ["-m", HOST if host else f"not ({HOST})", *tests]
        environment = os.environ | {TIMES: str(directory / "times.jsonl"), CONTEXT: ""}
        status = subprocess.run(command, cwd=root, env=environment, check=False).returncode
        shutil.copytree(root / "obdlab", directory / "sources" / "obdlab", dirs_exist_ok=True, ignore=_NOT_SOURCES)
        combine = [sys.executable, "-m", "coverage", "combine", f"--rcfile={rcfile}", "--append"]
        combine += [f"--data-file={directory / 'coverage'}", *map(str, Path(raw).glob("coverage.*"))]
        subprocess.run(combine, cwd=root, check=True, stdout=subprocess.DEVNULL)
    return status


def run(root: Path, rooms: list[str], *, seed: int, count: int, workers: int, again: bool) -> int:
    """Try a sample of each room's mutants and append the outcomes to its file."""
    for room in rooms or list(ROOMS):
        wanted = sample(room, root, seed=seed, count=count)
        _try(root, results_of(room, root, seed=seed), wanted, workers=workers, again=again)
    return 0


def top_up(root: Path, room: str, missing: int, *, workers: int, again: bool) -> None:
    """Try as many further mutants of the room as a finished sample lacks since lines of it changed.

    They are drawn from the code as it is now, and kept when it changes again.
    """
    results = results_of(room, root, added=True)
    known = {outcome_key(entry): entry for entry in read(results)} if results.exists() else {}
    wanted = [
        Mutant(**{key: entry[key] for key in ("file", "operator", "occurrence", "line")})  # type: ignore[arg-type]
        for entry in known.values()
        if entry["digest"] == digest_of(root / str(entry["file"]))
    ]
    fresh = [each for each in sample(room, root, seed=1, count=missing) if outcome_key(asdict(each)) not in known]
    _try(root, results, wanted + fresh[: max(0, missing - len(known))], workers=workers, again=again)


def results_of(room: str, root: Path, *, seed: int = 1, added: bool = False) -> Path:
    """Return the file of a sample's outcomes, or of those that were added to that of seed 1 later."""
    name = f"{room}-added" if added else room if seed == 1 else f"{room}-seed{seed}"
    return results_dir(root) / f"{name}.jsonl"


def _try(root: Path, results: Path, wanted: list[Mutant], *, workers: int, again: bool) -> None:
    directory = results_dir(root)
    covering = Covering(directory / "coverage", directory / "times.jsonl", directory / "sources")
    equivalent = equivalents(root)
    known = {} if not results.exists() else {outcome_key(entry): entry for entry in read(results)}
    digests = {name: digest_of(root / name) for name in {mutant.file for mutant in wanted}}
    todo = []
    for mutant in wanted:
        entry = known.get(outcome_key(asdict(mutant)))
        stale = entry is None or entry["digest"] != digests[mutant.file]
        if stale or (again and entry is not None and is_open(entry, equivalent)):
            todo.append(mutant)
    with (
        _copies(root, workers, again=again) as copies,
        results.open("a") as stream,
        tqdm(total=len(todo), desc=results.stem) as bar,
    ):
        for mutant, outcome, test in _outcomes(todo, copies, covering):
            entry = asdict(mutant) | {"outcome": outcome, "test": test, "digest": digests[mutant.file]}
            stream.write(json.dumps(entry | mutant.change(root)) + "\n")
            stream.flush()
            bar.update()


def _outcomes(mutants: list[Mutant], copies: list[Copy], covering: Covering) -> Iterator[tuple[Mutant, str, str]]:
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def attempt(mutant: Mutant) -> tuple[Mutant, str, str]:
        copy = free.get()
        try:
            return (mutant, *copy.attempt(mutant, covering))
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        try:
            for done in as_completed([pool.submit(attempt, mutant) for mutant in mutants]):
                yield done.result()
        finally:  # after an error, no mutant is tried whose outcome nothing would keep
            pool.shutdown(cancel_futures=True)


def equivalents(root: Path) -> set[tuple[object, ...]]:
    """Return (file, line before, line after) of the mutants that behave like the original."""
    file = root / "tests" / "mutants" / "equivalent.toml"
    return {(entry["file"], entry["was"], entry["now"]) for entry in tomllib.loads(file.read_text())["mutant"]}


def is_open(entry: dict[str, object], equivalent: set[tuple[object, ...]]) -> bool:
    """Return True if the mutant survived and is not equivalent."""
    return entry["outcome"] != "caught" and (entry["file"], entry["was"], entry["now"]) not in equivalent


def read(results: Path) -> Iterator[dict[str, object]]:
    """Yield a room's outcomes, oldest first."""
    for line in results.read_text().splitlines():
        yield json.loads(line)


def outcome_key(entry: dict[str, object]) -> tuple[object, ...]:
    """Return the values that distinguish an outcome's mutant from all others."""
    return entry["file"], entry["operator"], entry["occurrence"]


def digest_of(path: Path) -> str:
    """Return a digest of a source file: an outcome of another one says nothing."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Copy:
    """A copy of the tree that mutants are written to, and the process that tests it."""

    def __init__(self, root: Path, directory: Path, *, again: bool) -> None:
        self._root = root
        self._most_s = _MOST_S if again else _FIRST_S
        self._tree = directory
        ignore = shutil.ignore_patterns(".git", ".venv*", "results", "__pycache__", ".mypy_cache", ".hypothesis")
        shutil.copytree(root, directory, ignore=ignore, dirs_exist_ok=True)
        checked = py_compile.PycInvalidationMode.CHECKED_HASH  # times are too coarse for changes a moment apart
        compileall.compile_dir(directory / "obdlab", quiet=2, invalidation_mode=checked)
        compileall.compile_dir(directory / "tests", quiet=2, invalidation_mode=checked)
        subprocess.run(["git", "init", "-q"], cwd=directory, check=True)  # tests ask git for what is ignored
        self._log = directory / "mutant.log"
        #: Tests that pass without a mutant, and such as do not; by name, or by the status of runs without one.
        self._sound: set[str] = set()
        self._unsound: set[str] = set()
        environment = os.environ | {
            "PYTHONPATH": str(directory),
            "OPENBLAS_NUM_THREADS": "1",
            ALL_EXAMPLES: "1" if again else "",
            "TMPDIR": str(directory / "tmp"),
        }
        (directory / "tmp").mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.zygote"],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def attempt(self, mutant: Mutant, covering: Covering) -> tuple[str, str]:
        """Return "caught", "survived" or "not run" (no test runs the line), and the test that failed.

        A test that fails without the mutant as well is left out from then on.
        """
        text = (self._root / mutant.file).read_text().splitlines()[mutant.line - 1]
        while True:
            known = [test for test in covering.tests_of(mutant.file, text) if test not in self._unsound]
            tests, seconds = _affordable(known, covering.seconds, self._most_s)
            if not tests:
                return "not run", ""
            timeout_s = max(_LEAST_S, 3 * seconds + 15)
            path = self._tree / mutant.file
            try:
                path.write_text(mutant.source(self._root))
                status, failed = self._pytest(tests, timeout_s)
            finally:
                path.write_text((self._root / mutant.file).read_text())
            if status == 0:
                return "survived", ""
            if failed in self._sound:
                return "caught", failed
            again, culprit = self._pytest([failed] if failed else tests, timeout_s)
            if again == 0:
                self._sound.add(failed or f"status {status}")
                return "caught", failed or f"status {status}"
            if not (failed or culprit):
                if again != "timeout":
                    raise RuntimeError(
                        f"tests do not run without a mutant: {self._log.read_text(errors='replace')[-2000:]}"
                    )
                culprit = tests[-1]  # the machine is too busy for all of them
            self._unsound.add(failed or culprit)

    # Return the exit status, or "timeout", and the name of the test that failed, if one did.
    def _pytest(self, tests: list[str], timeout_s: float) -> tuple[int | str, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        command = {"tests": tests, "seconds": timeout_s, "log": str(self._log)}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        status: int | str = json.loads(self._process.stdout.readline())
        shutil.rmtree(self._tree / "tmp", ignore_errors=True)
        (self._tree / "tmp").mkdir(exist_ok=True)
        lines = self._log.read_text(errors="replace").splitlines()
        failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
        absent = f"ERROR: not found: {self._tree}/"  # renamed since the tests were recorded
        failed += [line.removeprefix(absent) for line in lines if line.startswith(absent)]
        return status, next((name for name in tests if failed and name.startswith(failed[0])), "")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _affordable(tests: list[str], seconds: dict[str, float], most_s: float) -> tuple[list[str], float]:
    chosen, total = [], 0.0
    for test in tests:
        if chosen and total + seconds[test] > most_s:
            continue
        chosen.append(test)
        total += seconds[test]
    return chosen, total


@contextmanager
def _copies(root: Path, workers: int, *, again: bool) -> Iterator[list[Copy]]:
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        copies = [Copy(root, Path(directory) / f"copy{number}", again=again) for number in range(workers)]
        everyone = list(copies)
        try:
            yield copies
        finally:
            for copy in everyone:
                copy.close()
