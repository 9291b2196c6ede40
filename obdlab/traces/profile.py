"""A profile of starts: which files other images' starts read, and which parts of them, as data.

It keeps the examples themselves, not a model of them: of each file that any start read, the examples that have it
and those that read it. :meth:`Profile.choose` judges the files of a new image by the examples that started what it
starts.
Paths are compared with their numbers replaced by "#", so that versions do not matter.

A profile is zstd over JSON, and may come from a stranger: sizes, numbers and positions are bounded before use.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated

import msgspec
import zstandard

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from obdlab.traces.imagefiles import ImageFiles

PAGE = 4096
#: Of a profile as a file, and unpacked.
MAX_SIZE = 16 << 20
_MAX_UNPACKED = 32 << 20
_MAX_EXAMPLES = 256
_MAX_PATHS = 1 << 16
# Pages of the largest file: 1 TiB.
_MAX_PAGE = 1 << 28
_LEVEL = 19
_DIGITS = re.compile(r"\d+")
# Files of a new image that one path of a profile may stand for.
_MAX_ALIKE = 4

# A file counts as read if this share of the examples that have it read it; half an example that does not is added.
_LEAST = 0.55
_DOUBT = 0.5
# A file that rules lead to is left out if fewer of the examples in which they do read it, one more added.
_LEAST_FOLLOWED = 0.45
# A page counts as read if this share of the examples that read the file read it.
_LEAST_PAGES = 0.5

_Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX_PAGE)]
_Example = Annotated[int, msgspec.Meta(ge=0, lt=_MAX_EXAMPLES)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class Read(msgspec.Struct, array_like=True, frozen=True):
    """One example's reads of a file of ``size`` bytes, in pages.

    ``runs`` are a gap, a length, a gap and so on. ``order`` is the position in the start, of 1000.
    """

    example: _Example
    size: Annotated[int, msgspec.Meta(ge=0, le=_MAX_PAGE * PAGE)]
    order: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    runs: Annotated[list[_Count], msgspec.Meta(max_length=1 << 16)]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the pages ``[begin, end)``."""
        at = 0
        for gap, length in zip(self.runs[::2], self.runs[1::2], strict=False):
            yield at + gap, at + gap + length
            at += gap + length


class File(msgspec.Struct, array_like=True, frozen=True):
    """A file, by one path that it has: the examples that have it, those that follow rules to it, and the reads."""

    path: _Text
    contained: Annotated[list[_Example], msgspec.Meta(max_length=_MAX_EXAMPLES)]
    followed: Annotated[list[_Example], msgspec.Meta(max_length=_MAX_EXAMPLES)]
    reads: Annotated[list[Read], msgspec.Meta(max_length=_MAX_EXAMPLES)]


class _Document(msgspec.Struct, frozen=True):
    format: str
    made: Annotated[str, msgspec.Meta(max_length=4096)]
    examples: Annotated[list[_Text], msgspec.Meta(max_length=_MAX_EXAMPLES)]
    files: Annotated[list[File], msgspec.Meta(max_length=_MAX_PATHS)]


_FORMAT = "obdlab start profile 1"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Ranges ``[begin, end)`` in bytes of a file that is likely read; none if not. ``order`` as in a profile."""

    ranges: tuple[tuple[int, int], ...]
    order: float


def key_of(path: str) -> str:
    """Return a path with its numbers replaced, by which files of different versions are compared."""
    return _DIGITS.sub("#", path)


class Profile:
    """Examples by name, and files. ``made`` says how it was made."""

    def __init__(self, examples: Sequence[str], files: Iterable[File], *, made: str = "") -> None:
        self.examples = tuple(examples)
        self.files = tuple(files)
        self.made = made

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "profile") -> Profile:
        """Read a profile. Raises FormatError for one that is malformed or too large."""
        if len(data) > MAX_SIZE:
            raise FormatError("profile is too large", blob=name, got=len(data), wanted=f"at most {MAX_SIZE} bytes")
        try:
            reader = zstandard.ZstdDecompressor(max_window_size=_MAX_UNPACKED).stream_reader(data)
            text = reader.read(_MAX_UNPACKED + 1)
        except zstandard.ZstdError as error:
            raise FormatError("profile is not in zstd", blob=name) from error
        if len(text) > _MAX_UNPACKED:
            raise FormatError("profile is too large", blob=name, wanted=f"at most {_MAX_UNPACKED} bytes unpacked")
        try:
            document = msgspec.json.decode(text, type=_Document)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"malformed profile: {error}", blob=name) from error
        if document.format != _FORMAT:
            raise FormatError("unknown profile", blob=name, got=document.format[:80], wanted=_FORMAT)
        most = len(document.examples)
        for file in document.files:
            numbers = (*file.contained, *file.followed, *(each.example for each in file.reads))
            if any(number >= most for number in numbers):
                raise FormatError("profile names an example that it lacks", blob=name, wanted=f"below {most}")
        return cls(document.examples, document.files, made=document.made)

    def to_bytes(self) -> bytes:
        """Return the file."""
        document = _Document(_FORMAT, self.made, list(self.examples), list(self.files))
        return zstandard.ZstdCompressor(level=_LEVEL).compress(msgspec.json.encode(document))

    def without(self, name: str) -> Profile:
        """Return the profile without the examples of that name."""
        gone = {number for number, each in enumerate(self.examples) if each == name}
        kept = (
            File(
                file.path,
                [number for number in file.contained if number not in gone],
                [number for number in file.followed if number not in gone],
                [each for each in file.reads if each.example not in gone],
            )
            for file in self.files
        )
        return Profile(self.examples, (file for file in kept if file.reads or file.followed), made=self.made)

    def choose(
        self, followed: Iterable[bytes], image: ImageFiles, started: Iterable[bytes] | None = None
    ) -> dict[bytes, Chosen]:
        """Return what is likely read of an image whose rules lead to the files ``followed``, by real path.

        Images are alike by the programs and sources among ``started`` (default: ``followed``). Files that are neither
        followed nor in the profile are missing.
        """
        own = {_text(path): path for path in followed}
        keys = {key_of(text) for text in own}
        first = keys if started is None else {key_of(_text(path)) for path in started}
        masks = (_mask(file.followed) for file in self.files if key_of(file.path) in first and is_started(file.path))
        alike = set(masks) - {0}
        chosen: dict[bytes, Chosen] = {}
        for file, path in self._present(image):
            known = key_of(_text(path)) in keys and _text(path) in own
            size = file.reads[0].size if file.reads and image.is_directory(path) else 0
            found = _judge(file, alike, followed=known, size=size or image.size(path))
            if found is not None:
                chosen[path] = found
        return chosen

    # Yields the files of the image that have a path of the profile, or one that differs by numbers.
    def _present(self, image: ImageFiles) -> Iterator[tuple[File, bytes]]:
        root = _Node()
        for file in self.files:
            node = root
            for part in key_of(file.path).strip("/").split("/"):
                node = node.below[part]
            node.files.append(file)
        pending: list[tuple[_Node, bytes]] = [(root, b"")]
        while pending:
            node, directory = pending.pop()
            by_key: dict[str, list[bytes]] = defaultdict(list)
            for name in image.names(directory or b"/"):
                key = key_of(_text(name))
                if key in node.below:
                    by_key[key].append(directory + b"/" + name)
            for key, paths in by_key.items():
                child = node.below[key]
                if child.below:
                    pending += [(child, path) for path in paths[:_MAX_ALIKE]]
                if child.files:
                    yield from _matched(
                        child.files, [path for path in paths if image.real(path) == path or image.is_directory(path)]
                    )


class _Node:
    __slots__ = ("below", "files")

    def __init__(self) -> None:
        self.below: defaultdict[str, _Node] = defaultdict(_Node)
        self.files: list[File] = []


# A file of another version stands for an unseen one only if the image lacks all files that the profile has seen.
def _matched(files: Sequence[File], paths: Sequence[bytes]) -> Iterator[tuple[File, bytes]]:
    exact = [(file, path) for path in paths for file in files if file.path == _text(path)]
    yield from exact or [(files[0], path) for path in paths[:_MAX_ALIKE]]


def is_started(path: str) -> bool:
    """Return True if a file among those that rules lead to is a program or a source, not a library or a text."""
    return "/bin/" in path or "/sbin/" in path or path.endswith((".py", ".rb", ".pm", ".pl", ".js", ".php"))


def _judge(file: File, alike: Iterable[int], *, followed: bool, size: int) -> Chosen | None:
    contained, read = _mask(file.contained), _mask(each.example for each in file.reads)
    own = _mask(file.followed) & contained
    if followed:
        # What rules lead to is read, unless other starts show that it is not. Its parts are those that were read.
        seen = (own & read).bit_count()
        if own and (seen + 1) / (own.bit_count() + 1) < _LEAST_FOLLOWED:
            return Chosen((), 0)
        best = own if seen else read
    else:
        # Starts that rules follow to the file say nothing about a start of which they do not.
        contained, read = contained & ~own, read & ~own
        scores = ((_share(read & mask, contained & mask), (read & mask).bit_count(), mask) for mask in alike)
        share, _, best = max(scores, default=(0.0, 0, 0))
        best &= ~own
        if share < _LEAST:
            return None
    reads = [each for each in file.reads if best >> each.example & 1]
    if not reads:
        return None
    order = sum(each.order for each in reads) / len(reads)
    return Chosen(tuple(_parts(reads, size)), order)


def _share(read: int, contained: int) -> float:
    return read.bit_count() / (contained.bit_count() + _DOUBT)


# Of files of the same size pages are counted; of other ones, positions are taken in proportion.
def _parts(reads: Sequence[Read], size: int) -> Iterator[tuple[int, int]]:
    same = [each for each in reads if each.size == size]
    edges: dict[int, int] = defaultdict(int)
    for each in same or reads:
        pages, other = -(-size // PAGE), max(1, -(-each.size // PAGE))
        for begin, end in each.ranges():
            if not same:
                begin, end = begin * pages // other, -(-end * pages // other)
            edges[begin] += 1
            edges[end] -= 1
    least = max(1.0, _LEAST_PAGES * len(same or reads))
    depth, since = 0, -1
    for at in sorted(edges):
        depth += edges[at]
        if depth >= least and since < 0:
            since = at
        elif depth < least and since >= 0:
            if since * PAGE < size:
                yield since * PAGE, min(size, at * PAGE)
            since = -1


def _mask(numbers: Iterable[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def _text(path: bytes) -> str:
    return path.decode(errors="replace")


@cache
def own_profile() -> Profile:
    """Return the profile in this package. How it was made: ``data/README.md`` beside it."""
    return Profile.from_bytes(
        (files("obdlab.traces") / "data" / "starts.profile").read_bytes(), name="starts.profile"
    )
