"""What README and docs say was measured is in the rows of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.lab.images.recipe import find_recipe
from obdlab.lab.run.declaration import load
from obdlab.lab.workbench import folder
from tests.figures import blocks, page, picture
from tests.lab.paper.rows import start_rows, store_starts

#: Parts of pages that a benchmark printed without rows, by page: to become fewer, never more.
WITHOUT_ROWS = {"performance.md": 1, "graduation.md": 2, "devices.md": 1}
#: Pages of measurements. The quantities that may stand outside figures are conditions and limits.
CONDITIONS = {
    "README.md": {"20 ms"},
    "contrib.md": set(),
    "devices.md": {"150 s"},
    "evaluate.md": set(),
    "graduation.md": set(),
    "performance.md": {"20 ms", "95 %", "2 ms"},
}


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return blocks.figures()


@pytest.mark.parametrize("path", page.pages(), ids=lambda path: str(path.relative_to(page.ROOT)))
def test_a_page_says_what_the_rows_say(path: Path, made: dict[str, str]) -> None:
    text = path.read_text()
    assert page.written(text, made, path.name) == text, "run: make figures"
    parts = page.without_rows(text)
    assert len(parts) <= WITHOUT_ROWS.get(path.name, 0)
    assert text.count(page.NO_ROWS) == len(parts), "a reader must see that these figures have no rows"
    if path.name in CONDITIONS:
        found = [each for each in page.unsupported(text) if each.partition(":")[0] not in CONDITIONS[path.name]]
        assert not found, "quantities outside figures"


def test_tables_and_picture_are_those_of_the_rows() -> None:
    for path, text in blocks.files().items():
        assert path.read_text() == text, f"{path}: run: make figures"
    assert picture.drawn_from(picture.PATH) == picture.digest(), "run: make figures"
    assert picture.is_whole(picture.PATH)


def test_every_figure_is_shown_somewhere(made: dict[str, str]) -> None:
    shown = {name for path in page.pages() for name in page.names(path.read_text())}
    assert shown == set(made)


def test_a_changed_number_is_noticed(made: dict[str, str]) -> None:
    text = "a <!-- figures: peers-rows -->9 rows<!-- end of figures --> b"
    assert page.written(text, made) == f"a <!-- figures: peers-rows -->{made['peers-rows']}<!-- end of figures --> b"
    table = "<!-- figures: x --><!-- end of figures -->"
    assert page.written(table, {"x": "| a |\n|---|"}) == "<!-- figures: x -->\n| a |\n|---|\n<!-- end of figures -->"
    for wrong in ("<!-- figures: x -->", "<!-- figures: y -->1<!-- end of figures -->", "<!-- end of figures -->"):
        with pytest.raises(page.PageError):
            page.written(wrong, {"x": "1"})


@pytest.mark.parametrize(
    ("text", "quantities"),
    [
        ("takes 4.05 s here", ["4.05 s"]),
        ("12 % and 1,234 IOPS", ["12 %", "1,234 IOPS"]),
        ("100 Mbit/s, `5 s`, [x](a/3 s)", []),
        ("    5 s in code\n", []),
        ("<!-- figures: x -->5 s<!-- end of figures --> 7 ms", ["7 ms"]),
        ("<!-- no rows: c -->5 s<!-- end of figures -->", []),
        ("layers 5 such", []),
    ],
)
def test_quantities_outside_figures(text: str, quantities: list[str]) -> None:
    assert [each.partition(":")[0] for each in page.unsupported(text)] == quantities


def test_the_first_set_is_published_once_it_is_measured(tmp_path: Path) -> None:
    assert blocks.first_set(tmp_path) == "Not measured yet."
    spec = load(folder("experiments") / "first_set.toml").with_values(
        images=["redis"], snapshotters=["overlayfs", "obdlab-hot", "soci"], rates_mbit=[100], rtts_ms=[5], repeats=4
    )
    seconds = {"overlayfs": 4.0, "overlayfs (A/A)": 4.02, "obdlab-hot": 1.0, "soci": 4.0}
    rows = start_rows({(arm, "cold"): total_s for arm, total_s in seconds.items()}, repeats=4)
    for number, row in enumerate(rows):
        row["total_s"] += 0.003 * (number * 7 % 5)
    table = blocks.first_set(store_starts(tmp_path / "first_set", spec, rows))
    lines = {line.split(" | ")[2]: line for line in table.splitlines() if line.startswith("| redis")}
    assert set(lines) == set(seconds)
    assert " rec | faster | " in lines["obdlab-hot"]
    assert " | - | " in lines["soci"]
    assert "rec" not in lines["soci"]
    assert all(line.endswith(" | 4 |") for line in lines.values())


def test_the_first_set_has_its_images_and_arms() -> None:
    spec = load(folder("experiments") / "first_set.toml")
    assert spec.a_a
    assert spec.precision
    assert len(spec.benches()) == 4
    for name in spec.images():
        assert find_recipe(name, [folder("datasets")]).layers
