"""Writing the kernel's attributes: the small files of sysfs and configfs, of which each write is an order."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write_attribute(path: Path, text: str) -> None:
    """Give the kernel an order by one write call. Raises OSError if the kernel refuses it.

    A buffered file writes once more as it is closed after a refusal: a TCMU device whose first order to be enabled
    came too early (EAGAIN) was enabled by the second one, and the caller's next try failed (EEXIST).
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
