"""Block devices through the kernel's TCMU (target core in user space): ring, SCSI, discovery, attaching."""

from __future__ import annotations
