"""The docs hold together: every link leads somewhere, the citation is of this version.

``make docs`` checks that every page is in a table of contents.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
#: Generated pages, the list of mutants, guides to features that came after the docs had been shortened, and formats,
#: to which each feature adds its own.
_UNCOUNTED = {"commands.md", "states.md", "changes.md", "mutants.md", "verify.md", "turbo-oci.md", "formats.md"}
MOST_WORDS = 30_000
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def links(page: Path) -> list[str]:
    return [link for link in _LINK.findall(page.read_text()) if "://" not in link and not link.startswith("mailto:")]


def test_the_readme_leads_to_the_docs() -> None:
    assert "docs/index.md" in links(ROOT / "README.md")
    assert "docs/tutorial/run-containers.md" in links(ROOT / "README.md")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name}: {link}"


def words(page: Path) -> int:
    """Count the words that a reader sees; figures that rows fill in are not counted."""
    text = re.sub(r"<!-- figures: .*?<!-- end of figures -->", "", page.read_text(), flags=re.DOTALL)
    return len(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).split())


def test_the_docs_stay_short() -> None:
    counted = {page.name: words(page) for page in PAGES if page.name not in _UNCOUNTED}
    longest = sorted(counted.items(), key=lambda each: -each[1])[:8]
    assert sum(counted.values()) <= MOST_WORDS, (
        f"say each thing once; {sum(counted.values())} words, most in {longest}"
    )


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
