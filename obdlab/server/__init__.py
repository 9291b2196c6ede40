"""Device servers as processes of their own: host, keepers, servers, clients."""

from __future__ import annotations
