"""Tests of the rules by which hosts pass blocks on."""

from __future__ import annotations
