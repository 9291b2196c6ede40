"""Which tests run which lines, and how long each takes: a pytest plugin that records, and a reader of its file.

The plugin names the running test in an environment variable that coverage's configuration takes as the context, so
that the processes a test starts are counted for it as well.
"""

from __future__ import annotations

import ast
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import coverage
import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTEXT = "OBDLAB_TEST_CONTEXT"
TIMES = "OBDLAB_TEST_TIMES"

# Under coverage, this many examples take about as long as the usual 100 take without it when mutants are tried.
_EXAMPLES = 20

#: Coverage's configuration for a run; the paths are filled in. Contexts are tests' names, in children too.
RCFILE = """
[run]
source = {root}/obdlab
data_file = {data}
parallel = true
context = ${{{context}-}}
patch =
    subprocess
    fork
    _exit
sigterm = true
core = ctrace
disable_warnings = no-data-collected, module-not-imported, module-not-measured, couldnt-parse
"""


class Recorder:
    """Names each test's context, and writes down what passed and how long it took."""

    def __init__(self, times: Path) -> None:
        self._times = times

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        os.environ[CONTEXT] = item.nodeid
        current = coverage.Coverage.current()
        if current is not None:
            current.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        with self._times.open("a") as stream:
            line = {"test": report.nodeid, "when": report.when, "outcome": report.outcome, "s": report.duration}
            stream.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(TIMES):
        hypothesis.settings.register_profile(
            "recorded", hypothesis.settings.get_profile("obdlab"), max_examples=_EXAMPLES
        )
        hypothesis.settings.load_profile("recorded")
        config.pluginmanager.register(Recorder(Path(os.environ[TIMES])))


class Covering:
    """The tests that ran a line, quickest first. Lines are known by their text: comments may change without harm.

    ``sources`` is the package as it was when the tests ran.
    """

    def __init__(self, data_file: Path, times: Path, sources: Path) -> None:
        self.seconds, failed = _seconds(times)
        data = coverage.CoverageData(str(data_file))
        data.read()
        self._lines: dict[str, dict[str, set[str]]] = {}
        self._at_import: dict[str, set[str]] = {}
        for name in data.measured_files():
            relative = "obdlab/" + name.rpartition("/obdlab/")[2]
            source = sources / relative
            texts = source.read_text().splitlines() if source.exists() else []
            by_text = self._lines.setdefault(relative, defaultdict(set))
            for line, contexts in data.contexts_by_lineno(name).items():
                if line <= len(texts):
                    names = {context.split("|")[-1] for context in contexts}
                    by_text[texts[line - 1].strip()] |= {
                        test for test in names if test in self.seconds and test not in failed
                    }
            self._at_import[relative] = _run_at_import("\n".join(texts))

    def tests_of(self, file: str, text: str) -> list[str]:
        """Return the names of the tests that ran this line, those of the file's name first.

        A line that runs when its module is imported belongs to no test, or to the one that imported the module: then
        these are all tests of the module.
        """
        stem = Path(file).stem
        lines = self._lines.get(file, {})
        found = lines.get(text.strip(), set())
        if text.strip() in self._at_import.get(file, ()):
            found = {test for tests in lines.values() for test in tests}
        return sorted(found, key=lambda test: (f"test_{stem}" not in test, self.seconds[test]))


def _run_at_import(source: str) -> set[str]:
    # Of a statement over several lines coverage sees one, so all lines outside of functions count.
    texts = source.splitlines()
    inside: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside |= set(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
    return {text.strip() for number, text in enumerate(texts, 1) if number not in inside}


def _seconds(times: Path) -> tuple[dict[str, float], set[str]]:
    seconds: dict[str, float] = defaultdict(float)
    failed = set()
    for line in times.read_text().splitlines():
        entry = json.loads(line)
        seconds[entry["test"]] += entry["s"]
        if entry["outcome"] != "passed":
            failed.add(entry["test"])
    return dict(seconds), failed
