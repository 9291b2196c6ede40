"""JSON records that processes of several versions share: a later version may have added fields."""

from __future__ import annotations

import functools
import logging
from dataclasses import fields, is_dataclass
from typing import Any

log = logging.getLogger(__name__)


def known_fields(kind: type[Any], values: object) -> dict[str, Any]:
    """Return those of a JSON object's values that are fields of a dataclass or msgspec.Struct.

    The first unknown field is logged. Raises TypeError if ``values`` is no JSON object.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__}: not a JSON object (got {type(values).__name__})")
    known = {each.name for each in fields(kind)} if is_dataclass(kind) else set(kind.__struct_fields__)
    unknown = values.keys() - known
    if unknown:
        _log_once(kind.__name__, min(unknown))
    return {name: value for name, value in values.items() if name in known}


# Records are read several times a second. The cache is bounded, because a file chooses the names.
@functools.lru_cache(maxsize=64)
def _log_once(kind: str, name: str) -> None:
    log.warning("%s: a later version wrote it; unknown fields are ignored, such as %.40r", kind, name)
