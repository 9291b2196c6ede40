"""A picture of a disk that shows the layer of every part. Needs the ``lab`` extra (matplotlib)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from obdlab.image.view import Disk, Owned

_COLUMNS = 128
_MOST_ROWS = 96
_NOTHING = "#eeeeee"
_ZEROED = "#bdbdbd"
# A colour for each layer; with more layers the colours repeat.
_COLOURS = (
    "#3b6e8f",
    "#e0a458",
    "#7a9e7e",
    "#b5566b",
    "#8c7aa9",
    "#5fb0b7",
    "#c98f5f",
    "#6b7a3a",
    "#d98cb3",
    "#444b6e",
)


def block_map(disk: Disk, begin: int = 0, end: int | None = None) -> Figure:
    """Draw the bytes ``[begin, end)`` of a disk, by default up to the last byte that a layer holds.

    Left: the disk in rows from top to bottom. A cell has the colour of the layer with the most data in it, however
    little that is, so that small pieces can be seen. Right: the bytes that each layer holds, and how many of them no
    layer above hides. Raises OutOfRangeError as :meth:`Disk.owners` does.
    """
    end = _last_held(disk) if end is None else end
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.8), width_ratios=[2.1, 1], layout="constrained", squeeze=True)
    _map(axes[0], disk, disk.owners(begin, end), begin, end)
    _bars(axes[1], disk)
    plt.close(figure)  # otherwise a notebook shows it a second time at the end of the cell
    return figure


#: Most bytes read for a checksum: a converted image is a disk of 64 GiB, nearly all of it zeros.
MOST_CHECKED = 256 << 20
_PIECE = 1 << 20


def checksum(disk: Disk) -> str:
    """Return a sentence with the SHA-256 of the layers' data in the order of the disk, up to MOST_CHECKED bytes.

    Zeros and holes are left out, so that a disk of any size is read in bounded time and memory. Raises the errors of
    :meth:`Disk.read_at`.
    """
    whole, read = hashlib.sha256(), 0
    for owned in disk.owners():
        if owned.layer is None or owned.zeroed:
            continue
        for begin in range(owned.begin, owned.end, _PIECE):
            piece = disk.read_at(begin, min(_PIECE, owned.end - begin, MOST_CHECKED - read))
            whole.update(piece)
            read += len(piece)
            if read >= MOST_CHECKED:
                return f"sha256 of the first {read:,} bytes that layers hold: {whole.hexdigest()}"
    return f"sha256 of all {read:,} bytes that layers hold: {whole.hexdigest()}"


def _last_held(disk: Disk) -> int:
    held = [owned.end for owned in disk.owners() if owned.layer is not None]
    return held[-1] if held else disk.size


def _map(axes: Axes, disk: Disk, owned: list[Owned], begin: int, end: int) -> None:
    cell = max(512, 1 << max(0, (max(1, end - begin) - 1) // (_COLUMNS * _MOST_ROWS)).bit_length())
    count = max(1, -(-(end - begin) // cell))
    rows = -(-count // _COLUMNS)
    owner = _cell_owners(owned, begin + np.arange(count + 1) * cell, len(disk.layers))
    grid = np.full(rows * _COLUMNS, np.nan)
    grid[:count] = owner
    colours = [_NOTHING, _ZEROED, *(_colour(number) for number in range(len(disk.layers)))]
    axes.imshow(
        grid.reshape(rows, _COLUMNS),
        cmap=ListedColormap(colours),
        norm=BoundaryNorm(np.arange(len(colours) + 1) - 0.5, len(colours)),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_title(f"bytes {begin:,} to {end:,} of {disk.size:,}; a cell is {_size(cell)}", loc="left", fontsize=10.5)
    ticks = np.unique(np.linspace(0, rows - 1, min(rows, 6)).astype(int))
    axes.set_yticks(ticks, [_size(begin + int(tick) * _COLUMNS * cell) for tick in ticks], fontsize=8.5)
    axes.set_xticks([])
    axes.set_ylabel("offset of the row", fontsize=9)
    axes.spines[:].set_visible(False)
    used = set(owner.tolist())
    labels = [(_NOTHING, "held by no layer"), (_ZEROED, "held as zeros")]
    patches = [Patch(color=colour, label=label) for number, (colour, label) in enumerate(labels) if number in used]
    if patches:
        axes.legend(handles=patches, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 0), ncols=2)


def _cell_owners(owned: list[Owned], edges: NDArray[np.int64], layers: int) -> NDArray[np.int64]:
    # The value of a cell is 0 for nothing, 1 for zeros, else 2 + the number of the layer with the most bytes in it.
    shares = np.zeros((layers + 2, len(edges) - 1))
    for kind in range(1, layers + 2):
        own = [part for part in owned if part.layer is not None and (1 if part.zeroed else part.layer + 2) == kind]
        if own:
            points = np.array([(part.begin, part.end) for part in own]).ravel()
            sizes = np.repeat(np.cumsum([part.end - part.begin for part in own]), 2)
            before = sizes - np.array([[part.end - part.begin, 0] for part in own]).ravel()
            shares[kind] = np.diff(np.interp(edges, points, before))
    # Data goes before zeros, zeros before nothing.
    data = shares[2:]
    owner = np.where(shares[1] > 0, 1, 0)
    return np.where(data.max(axis=0) > 0, data.argmax(axis=0) + 2, owner)


def _bars(axes: Axes, disk: Disk) -> None:
    frame = disk.layer_frame()
    at = np.arange(len(frame))
    colours = [_colour(number) for number in range(len(frame))]
    axes.barh(at, frame["held"], 0.62, color=colours, alpha=0.3)
    axes.barh(at, frame["visible"], 0.62, color=colours)
    longest = max(1, int(frame["held"].max()))
    for number, row in enumerate(frame.itertuples()):
        text = f"{_size(int(row.visible))} of {_size(int(row.held))} seen"  # type: ignore[arg-type]
        axes.text(0, number + 0.42, f"{number}: {Path(str(row.name)).name}, {text}", fontsize=8.5, va="center")
    axes.set_title("layers, the top above: held, and seen (solid)", loc="left", fontsize=10.5)
    axes.set_xlim(0, longest * 1.08)
    axes.set_ylim(-0.6, len(frame) - 0.3)
    axes.set_yticks([])
    step = 1 << max(9, (longest // 3).bit_length() - 1)
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(lambda value, _: _size(int(value)))
    axes.tick_params(axis="x", labelsize=8.5)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _colour(layer: int) -> str:
    return _COLOURS[layer % len(_COLOURS)]


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"
