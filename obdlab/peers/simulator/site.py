"""Links and times of a simulation, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass, field

from obdlab.peers.simulator.eventqueue import SimulationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Links and times. Capacities are in bytes per second.

    Attributes:
        up, down: capacity of a host.
        origin_up: capacity of the registry.
        root_up: capacity of the root of trees that have one; 0: as a host's.
        rtt_s: round trip between hosts.
        origin_rtt_s: round trip to the registry.
        service_s: time that a host needs for a request; it serves one after the other.
        origin_service_s: the registry's; it serves all at once.
        unit: bytes after which a block can be passed on.
        cut_through: a block is passed on while it arrives, not after it.
        window: bytes that a new connection sends in its first round trip, doubled in each further one; 0: any number.
        cache_bytes: most bytes of blocks that a host keeps; 0: all.
        local_s: time of a start before its first read.
        cores: containers of a host that run at full speed.
        warm_root: the root holds the image from the beginning.
        warm: every host holds it.
        patience_s: time until a host that waits for one that has left asks another one.
    """

    up: float = 125e6
    down: float = 125e6
    origin_up: float = 1.25e9
    root_up: float = 0.0
    rtt_s: float = 0.0005
    origin_rtt_s: float = 0.002
    service_s: float = 0.0005
    origin_service_s: float = 0.002
    unit: int = 16384
    cut_through: bool = True
    window: int = 14600
    cache_bytes: int = 0
    local_s: float = 0.0
    cores: int = 4
    warm_root: bool = False
    warm: bool = False
    patience_s: float = 1.2

    def __post_init__(self) -> None:
        times = (self.rtt_s, self.origin_rtt_s, self.service_s, self.origin_service_s, self.local_s, self.patience_s)
        sizes = (self.window, self.cache_bytes, self.root_up)
        if min(times) < 0 or min(sizes) < 0 or self.unit < 1 or self.cores < 1:
            raise SimulationError(f"site: wanted no negative value, and a unit and cores of at least 1 (got {self})")


@dataclass(slots=True)
class Outcome:
    """The end of a simulation: times of starts by container, bytes by source, and its own cost."""

    #: Those of hosts that left before are not in it.
    ready_s: list[float]
    origin_bytes: int = 0
    peer_bytes: int = 0
    #: Most flows of a host at one time, and most copies of one block from the registry.
    most_flows: int = 0
    most_copies: int = 0
    #: Hosts between the registry and a host, at most; 1 is a host that reads from the registry.
    depth: int = 0
    #: Hosts that left, and how often one of the others got another parent for that, in all trees.
    left: int = 0
    moved: int = 0
    #: Most bytes that one host sent, and that one received, in a second (by the end of each block).
    peak_sent: int = 0
    peak_received: int = 0
    events: int = 0
    #: When the last container was ready, and when nothing was left to do, in seconds of simulated time.
    last_ready_s: float = 0.0
    ended_s: float = field(default=0.0)
