"""Whether this host's connection is said to be metered: its bytes cost money, or are few.

NetworkManager knows (property ``Metered`` of org.freedesktop.NetworkManager). Hosts without it have no such links.
"""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

_ASK = (
    *("busctl", "--system", "get-property", "org.freedesktop.NetworkManager"),
    *("/org/freedesktop/NetworkManager", "org.freedesktop.NetworkManager", "Metered"),
)
_BUS = Path("/run/dbus/system_bus_socket")
_ANSWER_S = 2.0
# A laptop changes networks.
_GOOD_FOR_S = 60.0
#: NM_METERED_YES and NM_METERED_GUESS_YES.
_YES = ("u 1", "u 3")


class Metered:
    """Asks at most once a minute."""

    def __init__(self, command: tuple[str, ...] = _ASK, bus: Path = _BUS) -> None:
        self._command = command
        self._bus = bus
        self._lock = threading.Lock()
        self._asked: float | None = None
        self._answer = False

    def __call__(self) -> bool:
        """Return True if the connection is said to be metered; False also if no service knows."""
        with self._lock:
            now = time.monotonic()
            if self._asked is None or now - self._asked > _GOOD_FOR_S:
                self._asked, self._answer = now, self._ask()
            return self._answer

    def _ask(self) -> bool:
        if not self._bus.exists():
            return False
        try:
            done = subprocess.run(
                self._command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_ANSWER_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.stdout.strip() in _YES


#: Of this process.
metered = Metered()
