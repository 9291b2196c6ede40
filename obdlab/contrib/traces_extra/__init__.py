"""More to do with traces: block events of a start, explained or made a trace, and traces for a rebuilt image."""

from __future__ import annotations

from obdlab.cli.groups import Command

WATCH = Command("watch", "record the kernel's block events of a start", f"{__name__}.eventcommands:declare_watch")
IMPORT = Command("import", "make a trace of block events", f"{__name__}.eventcommands:declare_import")
TIMELINE = Command("timeline", "explain a start, read by read", f"{__name__}.eventcommands:declare_timeline")
TRANSPLANT = Command("transplant", "carry a trace over to a rebuilt image", f"{__name__}.transplanting:declare")
