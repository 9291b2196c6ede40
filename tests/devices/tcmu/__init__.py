"""TCMU: ring and SCSI on a simulated kernel here, real devices in the virtual machine."""

from __future__ import annotations
