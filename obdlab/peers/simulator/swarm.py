"""Hosts that start containers of one image together, and get its blocks from the registry or from each other.

In the words of the code: a *container* reads the steps of a workload. A block that its *host* does not hold is a
*flight*: a request goes to the host's source, waits there for its turn, and for the block if the source has it not
yet. Of a block there is one flight to a host; later readers and children wait for it. A *channel* is the connection
between a host and one of its sources: one flow, on which the blocks that are ready follow one another, so that a host
has as many flows as children and sources. With cut-through a block is passed on from its first unit on; its last byte
leaves no sooner than one unit's time after it has come in. A host that leaves ends its channels; those that waited
for it notice after a while, and ask for their blocks again, at the places that the topology gives them then.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING

from obdlab.peers.simulator.eventqueue import Events, SimulationError
from obdlab.peers.simulator.network import Network
from obdlab.peers.simulator.parts import Channel, Container, Flight, Host
from obdlab.peers.simulator.rules import ROOT, group, rule
from obdlab.peers.simulator.site import Outcome, Site

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.peers.simulator.workload import Workload

# Above every uplink's number of flows that is meant: the registry and a downward link without a bound.
_WIDE = 1e15
_NEVER = float("inf")
#: Seconds after which a host asks the topology for its parent again, which renews its place.
_RENEW_S = 20.0


def simulate(
    site: Site,
    workload: Workload,
    topology: str,
    hosts: int,
    starts_s: Sequence[float],
    *,
    seed: int,
    arity: int = 2,
    noise: float = 0.0,
    leaves: Sequence[tuple[float, int]] = (),
    until_s: float = 3600.0,
) -> Outcome:
    """Start a container at each of ``starts_s``, on the hosts in turn, and return the time that each one took.

    Args:
        site: links and times.
        workload: the reads of a container.
        topology: one of ``rules.NAMES``.
        hosts: number of hosts.
        starts_s: times of starts, in seconds from 0 on, in rising order.
        seed: of the redirects and of the noise; the same seed gives the same outcome.
        arity: most children of a host.
        noise: a container's own speed is 1 divided by the exponential of a normal deviate with this deviation.
        leaves: times at which hosts leave for good, in seconds, each with the host's number.
        until_s: simulated seconds after which a simulation that has not ended is an error.

    Raises SimulationError for invalid values.
    """
    if any(at < 0 or not 0 <= number < hosts for at, number in leaves) or len({n for _, n in leaves}) < len(leaves):
        raise SimulationError(f"leaves: wanted times from 0 s on, and each of {hosts} hosts at most once")
    if hosts < 1 or not starts_s or min(starts_s) < 0 or arity < 1 or noise < 0:
        got = f"{hosts} hosts, {len(starts_s)} starts, arity {arity}, noise {noise:g}"
        raise SimulationError(f"wanted hosts, starts from 0 s on, an arity, and noise of 0 or more (got {got})")
    with no_collection():
        return Swarm(site, workload, topology, hosts, seed, arity, noise).run(starts_s, until_s, leaves)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python from looking for cycles: a swarm's objects live long, and looking through them doubles the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Swarm:
    """The state of a simulation; :func:`simulate` has the arguments."""

    def __init__(
        self, site: Site, workload: Workload, topology: str, hosts: int, seed: int, arity: int, noise: float
    ) -> None:
        self._site, self._workload, self._noise, self._random = site, workload, noise, Random(seed)
        self._rule = rule(topology, hosts, 1 + max(workload.layers), seed, arity)
        self._groups = workload.layers if self._rule.by_layer else (0,) * len(workload.layers)
        self._events = Events()
        self._network = Network(self._events)
        self._origin = Host("origin", site.origin_up, _WIDE, site.origin_rtt_s, site.origin_service_s)
        self._origin.is_origin = True
        self._root = Host(ROOT, site.root_up or site.up, site.root_up or site.down, site.rtt_s, site.service_s)
        self._hosts = [Host(str(number), site.up, site.down, site.rtt_s, site.service_s) for number in range(hosts)]
        self._bounded = 0 < site.cache_bytes < workload.size
        blocks = dict.fromkeys(range(len(workload.sizes)))
        for host in [self._root] * site.warm_root + self._hosts * site.warm:
            host.held, host.held_bytes = dict(blocks), workload.size
        self._copies = [0] * len(workload.sizes)
        self.outcome = Outcome([])

    def run(self, starts_s: Sequence[float], until_s: float, leaves: Sequence[tuple[float, int]] = ()) -> Outcome:
        """Start a container at each time; return when all are ready whose hosts have not left."""
        for left_s, number in leaves:
            self._events.at(left_s, self._leave, self._hosts[number])
        per_host = -(-len(starts_s) // len(self._hosts))
        for start_s in starts_s:
            self._start(start_s, per_host)
        return self._finish(until_s)

    # Start the next container on the next host, which runs at most ``per_host`` of them.
    def _start(self, start_s: float, per_host: int) -> None:
        number = len(self.outcome.ready_s)
        self.outcome.ready_s.append(_NEVER)
        slow = max(1.0, per_host / self._site.cores) * self._random.lognormvariate(0.0, self._noise)
        container = Container(number, self._hosts[number % len(self._hosts)], start_s, slow)
        self._events.at(start_s + self._site.local_s * slow, self._advance, container)

    def _finish(self, until_s: float) -> Outcome:
        outcome = self.outcome
        self._events.run(self._network.settle, until_s)
        outcome.events, outcome.ended_s = self._events.count, self._events.now
        outcome.most_copies = max(self._copies)
        for host in self._hosts:
            outcome.peak_sent = max(outcome.peak_sent, *host.sent.values(), 0)
            outcome.peak_received = max(outcome.peak_received, *host.received.values(), 0)
        count = len(self._hosts)
        lost = {number for number in range(len(outcome.ready_s)) if self._hosts[number % count].gone}
        unready = [number for number, took in enumerate(outcome.ready_s) if took == _NEVER and number not in lost]
        if unready:
            raise SimulationError(f"{len(unready)} of {len(outcome.ready_s)} containers never became ready")
        outcome.ready_s = [took for took in outcome.ready_s if took < _NEVER]
        return outcome

    def _ready(self, container: Container) -> None:
        self.outcome.ready_s[container.number] = self._events.now - container.began_s
        self.outcome.last_ready_s = self._events.now

    # Containers.

    def _advance(self, container: Container) -> None:
        if container.host.gone:
            return
        steps, held = self._workload.steps, container.host.held
        think_s = 0.0
        while container.step < len(steps):
            step = steps[container.step]
            think_s += step.think_s * container.slow
            # Blocks that are held stay so, unless the cache is bounded: such steps take no event each.
            if self._bounded or not all(block in held for block in step.blocks):
                self._events.at(self._events.now + think_s, self._read, container)
                return
            container.step += 1
        self._events.at(self._events.now + think_s, self._ready, container)

    def _read(self, container: Container) -> None:
        if container.host.gone:
            return
        for block in self._workload.steps[container.step].blocks:
            flight = self._want(container.host, block)
            if flight is not None:
                flight.readers.append(container)
                container.missing += 1
        container.step += 1
        if not container.missing:
            self._advance(container)

    # Requests.

    # The block's flight to the host; None if the host holds it.
    def _want(self, host: Host, block: int) -> Flight | None:
        held = host.held
        if block in held:
            if self._bounded:
                del held[block]
                held[block] = None
            return None
        flight = host.flights.get(block)
        return self._ask(host, block) if flight is None else flight

    def _ask(self, host: Host, block: int) -> Flight:
        source, trips = self._source(host, self._groups[block])
        if self.outcome.left and self._comes_back(host, source, block):
            source = self._origin
        flight = host.flights[block] = Flight(host, source, block)
        arrived_s = self._events.now + trips * host.rtt_s + source.rtt_s / 2
        if source.is_origin:
            served_s = arrived_s + source.service_s
        else:
            served_s = source.free_at = max(arrived_s, source.free_at) + source.service_s
        self._events.at(served_s, self._serve, flight)
        return flight

    # Trees change under requests: one that would come back to its host is refused, and goes to the registry.
    def _comes_back(self, host: Host, source: Host, block: int) -> bool:
        above = source.flights.get(block)
        while above is not None and above.source is not host:
            above = above.source.flights.get(block)
        return above is not None

    # The host's parent in a tree, and the round trips that finding it takes now.
    def _source(self, host: Host, tree: int) -> tuple[Host, int]:
        if host is self._root:
            return self._origin, 0
        now = self._events.now
        place = host.places.get(tree)
        if place is not None and now < place[2] and not place[0].gone:
            return place[0], 0
        name = self._rule.topology.join(group(tree), host.name, now)
        source = self._origin if name is None else self._root if name == ROOT else self._hosts[int(name)]
        above = source.places.get(tree)
        depth = 1 if source.is_origin else 2 if source is self._root else 1 + (above[1] if above else 0)
        host.places[tree] = source, depth, now + _RENEW_S
        self.outcome.depth = max(self.outcome.depth, depth)
        return source, 0 if place is not None and place[0] is source else self._rule.join_trips(depth)

    def _serve(self, flight: Flight) -> None:
        source = flight.source
        if flight.dead:
            return
        above = None if source.is_origin else self._want(source, flight.block)
        flight.above = above
        if above is None or above.first_s <= self._events.now:
            self._send(flight)
            return
        above.followers.append(flight)
        if above.begun_s >= 0:
            self._expect(above)

    # Transfers.

    def _send(self, flight: Flight) -> None:
        host, source = flight.host, flight.source
        if flight.dead:
            return
        channel = host.channels.get(source)
        if channel is None:
            window, rtt_s = self._site.window, source.rtt_s
            limit = window / rtt_s if window and rtt_s else _NEVER
            channel = host.channels[source] = Channel(source, host, self._sent, limit)
        if channel.flight is not None:
            channel.queue.append(flight)
            return
        self._begin(channel, flight)
        self._network.start(channel, self._workload.sizes[flight.block])
        for end in (host, source):
            if not end.is_origin:
                flows = len(end.up.flows) + len(end.down.flows)
                self.outcome.most_flows = max(self.outcome.most_flows, flows)

    def _begin(self, channel: Channel, flight: Flight) -> None:
        channel.flight, flight.channel, flight.begun_s = flight, channel, self._events.now
        if flight.followers:
            self._expect(flight)
        if channel.limit < _NEVER and not channel.growing:
            channel.growing = True
            self._events.at(self._events.now + channel.rtt_s, self._grow, channel)

    # Slow start: a round trip with data doubles the window. Connections stay open, and keep theirs.
    def _grow(self, channel: Channel) -> None:
        channel.growing = False
        if channel.flight is None or channel.flight.dead:
            return
        limit = 2 * channel.limit
        if limit >= min(channel.up.capacity, channel.down.capacity):
            limit = _NEVER
        else:
            channel.growing = True
            self._events.at(self._events.now + channel.rtt_s, self._grow, channel)
        self._network.relimit(channel, limit)

    # Have the flight's first unit pass on as soon as it has come in.
    def _expect(self, flight: Flight) -> None:
        if self._site.cut_through and not flight.opening:
            flight.opening = True
            first_byte_s = flight.begun_s + flight.source.rtt_s / 2
            self._events.at(max(self._events.now, first_byte_s), self._open, flight)

    def _open(self, flight: Flight) -> None:
        channel = flight.channel
        if flight.done or flight.dead or channel is None:
            return
        # All of it may be on its way already. A crowded link may not have given the flow its share yet.
        rate = flight.rate or channel.rate or channel.up.capacity / len(channel.up.flows)
        first_s = flight.begun_s + flight.source.rtt_s / 2 + self._unit_s(flight, rate)
        self._events.at(max(self._events.now, first_s), self._pass_on, flight)

    def _unit_s(self, flight: Flight, rate: float) -> float:
        return min(self._site.unit, self._workload.sizes[flight.block]) / rate

    def _pass_on(self, flight: Flight) -> None:
        if flight.dead:
            return
        flight.first_s = self._events.now
        followers, flight.followers = flight.followers, []
        for follower in followers:
            self._send(follower)

    def _sent(self, channel: Channel) -> None:
        flight = channel.flight
        assert flight is not None
        flight.rate = channel.rate
        self._count(flight.source.sent, flight)
        if flight.above is not None and not flight.above.done:
            # Its last unit is not here yet.
            flight.above.tails.append((flight, self._unit_s(flight, channel.rate) + channel.rtt_s / 2))
        else:
            self._events.at(self._events.now + channel.rtt_s / 2, self._arrive, flight)
        if channel.queue:
            following = channel.queue.popleft()
            self._begin(channel, following)
            self._network.again(channel, self._workload.sizes[following.block])
        else:
            channel.flight = None
            self._network.stop(channel)

    def _count(self, seconds: dict[int, int], flight: Flight) -> None:
        second = int(self._events.now)
        seconds[second] = seconds.get(second, 0) + self._workload.sizes[flight.block]

    def _arrive(self, flight: Flight) -> None:
        if flight.dead:
            return
        host, block = flight.host, flight.block
        self._count(host.received, flight)
        flight.done = True
        del host.flights[block]
        self._keep(host, block)
        size = self._workload.sizes[block]
        if flight.source.is_origin:
            self.outcome.origin_bytes += size
            self._copies[block] += 1
        else:
            self.outcome.peer_bytes += size
        # Flights let go of each other: without cycles the last reference frees them.
        followers, tails, readers = flight.followers, flight.tails, flight.readers
        flight.above, flight.channel, flight.followers, flight.tails, flight.readers = None, None, [], [], []
        for follower in followers:
            self._send(follower)
        for tail, after_s in tails:
            self._events.at(self._events.now + after_s, self._arrive, tail)
        for container in readers:
            container.missing -= 1
            if not container.missing:
                self._advance(container)

    def _keep(self, host: Host, block: int) -> None:
        sizes, held = self._workload.sizes, host.held
        held[block] = None
        host.held_bytes += sizes[block]
        while self._bounded and host.held_bytes > self._site.cache_bytes and len(held) > 1:
            oldest = next(iter(held))
            del held[oldest]
            host.held_bytes -= sizes[oldest]

    # Hosts that leave.

    def _leave(self, host: Host) -> None:
        host.gone = True
        self.outcome.left += 1
        for tree in sorted(set(self._groups)):
            for name in self._rule.topology.leave(group(tree), host.name, self._events.now):
                self.outcome.moved += 1
                if name != ROOT:
                    self._hosts[int(name)].places.pop(tree, None)
        others = [other for other in (self._root, *self._hosts) if not other.gone]
        waiting = [flight for other in others for flight in other.flights.values() if flight.source is host]
        for flight in (*host.flights.values(), *waiting):
            flight.dead = True
        for channel in [*host.up.flows, *host.down.flows]:
            self._network.stop(channel)
        host.channels.clear()
        for other in others:
            other.channels.pop(host, None)
        for flight in waiting:
            self._events.at(self._events.now + self._site.patience_s, self._ask_again, flight)

    # Readers and children of a flight wait for the one that replaces it.
    def _ask_again(self, old: Flight) -> None:
        host = old.host
        if host.gone:
            return
        new = self._ask(host, old.block)
        new.readers, new.followers, new.tails = old.readers, old.followers, old.tails
        for other in (self._root, *self._hosts):
            flight = other.flights.get(old.block)
            if flight is not None and flight.above is old:
                flight.above = new
