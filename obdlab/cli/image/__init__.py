"""Commands about images: convert them, pull them lazily, look into them."""

from __future__ import annotations
