"""ublk: real devices in the virtual machine."""

from __future__ import annotations
