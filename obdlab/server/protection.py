"""Protects keepers and servers when memory runs out, and bounds their own memory.

Other processes' I/O waits for a keeper or a device server, so the kernel is to kill containers before them. A
protected process must not be the one that grows: each has a bound on its memory (``bound_memory``).
"""

from __future__ import annotations

import logging
import resource
import threading
from pathlib import Path

from obdlab.system import abi

log = logging.getLogger(__name__)

KEEPER_OOM_SCORE_ADJUST = -1000
SERVER_OOM_SCORE_ADJUST = -999
#: A keeper holds no data.
KEEPER_MEMORY = 64 << 20
#: Not used by Python's own calls. The default stack is 8 MiB, and a server has up to 256 threads.
_STACK = 1 << 20
_OOM_SCORE_ADJUST = Path("/proc/self/oom_score_adj")


def protect(device_id: str, oom_score_adjust: int) -> None:
    """Have the kernel spare this process, on which other processes' I/O depends, as far as permitted."""
    # Both need CAP_SYS_RESOURCE, which some containers withhold; a device works without.
    try:
        _OOM_SCORE_ADJUST.write_text(str(oom_score_adjust))
    except OSError as error:
        log.debug("%s: oom_score_adj: %s", device_id, error)
    try:  # this process's allocations must never wait for writeback to its own device
        abi.prctl(abi.PR_SET_IO_FLUSHER, 1)
    except OSError as error:
        log.debug("%s: no I/O flusher: %s", device_id, error)


def unprotect() -> None:
    """Undo the protection inherited from a keeper or server that started this process."""
    try:
        if int(_OOM_SCORE_ADJUST.read_text()) in (KEEPER_OOM_SCORE_ADJUST, SERVER_OOM_SCORE_ADJUST):
            _OOM_SCORE_ADJUST.write_text("0")
        abi.prctl(abi.PR_SET_IO_FLUSHER, 0)
    except (OSError, ValueError) as error:
        log.debug("protection: %s", error)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def bound_memory(most: int) -> None:
    """Let this process take ``most`` bytes for data beyond its present size: heap, stacks, anonymous mappings.

    Replaces an earlier bound; 0 removes it. An allocation above the bound fails, in Python by MemoryError, and so
    does the request that made it. Threads made later have small stacks, which count.
    """
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = _data_size() + most if most else hard
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    threading.stack_size(_STACK)


def _data_size() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0
