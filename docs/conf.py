"""The site of the documentation: ``make docs`` builds it, with warnings as errors.

Pages are Markdown (MyST). Three parts of the reference are made while it is built: the command line from its parsers
(``docs/commands.py``), states from their tables (``docs/states.py``), and the Python API from docstrings.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

_DOCS = Path(__file__).parent
sys.path.insert(0, str(_DOCS))

import commands  # noqa: E402 - found through the path above
import states  # noqa: E402

_project = tomllib.loads((_DOCS.parent / "pyproject.toml").read_text())["project"]
project = _project["name"]
version = release = _project["version"]
author = "the obdlab developers"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {version}"
html_show_copyright = False
html_show_sphinx = False
# Links to files of the repository are not pages: MyST offers them as downloads. Folders cannot be downloaded.
suppress_warnings = ["myst.xref_missing"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

commands.write_page(_DOCS / "reference" / "commands.md")
states.write_page(_DOCS / "reference" / "states.md")
