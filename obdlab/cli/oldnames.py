"""Command names of earlier versions: each still works, and prints a hint on standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Old words and the words that replace them; the longest that match count.
OLD_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("convert",): ("image", "convert"),
    ("convert-list",): ("image", "convert-list"),
    ("compare",): ("image", "compare"),
    ("rpull",): ("image", "pull"),
    ("inspect",): ("image", "inspect"),
    ("verify",): ("image", "verify"),
    ("ls",): ("image", "ls"),
    ("cat",): ("image", "cat"),
    ("cp",): ("image", "cp"),
    ("pull-blob",): ("image", "pull-blob"),
    ("create",): ("layer", "create"),
    ("commit",): ("layer", "commit"),
    ("seal",): ("layer", "seal"),
    ("merge",): ("layer", "merge"),
    ("gc",): ("layer", "gc"),
    ("resize",): ("layer", "resize"),
    ("import",): ("layer", "import"),
    ("diff",): ("layer", "diff"),
    ("zfile",): ("layer", "zfile"),
    ("attach",): ("device", "attach"),
    ("detach",): ("device", "detach"),
    ("ls-devices",): ("device", "list"),
    ("mount",): ("device", "mount"),
    ("umount",): ("device", "umount"),
    ("snapshot",): ("device", "snapshot"),
    ("upgrade",): ("device", "upgrade"),
    ("graduate",): ("device", "graduate"),
    ("tcmu-attach",): ("device", "tcmu-attach"),
    ("tcmu-detach",): ("device", "tcmu-detach"),
    ("trace", "publish"): ("image", "publish"),
    ("trace", "unpublish"): ("image", "unpublish"),
    ("cache", "ls"): ("cache", "list"),
    ("snapshotter",): ("serve", "snapshotter"),
    ("tcmu",): ("serve", "tcmu"),
    ("exporter",): ("serve", "exporter"),
    ("snapshot-api",): ("serve", "snapshot-api"),
    ("nbd",): ("serve", "nbd"),
    ("device-host",): ("serve", "device-host"),
    ("dataset",): ("lab", "dataset"),
    ("experiment",): ("lab",),
    ("experiment", "report"): ("lab", "show"),
    ("evaluate",): ("lab", "evaluate"),
    ("report",): ("lab", "report"),
}


def renamed(words: Sequence[str]) -> list[str]:
    """Return the command line with today's name of its command; print a hint if that is another one."""
    first = next((number for number, word in enumerate(words) if not word.startswith("-")), len(words))
    for length in (2, 1):
        old = tuple(words[first : first + length])
        new = OLD_NAMES.get(old)
        if new is not None:
            print(f"obdlab: '{' '.join(old)}' is now 'obdlab {' '.join(new)}'", file=sys.stderr)
            return [*words[:first], *new, *words[first + length :]]
    return list(words)
