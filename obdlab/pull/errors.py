"""What goes wrong with an image itself while it is pulled."""

from __future__ import annotations

from obdlab.errors import ObdlabError


class PullError(ObdlabError):
    """The image cannot be pulled as it is: not for this platform, layers that do not match its config."""
