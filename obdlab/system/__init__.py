"""The kernel and POSIX: system calls, mounts, files. Nothing of images."""

from __future__ import annotations
