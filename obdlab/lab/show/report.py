"""Running a notebook with parameters and turning it into a page. Needs the ``lab`` extra (papermill, nbconvert).

papermill only warns about a parameter that the notebook does not declare. Here it is an error, since a run with a
misspelt name would measure something else.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from obdlab.command import install_command
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

#: A cell that takes longer counts as hung (papermill waits for ever for a killed kernel).
CELL_TIMEOUT_S = 3600


class ReportError(ObdlabError):
    """A notebook could not be run: unknown parameter, failing cell, missing packages."""


def run_notebook(notebook: Path, parameters: Mapping[str, Any], output: Path) -> Path:
    """Run ``notebook`` with ``parameters``, store the executed copy as ``output``; return the HTML page beside it.

    The page is written even if a cell fails, and shows the error in its place. Raises ReportError.
    """
    papermill = _papermill()
    check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _standard_error_to(output.with_suffix(".log")):
            papermill.execute_notebook(
                str(notebook),
                str(output),
                parameters=dict(parameters),
                cwd=str(notebook.parent),
                progress_bar=False,
                execution_timeout=CELL_TIMEOUT_S,
                start_timeout=120,
            )
    except papermill.PapermillExecutionError as error:
        page = write_page(output)
        raise ReportError(f"{notebook}: a cell failed: {error.ename}: {error.evalue} (see {page})") from error
    return write_page(output)


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Raise ReportError if the notebook is missing or does not declare one of ``parameters``."""
    if not notebook.is_file():
        raise ReportError(f"{notebook}: no such notebook")
    known = set(_papermill().inspect_notebook(str(notebook)))
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise ReportError(
            f"{notebook}: unknown parameters (got {', '.join(unknown)}, wanted among {', '.join(sorted(known))})"
        )


def write_page(executed: Path) -> Path:
    """Render an executed notebook as HTML without its code; return the page's path."""
    from nbconvert import HTMLExporter

    logging.getLogger("traitlets").setLevel(logging.ERROR)  # it warns of figures without alternative texts
    exporter: Any = HTMLExporter  # untyped upstream
    body, _ = exporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True).from_filename(
        str(executed)
    )
    page = executed.with_suffix(".html")
    page.write_text(body, encoding="utf-8")
    return page


# The kernel is a separate process; its log lines do not belong in the command's output.
@contextmanager
def _standard_error_to(path: Path) -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("wb") as log:
            os.dup2(log.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _papermill() -> Any:
    try:
        import papermill
    except ImportError as error:
        raise ReportError(f"notebooks need the lab extra: {install_command('lab')}") from error
    return papermill
