"""turboOCI: images whose layers stay ordinary tars, with the metadata of a file system beside them."""

from __future__ import annotations
