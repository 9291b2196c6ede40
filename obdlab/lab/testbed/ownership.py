"""Records on disk of the networks and containerds of experiments, to find the remains of killed ones.

Each is a JSON file that names the owning process. The owner removes the file after it has taken the network or
containerd down; ``obdlab.lab.testbed.leftovers`` takes down those whose owner is gone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from obdlab.system.processes import Process

# Outside of /run/obdlab, which a cleanup of devices empties.
DEFAULT_STATE_DIR = Path("/run/obdlab-lab")


class Record:
    """A record of this process."""

    def __init__(self, state_dir: Path, kind: str, name: str, **facts: Any) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        me = Process.of(os.getpid())
        self.path = state_dir / f"{kind}-{name}.json"
        owner = {"owner_pid": os.getpid(), "owner_start_ticks": me and me.start_time}
        self.path.write_text(json.dumps({"kind": kind, "name": name, **facts, **owner}))

    def remove(self) -> None:
        """Remove the record after the recorded thing is gone."""
        self.path.unlink(missing_ok=True)


def orphans(state_dir: Path, kind: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return (file, facts) of a kind's records whose owner is gone. Malformed records count as orphans."""
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
    # A crash has cut the file short: take the name from the file's name.
    return facts if isinstance(facts, dict) else {"name": path.stem.partition("-")[2]}


def _owner_lives(facts: dict[str, Any]) -> bool:
    pid = facts.get("owner_pid")
    owner = Process.of(pid) if isinstance(pid, int) else None
    return owner is not None and owner.start_time == facts.get("owner_start_ticks")
