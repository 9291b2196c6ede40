"""OCI image to overlaybd image."""

from __future__ import annotations
