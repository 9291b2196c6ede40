"""Every fault of a registry that answers, and what a reader gets: the table that the tests run and the docs show.

``python -m tests.outage.cases`` prints the table of docs/explanation/outages.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from obdlab.errors import CorruptBlobError, ObdlabError
from obdlab.registry.errors import RegistryError
from tests.outage.proxy import redirect_to_storage, token_refused
from tests.registry import faulty
from tests.registry.faulty import Fault

#: The deadlines of readers that have to see a fault through, and of those who wait for one that lasts.
SILENCE_S = 0.5
PATIENCE_S = 30.0
IMPATIENT_SILENCE_S = 0.3
DEADLINE_S = 1.0
#: Far from a measurement: a loaded machine may be this late, a reader that hangs is later.
SLACK_S = 20.0
#: What two answers that drip may cost: two windows of the least pace, and a lot for the machine.
DRIP_S = 60.0


@dataclass(frozen=True)
class Failure:
    """An error that a reader gets. ``says`` is a part of its message; ``at_once`` if it is not tried again."""

    says: str
    at_once: bool = False
    kind: type[ObdlabError] = RegistryError

    def __str__(self) -> str:
        return f"error {'at once' if self.at_once else 'at the deadline'}: “{self.says}”"


@dataclass(frozen=True)
class Case:
    """A fault; what a reader gets while it lasts, and if it happens once (None: the data)."""

    name: str
    fault: Fault | None
    lasts: Failure | None
    once: Failure | None = None
    #: How the table goes on after "the data".
    note: str = ""
    #: How many answers in a row are spoiled "once".
    times: int = 2
    #: The deadline of who sees that through.
    patience_s: float = PATIENCE_S

    @property
    def row(self) -> str:
        data = f"the data{self.note and ', ' + self.note}"
        once, lasts = self.once or data, self.lasts or data
        return f"| {self.name} | {once} | {'the same' if lasts == once else lasts} |"


def _refusal(name: str, code: int) -> Case:
    failure = Failure(f"registry answered {code}", at_once=True)
    return Case(name, faulty.status(code), failure, failure)


def _failing(name: str, fault: Fault | None, says: str) -> Case:
    return Case(name, fault, Failure(says))


#: Faults in the answers of a registry that can be reached.
CASES = [
    Case(
        "401 in mid-stream",
        token_refused,
        Failure("registry answered 401", at_once=True),
        note="with a new token",
        times=1,  # a new token that is refused as well is an answer
    ),
    _refusal("403", 403),
    _refusal("404", 404),
    _failing("429 with Retry-After", faulty.status(429, Retry_After="1"), "registry answered 429"),
    _failing("500", faulty.status(500), "registry answered 500"),
    _failing("503", faulty.status(503), "registry answered 503"),
    Case("redirect to a URL that expires", redirect_to_storage(0.2), None, note="by a new redirect when it has"),
    Case(
        "redirect to a URL that has expired",
        redirect_to_storage(-1.0),
        Failure("registry answered 403", at_once=True),
        Failure("registry answered 403", at_once=True),
    ),
    _failing("connection reset after 1000 bytes", faulty.reset(1000), "broke off"),
    _failing("connection closed without a word", faulty.close_at_once, "closed connection"),
    _failing("an answer that is not HTTP", faulty.garbage, "BadStatusLine"),
    _failing("short body", faulty.short_body(100), "broke"),
    _failing("body longer than asked", faulty.longer_body, "wrong length"),
    _failing("body longer than asked, in chunks", faulty.chunked_longer, "longer than its range"),
    Case("200 instead of 206", faulty.whole_blob, None, note="if the range begins in the blob's first 4 MiB"),
    _failing("wrong Content-Range", faulty.other_range, "wrong range"),
    _failing("206 without Content-Range", faulty.no_content_range, "wrong range"),
    Case(
        "slow drip: a byte at a time, never silent for long",
        faulty.dripping(0.1),
        Failure("in time"),
        note="over another connection within seconds",
        patience_s=2 * DRIP_S,  # a part of it would be waited out if nobody minded the pace
    ),
    _failing("black hole: no answer at all", faulty.silence, "no answer in time"),
    Case(
        "wrong bytes: a flipped bit in every 8 KiB",
        faulty.flipped_bits(8 << 10),
        Failure("CRC of ZFile block does not match", at_once=True, kind=CorruptBlobError),
        note="the damaged blocks fetched again",
    ),
]

#: Troubles beside the answers. Most begin while an image is being read; tests/outage/situations.py makes them.
SITUATIONS = [
    Case("a token that the registry takes no longer", None, None, note="with a new token"),
    _failing("503 from the token server when a new token is needed", None, "token"),
    _failing("no answer from the token server when a new token is needed", None, "token"),
    Case("the registry is restarted", None, None, note="over new connections"),
    _failing("the registry is gone: connections refused", None, "refused"),
    _failing("the registry hangs: connections accepted, no answer", None, "no answer in time"),
    _failing("packets are dropped: no connection comes about", None, "in time"),
    Case(
        "TLS with a certificate for another name",
        None,
        Failure("certificate refused: IP address mismatch", at_once=True),
        Failure("certificate refused: IP address mismatch", at_once=True),
    ),
    Case(
        "TLS with a certificate of an unknown authority",
        None,
        Failure("certificate refused: self-signed certificate", at_once=True),
        Failure("certificate refused: self-signed certificate", at_once=True),
    ),
]


def case(name: str) -> Case:
    """Return a case by its name."""
    return next(one for one in [*CASES, *SITUATIONS] if one.name == name)


def table() -> str:
    """Return the table of docs/explanation/outages.md."""
    head = ["| fault | if it happens once, a reader gets | while it lasts, a reader gets |", "|---|---|---|"]
    return "\n".join([*head, *(one.row for one in [*CASES, *SITUATIONS])]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
