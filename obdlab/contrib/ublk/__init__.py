"""Block devices through the kernel's ublk driver (Linux 6.4): requests over io_uring, data by read and write."""

from __future__ import annotations
