"""Handing experiments on: bundles for readers, workflows for clusters."""

from __future__ import annotations
