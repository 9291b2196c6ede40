"""Generated from ``protos/`` by ``make protos``. Do not edit."""

from __future__ import annotations
