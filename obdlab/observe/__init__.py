"""A process's own records: counters, audit log, structured logs."""

from __future__ import annotations
