"""Fills transfers: from the agents that the topology names, one after the other, and at last from the registry."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from obdlab.call import Call
from obdlab.errors import CorruptBlobError
from obdlab.formats.hashtree import UNIT
from obdlab.peers.agent.asked import HOPS_HEADER
from obdlab.peers.agent.signature import SIGNATURE_HEADER, sign
from obdlab.peers.agent.watch import LONGEST_SILENCE_S, Attempt
from obdlab.registry.answer import from_response
from obdlab.registry.errors import RegistryError
from obdlab.registry.p2p import TREE_HEADER
from obdlab.registry.rangestream import RangeStream

if TYPE_CHECKING:
    from obdlab.cache.units import UnitCheck
    from obdlab.peers.agent.asked import Asked
    from obdlab.peers.agent.members import Member
    from obdlab.peers.agent.route import Router
    from obdlab.peers.agent.tallies import Tallies
    from obdlab.peers.agent.transfer import Transfer
    from obdlab.peers.agent.watch import Watch
    from obdlab.registry.client import RegistryClient
    from obdlab.registry.transport import Transport

logger = logging.getLogger(__name__)

# After this silence an agent is asked whether it is alive. The farther down in the tree, the longer: of all that wait
# for a stopped agent, the one right below it acts first, and those below that one go on as soon as it has bytes.
_PATIENCE_S = 0.4
_PATIENCE_PER_LEVEL_S = 0.12
_MOST_PATIENCE_S = 0.8
_STREAM_SILENCE_S = 5.0


class WrongBytesError(CorruptBlobError, code="wrong-bytes"):
    """A source's bytes do not match the image's hash tree, or the blob's digest."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A blob that is being shared.

    ``check`` checks its units. With ``whole`` its transfers are of the whole blob, which its digest checks. ``peers``
    is True if its bytes may come from other agents.
    """

    asked: Asked
    size: int
    check: UnitCheck | None
    whole: bool
    peers: bool

    @property
    def name(self) -> str:
        """The blob's name in errors and logs."""
        return f"{self.asked.repository}@{self.asked.digest}"


class Fetcher:
    """Fetches on behalf of one agent. Thread-safe.

    ``prefix`` is the first part of the paths of all agents. With a ``key`` requests to them are signed.
    """

    def __init__(
        self,
        own_id: str,
        prefix: str,
        key: bytes,
        router: Router,
        client: RegistryClient,
        transport: Transport,
        watch: Watch,
        tallies: Tallies,
        deadline_s: float,
    ) -> None:
        self._own_id, self._prefix, self._key = own_id, prefix, key
        self._router, self._client, self._transport = router, client, transport
        self._watch, self._tallies, self._deadline_s = watch, tallies, deadline_s

    def fetch(self, wanted: Wanted, transfer: Transfer, hops: tuple[str, ...]) -> None:
        """Fill the transfer, from any number of sources. Raises the registry's error, or that of the check."""
        deadline = time.monotonic() + self._deadline_s
        sink = _Sink(wanted, transfer)
        if wanted.peers:
            route = self._router.route(wanted.asked.digest, transfer.begin)
            patience_s = min(_PATIENCE_S + _PATIENCE_PER_LEVEL_S * route.depth, _MOST_PATIENCE_S)
            for member in route.members:
                if member.id in hops:
                    continue
                self._from_peer(wanted, sink, member, patience_s, hops)
                if sink.complete:
                    return
                patience_s = _PATIENCE_S
        self._from_registry(wanted, sink, deadline)

    def _from_peer(
        self, wanted: Wanted, sink: _Sink, member: Member, patience_s: float, hops: tuple[str, ...]
    ) -> None:
        # Returns in any case; the sink shows how far it came.
        asked, doing = wanted.asked, f"asking agent {member.id}"
        target = f"/{self._prefix}/{asked.url}"
        begin, length = sink.position, sink.end - sink.position
        headers = {
            "Range": f"bytes={begin}-{begin + length - 1}",
            HOPS_HEADER: ",".join((*hops, self._own_id)),
        }
        if asked.tree is not None:
            headers[TREE_HEADER] = str(asked.tree)
        if self._key:
            headers[SIGNATURE_HEADER] = sign(self._key, member.id, target, headers, time.time())
        with Attempt(self._watch, member, asked.digest, begin, patience_s) as attempt:
            terms = partial(self._terms, attempt)
            try:
                answer = self._transport.send(
                    "GET", f"http://{member.address}{target}", headers, doing=doing, call=terms()
                )
                if answer.status != 206:
                    raise from_response(answer, doing)
                with RangeStream(answer, name=wanted.name, offset=begin, length=length, size=wanted.size) as stream:
                    while stream.position < stream.end:
                        piece = stream.read(min(UNIT, stream.end - stream.position), terms())
                        attempt.offset = stream.position
                        attempt.progress(len(piece))
                        self._tallies.add("received_bytes", len(piece), "peer")
                        sink.add(piece)
                        attempt.progress(0)  # the check may have waited for the hash tree
                self._router.worked(member.id)
                return
            except WrongBytesError as error:
                self._tallies.add("verification_failures")
                self._router.ban(member.id, asked.digest)
                logger.warning("agent %s (%s): dropped for this blob: %s", member.id, member.address, error)
            except RegistryError as error:
                self._note(member, attempt, error)
        sink.drop_unchecked()
        self._tallies.add("failovers")

    def _terms(self, attempt: Attempt) -> Call:
        return Call(time.monotonic() + LONGEST_SILENCE_S, cancellation=attempt.cancellation)

    def _note(self, member: Member, attempt: Attempt, error: RegistryError) -> None:
        # An answer, of any status, shows that the agent is well: it declines, or its own sources fail.
        if error.status is not None:
            logger.info("%s", error)
            return
        silent = attempt.why == "silent" or (error.timed_out and not attempt.why)
        if self._router.silent(member.id) if silent else self._router.failed(member.id):
            why = attempt.why or error
            logger.warning("agent %s (%s): not asked for a while: %s", member.id, member.address, why)

    def _from_registry(self, wanted: Wanted, sink: _Sink, deadline: float) -> None:
        asked = wanted.asked
        try:
            self._stream(wanted, sink, deadline)
            return
        except WrongBytesError as error:
            self._tallies.add("verification_failures")
            logger.warning("registry: %s", error)
            self._client.distrust(asked.repository, asked.digest)
        except RegistryError as error:
            if not error.temporary:
                raise
            logger.info("%s", error)
        sink.drop_unchecked()
        length = sink.end - sink.position
        data = self._client.read_range(
            asked.repository, asked.digest, sink.position, length, Call(deadline), size=wanted.size
        )
        self._tallies.add("received_bytes", len(data), "origin")
        sink.add(data)

    def _stream(self, wanted: Wanted, sink: _Sink, deadline: float) -> None:
        asked, begin = wanted.asked, sink.position
        first = Call(min(deadline, time.monotonic() + _STREAM_SILENCE_S))
        with self._client.open_range(
            asked.repository, asked.digest, begin, sink.end - begin, first, size=wanted.size
        ) as stream:
            while stream.position < stream.end:
                terms = Call(min(deadline, time.monotonic() + _STREAM_SILENCE_S))
                piece = stream.read(min(UNIT, stream.end - stream.position), terms)
                self._tallies.add("received_bytes", len(piece), "origin")
                sink.add(piece)


class _Sink:
    # Checks what comes, and adds it to the transfer: nothing gets into that unchecked.
    def __init__(self, wanted: Wanted, transfer: Transfer) -> None:
        self._wanted, self._transfer = wanted, transfer
        self._pending = bytearray()

    @property
    def position(self) -> int:
        """Offset of the next byte that is needed."""
        return self._transfer.good + len(self._pending)

    @property
    def end(self) -> int:
        return self._transfer.end

    @property
    def complete(self) -> bool:
        return self._transfer.good == self._transfer.end

    def drop_unchecked(self) -> None:
        """Forget what a source sent that failed before it could be checked."""
        self._pending.clear()

    def add(self, data: bytes) -> None:
        """Take the next bytes. Raises WrongBytesError; the bytes before the wrong unit are kept."""
        transfer, wanted = self._transfer, self._wanted
        self._pending += data
        at_end = self.position == transfer.end
        if wanted.whole:
            if at_end:
                self._check_whole()
                self._pass_on(len(self._pending))
            return
        ready = len(self._pending)
        if wanted.check is not None:
            unit = wanted.check.unit
            ready = ready if at_end else ready - ready % unit
            if ready:
                wrong = wanted.check.first_wrong(transfer.good, memoryview(bytes(self._pending[:ready])))
                if wrong is not None:
                    self._pass_on(wrong - transfer.good)
                    self._pending.clear()
                    raise WrongBytesError("bytes do not match the hash tree", blob=wanted.name, offset=wrong)
        self._pass_on(ready)

    def _check_whole(self) -> None:
        got = f"sha256:{hashlib.sha256(self._pending).hexdigest()}"
        if got != self._wanted.asked.digest:
            self._pending.clear()
            raise WrongBytesError("wrong content", blob=self._wanted.name, got=got)

    def _pass_on(self, length: int) -> None:
        if length:
            self._transfer.add(bytes(self._pending[:length]))
            del self._pending[:length]
