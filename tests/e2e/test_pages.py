"""Every command in the docs is run: each page's, in order, on a machine that has what the page supposes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests import capabilities
from tests.e2e import pages, stage
from tests.e2e.pages import Line
from tests.snapshotter import imagefiles
from tests.test_docs_commands import PAGES, command_lines

ROOT = Path(__file__).parents[2]
#: The page that test_quick_start follows, with all that it prints.
FOLLOWED = ROOT / "docs" / "tutorial" / "run-containers.md"
LINES = {page: pages.lines_of(page.read_text()) for page in PAGES if page != FOLLOWED}
#: Most lines that no test runs, by reason.
MOST_SKIPPED = {"modules": 13, "hours": 13, "systemd": 4, "elided": 8, "packages": 2, "dataset": 2, "forever": 1}
_TIMEOUT_S = 1500


def test_how_pages_are_read() -> None:
    page = """
<!-- test: with FILE=some.file 5=1 -->
<!-- test: first
echo prepared -->
<!-- test: status any "two" -->
<!-- test: background "three" -->
<!-- test: skip hours "four" -->
```
one FILE FILES --count=5   # as shown
two \\
  FILE

three   # serves
four
```

```console
# five <<'END'
text
END
what it prints
host1$ six &
```

```text
seven
```
"""
    lines = pages.lines_of(page)
    assert [(line.text, line.hidden) for line in lines] == [
        ("echo prepared", True),
        ("one some.file FILES --count=1   # as shown", False),
        ("two \\\n  some.file", False),
        ("three   # serves", False),
        ("four", False),
        ("five <<'END'\ntext\nEND", False),
        ("six &", False),
    ]
    script = pages.script(lines)
    assert "one some.file FILES --count=1   # as shown\nended $? 0\n" in script
    assert "two \\\n  some.file\nended $? any\n" in script
    assert "in_background 13 three\n" in script
    assert "four" not in script
    assert script.endswith("in_background 22 six \n")
    with pytest.raises(ValueError, match="no note: skip weather"):
        pages.lines_of("<!-- test: skip weather -->\n```\na\n```\n")
    with pytest.raises(ValueError, match="a note for no line of the block: b"):
        pages.lines_of('<!-- test: skip hours "b" -->\n```\na\n```\n')
    with pytest.raises(ValueError, match="a note without a block"):
        pages.lines_of("<!-- test: skip hours -->\n")


def test_every_command_is_a_line() -> None:
    for page, lines in LINES.items():
        found = "\n".join(line.shown for line in lines).replace("\\\n", " ")
        for command in command_lines(page.read_text()):
            assert " ".join(command.split()) in " ".join(found.split()), f"{page.name}: {command}"


def test_few_lines_are_skipped() -> None:
    skipped = Counter(line.skipped for lines in LINES.values() for line in lines if line.skipped)
    assert all(count <= MOST_SKIPPED[reason] for reason, count in skipped.items()), skipped
    shown = sum(not line.hidden for lines in LINES.values() for line in lines)
    assert shown - skipped.total() > 75


def _marked(page: Path, lines: list[Line]) -> object:
    # Even the smallest experiments take minutes.
    measures = any(line.hidden and "small_experiments" in line.text for line in lines)
    return pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] if measures else [])


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    return stage.fill_storage(tmp_path_factory.mktemp("storage"))


@pytest.mark.containerd
@pytest.mark.registry
@pytest.mark.timeout(_TIMEOUT_S + 60)
@pytest.mark.parametrize("page", [_marked(*each) for each in LINES.items() if not all(x.skipped for x in each[1])])
def test_the_commands_of_a_page(page: Path, storage: Path, tmp_path: Path) -> None:
    status, output = stage.run(tmp_path, storage, pages.script(LINES[page]), _TIMEOUT_S)
    begun = [number for number, _ in stage.parts(output)]
    assert status == 0, f"{page.name}:{begun[-1] if begun else 0}: status {status}\n{output[-6000:]}"
    assert begun == [line.number for line in LINES[page] if not line.skipped]
