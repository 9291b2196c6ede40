"""JSON records that processes of several versions share: a later version may have added fields."""

from __future__ import annotations

import functools
import logging
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)


def known_fields(kind: type[DataclassInstance], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the values that are fields of the dataclass. A process logs once which others a record has."""
    known = {each.name for each in fields(kind)}
    unknown = values.keys() - known
    if unknown:
        _log_once(kind.__name__, min(unknown), len(unknown))
    return {name: value for name, value in values.items() if name in known}


# Records are read several times a second. The cache is bounded, because a file chooses the names.
@functools.lru_cache(maxsize=64)
def _log_once(kind: str, name: str, count: int) -> None:
    log.warning("%s: %d fields are unknown and ignored, such as %.40r: a later version wrote it", kind, count, name)
