"""The OCI distribution protocol over HTTP."""

from __future__ import annotations
