"""pandas, which only the lab extra installs: for the functions that return tables."""

from __future__ import annotations

from typing import Any

from obdlab.command import install_command
from obdlab.errors import ObdlabError


class LabExtraError(ObdlabError, code="lab-extra"):
    """A package of the lab extra (pandas or matplotlib) is missing."""


def pandas_or_error() -> Any:
    """Return pandas. Raises LabExtraError if it is not installed."""
    try:
        import pandas as pd
    except ImportError as error:
        raise LabExtraError(f"tables need the lab extra: {install_command('lab')}") from error
    return pd
