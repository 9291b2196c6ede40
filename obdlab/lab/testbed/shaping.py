"""Rate limits by the kernel's token bucket filter (tc-tbf(8))."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.lab.testbed.process import LabError, run

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAST_BURST = 16 << 10
_MOST_GSO_SIZE = 64 << 10
_QUEUE_S = 0.1
_LEAST_QUEUE = 256 << 10


@dataclass(frozen=True, slots=True)
class Shaping:
    """Limits of one link direction. ``burst`` and ``queue_limit`` in bytes; ``rate_mbit`` in 10^6 bit/s."""

    rate_mbit: float
    burst: int
    queue_limit: int

    @classmethod
    def of_rate(cls, rate_mbit: float) -> Shaping:
        """Return the shaping of a rate: a burst of 1 ms, a queue of 100 ms, each with a minimum.

        After a pause a burst passes unlimited, which favours small requests: 1 ms keeps this small beside any round
        trip, and 16 KiB is the least that timers can serve. Raises LabError.
        """
        if not 0.1 <= rate_mbit <= 100_000:
            raise LabError(f"rate of a link: got {rate_mbit} Mbit/s, wanted between 0.1 and 100000")
        per_second = rate_mbit * 1e6 / 8
        return cls(
            rate_mbit, max(_LEAST_BURST, int(per_second * 0.001)), max(_LEAST_QUEUE, int(per_second * _QUEUE_S))
        )

    @property
    def gso_size(self) -> int:
        """The largest packet for the link: one that fits into the burst (TBF splits larger ones)."""
        return min(_MOST_GSO_SIZE, self.burst)


def limit_rate(enter: Sequence[str], interface: str, shaping: Shaping) -> None:
    """Shape packets that leave ``interface`` in the network namespace that ``enter`` enters. Raises LabError."""
    run([*enter, "ip", "link", "set", interface, "gso_max_size", str(shaping.gso_size)])
    rate = f"{round(shaping.rate_mbit * 1000)}kbit"
    options = ("rate", rate, "burst", str(shaping.burst), "limit", str(shaping.queue_limit))
    run([*enter, "tc", "qdisc", "replace", "dev", interface, "root", "tbf", *options])


def unlimit_rate(enter: Sequence[str], interface: str) -> None:
    """Remove the limit of ``interface``. Raises LabError."""
    run([*enter, "tc", "qdisc", "del", "dev", interface, "root"])
    run([*enter, "ip", "link", "set", interface, "gso_max_size", str(_MOST_GSO_SIZE)])


def drops(enter: Sequence[str], interface: str) -> int:
    """Return the number of packets that the shaper of ``interface`` has dropped."""
    disciplines = json.loads(run([*enter, "tc", "-s", "-j", "qdisc", "show", "dev", interface]))
    return sum(int(discipline.get("drops", 0)) for discipline in disciplines)
