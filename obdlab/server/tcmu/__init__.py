"""The TCMU daemon and its devices' servers."""

from __future__ import annotations
