"""Where a capability is required, its absence fails a test; and no test skips by a probe of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import capabilities

TESTS = Path(__file__).parent
#: A skip for want of a program that is not one of ``capabilities``.
OWN_PROBE = re.compile(r"skip.*(installed|shutil\.which)|importorskip|shutil\.which.*skip")


@pytest.mark.parametrize("required", [frozenset(), frozenset({"tools"})])
def test_a_missing_program_or_package(required: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "REQUIRED", required)
    kind = pytest.fail.Exception if required else pytest.skip.Exception
    with pytest.raises(kind, match="not installed: no-such-program, nor-this"):
        capabilities.require_tools("sh", "no-such-program", "nor-this")
    with pytest.raises(kind, match="no_such_package"):
        capabilities.require_package("no_such_package")
    capabilities.require_tools("sh")
    assert capabilities.require_package("re") is re


def test_no_test_skips_by_a_probe_of_its_own() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{number}: {line.strip()}"
        for path in sorted(TESTS.rglob("*.py"))
        if path not in (Path(__file__), TESTS / "capabilities.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OWN_PROBE.search(line)
    ]
    assert found == []


def test_ci_requires_what_the_makefile_installs() -> None:
    script = (TESTS.parent / ".ci" / "run").read_text()
    required = [set(names.split(",")) for names in re.findall(r"^export OBDLAB_REQUIRE=(\S+)$", script, re.MULTILINE)]
    assert required[0] >= {"kernel", "containerd", "registry", "vm", "root", "tools", "qemu", "prometheus", "browser"}
    assert required[1] >= {"blocktools", "go"}
