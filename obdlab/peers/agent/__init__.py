"""The agent of a host: an HTTP server that passes blocks of images on to the host's devices and to other agents."""

from __future__ import annotations
