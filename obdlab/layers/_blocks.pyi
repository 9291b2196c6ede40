from typing import Self

from obdlab.blob import Buffer

# For each algorithm, by its name: True if its library was found.
LIBRARIES: dict[str, bool]

# The blocks of one ZFile. Objects may be used by several threads.
class Unpacker:
    def __new__(cls, offsets: memoryview, block_size: int, size: int, algorithm: int, checked: bool) -> Self: ...
    # A range of the content, given the stored blocks that hold it; None if any is damaged.
    def read(self, stored: Buffer, offset: int, length: int) -> bytes | None: ...
