"""Errors of an image itself during a pull."""

from __future__ import annotations

from obdlab.errors import ObdlabError


class PullError(ObdlabError):
    """The image cannot be pulled: not for this platform, or layers that do not match its config."""
