"""Notifications to systemd: the protocol of sd_notify(3), which needs no library."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

_SEND_S = 1.0


def notify(*states: str) -> bool:
    """Send ``states``, such as "READY=1", to $NOTIFY_SOCKET. Return True if they were sent."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_SEND_S)
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send("\n".join(states).encode())
    except OSError as error:
        log.warning("%s: cannot notify: %s", address, error.strerror or error)
        return False
    return True


def ready(alive: Callable[[], bool] | None = None) -> None:
    """Report that the service is ready. Feed a watchdog twice in its interval as long as ``alive`` returns True."""
    if notify("READY=1", f"MAINPID={os.getpid()}") and (interval_s := watchdog_s()):
        threading.Thread(target=_feed, args=(interval_s / 2, alive), name="watchdog", daemon=True).start()


def ready_without_thread() -> None:
    """Report that the service is ready, and feed a watchdog from the main thread, by a timer's signal (SIGALRM).

    For processes that fork: the signal's handler runs only if the main thread runs, and children do not inherit the
    timer.
    """
    if notify("READY=1", f"MAINPID={os.getpid()}") and (interval_s := watchdog_s()):
        signal.signal(signal.SIGALRM, lambda *_: notify("WATCHDOG=1"))
        signal.setitimer(signal.ITIMER_REAL, interval_s / 2, interval_s / 2)


def stopping() -> None:
    """Report that the service is about to end."""
    notify("STOPPING=1")


def watchdog_s() -> float | None:
    """Return the watchdog's interval in seconds ($WATCHDOG_USEC); None without a watchdog."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not (usec.isascii() and usec.isdecimal() and int(usec)) or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6


def _feed(interval_s: float, alive: Callable[[], bool] | None) -> None:
    wait = threading.Event().wait
    while not wait(interval_s):
        try:
            well = alive is None or alive()
        except Exception:
            log.exception("watchdog")
            well = False
        if well:
            notify("WATCHDOG=1")
