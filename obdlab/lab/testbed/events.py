"""containerd's events with its own time stamps: container created, task created, task started."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.registry import parse_time_s

if TYPE_CHECKING:
    from collections.abc import Sequence

# 2026-01-31 12:34:56.789 +0000 UTC namespace /topic {json}
_LINE = re.compile(r"(\S+) (\S+) \+0000 UTC (\S+) (/\S+) (\{.*\})")


@dataclass(frozen=True, slots=True)
class Event:
    """One event: ``time_s`` is Unix time by containerd's clock, ``values`` the message."""

    time_s: float
    topic: str
    values: dict[str, Any]


def parse_event(line: str) -> Event | None:
    """Parse a line of ``ctr events``; return None if the line is not an event."""
    match = _LINE.fullmatch(line.strip())
    if match is None:
        return None
    try:
        values = json.loads(match[5])
        return Event(parse_time_s(f"{match[1]}T{match[2]}Z"), match[4], values if isinstance(values, dict) else {})
    except (ValueError, LabError):
        return None


class EventMonitor:
    """Collects the events of one containerd from now on, through ``ctr events``."""

    def __init__(self, ctr: Sequence[str]) -> None:
        self._events: list[Event] = []
        self._arrived = threading.Condition()
        self._child = subprocess.Popen(
            [*ctr, "events"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._collect, name="containerd-events", daemon=True)
        self._reader.start()

    def wait_for(self, topic: str, key: str, identity: str, timeout_s: float = 5.0) -> Event:
        """Return the last event of a topic whose ``key`` is ``identity``, waiting for it. Raises LabError."""
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while True:
                for event in reversed(self._events):
                    if event.topic == topic and event.values.get(key) == identity:
                        return event
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._arrived.wait(left_s):
                    raise LabError(f"containerd: no event {topic} for {identity} within {timeout_s:g} s")

    def forget(self) -> None:
        """Drop the collected events."""
        with self._arrived:
            self._events.clear()

    def close(self) -> None:
        """Stop collecting."""
        self._child.kill()
        self._child.wait(10)
        self._reader.join(10)
        if self._child.stdout is not None:
            self._child.stdout.close()

    def _collect(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            event = parse_event(line)
            if event is not None:
                with self._arrived:
                    self._events.append(event)
                    self._arrived.notify_all()
