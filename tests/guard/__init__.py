"""What keeps a run of the tests whole: a hang is named and passed over, and nothing outlives the run (plugin.py)."""

from __future__ import annotations
