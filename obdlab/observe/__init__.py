"""What a process counts and writes down about itself: counters, audit log, structured logs."""

from __future__ import annotations
