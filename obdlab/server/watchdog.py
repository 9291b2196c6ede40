"""Detects a hanging server: the device's users wait, and the server makes no progress.

The device's keeper looks at intervals. If sysfs shows no request in flight (Documentation/block/stat.rst), the look
wakes no other process. Otherwise it asks every server at its control socket. A server hangs if it stays silent for
the time in which every read has ended, or has one request for twice that time, or takes none while some wait. Time
counts in looks, so a pause of the whole machine, virtual machine or control group makes no server hang when it goes
on.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.server import controlclient
from obdlab.server.messages import Counters, GetCounters
from obdlab.system.processes import thread_states

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obdlab.settings.settings import Settings

log = logging.getLogger(__name__)

#: A server may exceed the deadline of reads by this share of it, and by at least this many seconds.
_MARGIN = 0.25
_LEAST_MARGIN_S = 1.0
_LOOKS = 8
_LONGEST_PAUSE_S = 16.0
#: A live server answers within milliseconds; the keeper does nothing else meanwhile.
_LONGEST_ANSWER_S = 1.0
#: States of threads (proc_pid_stat(5)) that explain a server's silence: killing the server would not help.
_EXCUSED = {"D": "it waits for the kernel", "t": "a debugger holds it"}


@dataclass(frozen=True, slots=True)
class Activity:
    """The kernel's counters of a block device."""

    in_flight: int
    #: Reads, writes, discards and flushes since the device exists.
    completed: int

    @classmethod
    def of(cls, node: Path) -> Activity | None:
        """Read the counters of a device node; None if it is gone."""
        try:
            number = os.stat(node).st_rdev
            path = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
            counts = [int(word) for word in path.read_text().split()]
        except (OSError, ValueError):
            return None
        return cls(counts[8], sum(counts[at] for at in (0, 4, 11, 15) if at < len(counts)))


class Watchdog:
    """Watches the servers of the device at ``directory``."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        longest_s = max(settings.read_deadline_s, settings.open_deadline_s)
        self.limit_s = longest_s + max(_LEAST_MARGIN_S, longest_s * _MARGIN)
        self._pause_s = min(_LONGEST_PAUSE_S, self.limit_s / _LOOKS)
        self._answer_s = min(_LONGEST_ANSWER_S, self._pause_s / 4)
        self._directory = directory
        self._next_look = time.monotonic() + self._pause_s
        self._completed = -1
        self._silent: dict[int, int] = {}  # looks in a row, by process
        self._untaken = 0
        #: How many servers hung in a row without a request completed in between.
        self.hangs = 0

    def pause_s(self) -> float:
        """Return the time until the next look."""
        return max(0.0, self._next_look - time.monotonic())

    def hung(self, node: Path, servers: Mapping[int, int]) -> dict[int, str]:
        """Look, if it is time. Return the hanging ones of ``servers``, each with its symptom.

        Servers are processes by number; number 0 leads.
        """
        if self.pause_s() > 0:
            return {}
        found = self._look(node, servers)
        self._next_look = time.monotonic() + self._pause_s
        return found

    def _look(self, node: Path, servers: Mapping[int, int]) -> dict[int, str]:
        activity = Activity.of(node)
        if activity is None:
            return {}
        moved, self._completed = activity.completed != self._completed, activity.completed
        if moved:
            self.hangs = 0
        if not activity.in_flight:
            self._silent.clear()
            self._untaken = 0
            return {}
        answers = {number: self._ask(number) for number in servers}
        found = {number: why for number, pid in servers.items() if (why := self._judge(pid, answers[number]))}
        self._silent = {pid: looks for pid, looks in self._silent.items() if pid in servers.values()}
        taken = any(answer is None or answer.under_way_s for answer in answers.values())
        self._untaken = 0 if moved or taken else self._untaken + 1
        if self._lasts(self._untaken) and not found and 0 in servers:
            found[0] = f"took none of the requests that waited for {self.limit_s:.0f} s"
        return self._convicted(found, servers)

    def _ask(self, number: int) -> Counters | None:
        name = f"helper-{number}.sock" if number else controlclient.CONTROL_NAME
        try:
            return controlclient.ask(
                self._directory, GetCounters(), Counters, socket_name=name, silence_s=self._answer_s
            )
        except ObdlabError:
            return None

    def _judge(self, pid: int, answer: Counters | None) -> str:
        if answer is None:
            self._silent[pid] = self._silent.get(pid, 0) + 1
            if self._lasts(self._silent[pid]):
                return f"said nothing for {self.limit_s:.0f} s while requests waited"
            return ""
        self._silent.pop(pid, None)
        oldest_s = max(answer.under_way_s, default=0.0)
        return f"has had a request for {oldest_s:.0f} s" if oldest_s > 2 * self.limit_s else ""

    def _lasts(self, looks: int) -> bool:
        return looks * self._pause_s >= self.limit_s

    # Returns those without excuse. All that were found, or their successors, get as much time again.
    def _convicted(self, found: Mapping[int, str], servers: Mapping[int, int]) -> dict[int, str]:
        convicted = {}
        for number, why in found.items():
            self._untaken = 0
            self._silent.pop(servers[number], None)
            excuse = _excuse_of(servers[number])
            if excuse:
                log.error("%s: server %d %s, but %s: it is left alone", self._directory.name, number, why, excuse)
            else:
                convicted[number] = why
        self.hangs += bool(convicted)
        return convicted


def _excuse_of(pid: int) -> str:
    return next((_EXCUSED[state] for state in thread_states(pid) if state in _EXCUSED), "")
