"""The long tests in pieces that fit into a run of CI: table.py says which test is where, page.py which comes next."""

from __future__ import annotations
