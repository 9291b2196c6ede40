"""ext4 in user space: reading any file system found in images, and writing those that obdlab makes.

Written from the kernel's documentation, "ext4 Data Structures and Algorithms". No mount, no privileges, and the same
bytes for the same input on every host.
"""

from __future__ import annotations
