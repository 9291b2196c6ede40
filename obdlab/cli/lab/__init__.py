"""The workbench: datasets, experiments, the evaluation."""

from __future__ import annotations
