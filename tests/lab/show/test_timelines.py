"""A start's waterfall, and the notebook that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import pytest

from obdlab.contrib.traces_extra.timeline import as_dict, summary, timeline
from obdlab.errors import FormatError
from obdlab.image.open import open_stack
from obdlab.lab.show.report import run_notebook
from obdlab.lab.show.timelines import by_file, draw, load, told
from tests.contrib.traces_extra.test_timeline import EXT4, a_file, reads_for

NOTEBOOK = Path(__file__).parents[3] / "notebooks" / "timeline.ipynb"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with open_stack(EXT4) as disk:
        steps = timeline(reads_for(disk), disk)
        facts = summary(steps, disk)
    told = {name: getattr(facts, name) for name in facts.__dataclass_fields__}
    made = tmp_path / "timeline.json"
    made.write_text(json.dumps({"summary": told, "steps": [as_dict(step) for step in steps]}))
    return made


def test_files_come_in_the_order_of_first_use(path: Path) -> None:
    steps, facts = load(path)
    files = by_file(steps)
    assert list(files["first_ms"]) == sorted(files["first_ms"])
    with open_stack(EXT4) as disk:
        name, _, size = a_file(disk)
    assert files.loc[name.decode(), "processes"] == "cat"
    assert files.loc[name.decode(), "bytes"] >= size
    assert files.loc[name.decode(), "waited_ms"] >= 50
    assert "by 2 processes" in told(facts)["reads"]
    assert "the trace" not in told(facts)
    assert "had 50.0%" in told(facts | {"coverage": 0.5, "over_read": None})["the trace"]


def test_the_figure_shows_every_state(path: Path, tmp_path: Path) -> None:
    figure = draw(load(path)[0])
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
    pixels = (matplotlib.image.imread(tmp_path / "figure.png")[:, :, :3] * 255).round().astype(int)
    for colour in ((0xA6, 0x3D, 0x40), (0xB9, 0xC6, 0xD1), (0xDD, 0xDD, 0xDD)):  # waited, there, untold
        assert ((pixels - colour) == 0).all(axis=2).sum() > 5


@pytest.mark.parametrize("content", [None, "", "{}", '{"steps": 5, "summary": {}}', "[1]"])
def test_other_files_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "x").write_text(content)
    with pytest.raises(FormatError, match="no timeline"):
        load(tmp_path / "x")


# ipykernel and zmq warn about their own event loops.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_notebook_runs(path: Path, tmp_path: Path) -> None:
    run_notebook(NOTEBOOK, {"timeline": str(path)}, tmp_path / "out.ipynb")
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    kinds = {kind for cell in cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert {"image/png", "text/html"} <= kinds
