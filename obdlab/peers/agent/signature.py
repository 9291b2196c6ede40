"""Requests between agents that share a key: each is signed, for one receiver and one minute."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from obdlab.formats.decimal import decimal
from obdlab.peers.agent.asked import HOPS_HEADER
from obdlab.registry.p2p import TREE_HEADER

if TYPE_CHECKING:
    from collections.abc import Mapping

#: ``<seconds since 1970>:<HMAC-SHA-256, hexadecimal>``.
SIGNATURE_HEADER = "X-Obdlab-Signature"
#: Longest difference between the clocks of two agents, with the time that a request takes.
VALID_S = 60
#: Least bytes of a key.
LEAST_KEY = 16

_SIGNED = ("Range", HOPS_HEADER, TREE_HEADER)


def sign(key: bytes, receiver: str, target: str, headers: Mapping[str, str], now: float) -> str:
    """Return the signature of a request to the agent ``receiver``."""
    return f"{int(now)}:{_mac(key, int(now), receiver, target, headers)}"


def is_signed(key: bytes, receiver: str, target: str, headers: Mapping[str, str], now: float) -> bool:
    """Return True if the request was signed with the key, for this receiver, in the last minute."""
    text, _, given = headers.get(SIGNATURE_HEADER, "").partition(":")
    seconds = decimal(text)
    if not key or seconds is None or abs(seconds - now) > VALID_S:
        return False
    wanted = _mac(key, seconds, receiver, target, headers)
    return hmac.compare_digest(given.encode("latin-1", "replace"), wanted.encode())


def _mac(key: bytes, seconds: int, receiver: str, target: str, headers: Mapping[str, str]) -> str:
    lines = ["obdlab peer 1", str(seconds), receiver, target, *(headers.get(name) or "" for name in _SIGNED)]
    return hmac.new(key, "\n".join(lines).encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
