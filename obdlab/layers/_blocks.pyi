from typing import Self

from obdlab.blob import Buffer

# For each algorithm, by its name: True if its library was found.
LIBRARIES: dict[str, bool]
# As LZ4_versionNumber() says; 0 without the library.
LZ4_VERSION: int

# The LZ4 blocks of the data as a ZFile stores them, and the length of each; None if the library refuses a block.
def store(data: Buffer, block_size: int, checked: bool, /) -> tuple[bytes, list[int]] | None: ...

# The blocks of one ZFile. Objects may be used by several threads.
class Unpacker:
    def __new__(cls, offsets: memoryview, block_size: int, size: int, algorithm: int, checked: bool) -> Self: ...
    # A range of the content, given the stored blocks that hold it; None if any is damaged.
    def read(self, stored: Buffer, offset: int, length: int) -> bytes | None: ...
    # The same into a buffer; False if any is damaged, and the buffer may then hold anything.
    def read_into(self, stored: Buffer, offset: int, out: Buffer) -> bool: ...
    # The same from a file in which the stored bytes begin at `start`; None and False also if it cannot be read.
    def pread(self, fd: int, start: int, offset: int, length: int) -> bytes | None: ...
    def pread_into(self, fd: int, start: int, offset: int, out: Buffer) -> bool: ...
