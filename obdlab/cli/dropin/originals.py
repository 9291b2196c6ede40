"""The original's commands: where they live, and the module that has each one's table. Imports none of them."""

from __future__ import annotations

from pathlib import Path

#: Where the original's packages put their programs.
HOME = Path("/opt/overlaybd")
_BIN, _SNAPSHOTTER = "bin", "snapshotter"

#: Name of each command, its directory below :data:`HOME`, and "module:table".
TOOLS: dict[str, tuple[str, str]] = {
    "overlaybd-create": (_BIN, "layer_tools:CREATE"),
    "overlaybd-commit": (_BIN, "layer_tools:COMMIT"),
    "overlaybd-merge": (_BIN, "layer_tools:MERGE"),
    "overlaybd-zfile": (_BIN, "zfile_tool:ZFILE"),
    "overlaybd-apply": (_BIN, "apply_tools:APPLY"),
    "overlaybd-resize": (_BIN, "resize_tool:RESIZE"),
    "turboOCI-apply": (_BIN, "apply_tools:TURBO_APPLY"),
    "overlaybd-tcmu": (_BIN, "daemon_tools:TCMU"),
    "overlaybd-snapshotter": (_SNAPSHOTTER, "daemon_tools:SNAPSHOTTER"),
    "overlaybd-attacher": (_SNAPSHOTTER, "attacher:ATTACHER"),
    "convertor": (_SNAPSHOTTER, "convertor:CONVERTOR"),
    "ctr": (_SNAPSHOTTER, "ctr:CTR"),
}
