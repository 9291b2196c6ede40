"""Notes on disk of what an experiment has set up on this host, so that a killed one's remains can be found.

One JSON file per thing, which names the process that owns it. The owner removes it when it has taken the thing down;
a file whose owner is gone tells ``obdlab.lab.leftovers`` what to take down.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from obdlab.lab.process import process_start_ticks

# Not below /run/obdlab, which a cleanup of devices empties.
DEFAULT_STATE_DIR = Path("/run/obdlab-lab")


class Record:
    """A note of this process's."""

    def __init__(self, state_dir: Path, kind: str, name: str, **facts: Any) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self.path = state_dir / f"{kind}-{name}.json"
        owner = {"owner_pid": os.getpid(), "owner_start_ticks": process_start_ticks(os.getpid())}
        self.path.write_text(json.dumps({"kind": kind, "name": name, **facts, **owner}))

    def remove(self) -> None:
        """Forget it: the thing is gone."""
        self.path.unlink(missing_ok=True)


def orphans(state_dir: Path, kind: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return the notes of a kind whose owner is gone, with their files. Unreadable ones count as orphans."""
    found = []
    for path in sorted(state_dir.glob(f"{kind}-*.json")):
        facts = _read(path)
        if facts is not None and not _owner_lives(facts):
            found.append((path, facts))
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        return None  # its owner has just removed it
    except ValueError:
        facts = None
    # Cut short by a crash: the file's name is what is left.
    return facts if isinstance(facts, dict) else {"name": path.stem.partition("-")[2]}


def _owner_lives(facts: dict[str, Any]) -> bool:
    pid = facts.get("owner_pid")
    return isinstance(pid, int) and process_start_ticks(pid) == facts.get("owner_start_ticks")
