"""The picture of a disk, and the notebook that shows it."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import obdlab
from obdlab.image.view import Owned
from obdlab.lab.show.anatomy import _cell_owners, block_map, checksum
from obdlab.lab.show.report import run_notebook
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.layers.append import AppendUpper
from tests.layers.golden import GOLDEN, LSMT

NOTEBOOK = Path(__file__).parents[3] / "notebooks" / "layer_anatomy.ipynb"


def test_cells_show_the_layer_that_holds_most() -> None:
    owned = [
        Owned(0, 100, 0),
        Owned(100, 110, 1),
        Owned(110, 300, None),
        Owned(300, 350, 0, zeroed=True),
        Owned(350, 360, 1),
        Owned(360, 400, None),
        Owned(400, 490, 0, zeroed=True),
        Owned(490, 500, None),
    ]
    # Edges past the disk's end, as of a last cell that is not full.
    owners = _cell_owners(owned, np.arange(0, 700, 100), 2)
    assert owners.tolist() == [2, 3, 0, 3, 1, 0]


def test_block_map_of_sectors() -> None:
    with obdlab.open_stack([LSMT / "l1.plain.lsmt", LSMT / "l2.plain.lsmt"]) as disk:
        figure = block_map(disk, 0, len(disk))
        (image,) = figure.axes[0].images
        shown = np.asarray(image.get_array()).ravel()
        wanted = [
            0 if part.layer is None else 1 if part.zeroed else part.layer + 2
            for part in disk.owners()
            for _ in range(part.begin, part.end, 512)
        ]
        assert shown[: len(wanted)].tolist() == wanted, "a cell is a sector on so small a disk"
        assert "1,048,576" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize(
    "paths", [[GOLDEN / "ext4" / "layer1.obd", GOLDEN / "ext4" / "layer2.obd"], [LSMT / "c1.empty.lsmt"]]
)
def test_block_map_of_other_disks(paths: list[Path], tmp_path: Path) -> None:
    with obdlab.open_stack(paths) as disk:
        figure = block_map(disk)
        figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_the_checksum_of_a_large_disk_takes_no_memory(tmp_path: Path) -> None:
    # As a converted image's: 64 GiB, of which little is held.
    with closing(AppendUpper.create(tmp_path / "data", tmp_path / "index", 64 << 30)) as upper:
        upper.write_at(4096, b"first" + bytes(4091))
        upper.write_at(50 << 30, b"last" * 1024)
        write_layer(upper, tmp_path / "layer.obd", Packing("lz4", 4096, tar=True))
    with obdlab.open_stack([tmp_path / "layer.obd"]) as disk:
        whole = hashlib.sha256(b"first" + bytes(4091) + b"last" * 1024).hexdigest()
        assert checksum(disk) == f"sha256 of all 8,192 bytes that layers hold: {whole}"


# ipykernel and zmq warn about their own event loops.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_notebook_runs(tmp_path: Path) -> None:
    page = run_notebook(NOTEBOOK, {"length": 16}, tmp_path / "out.ipynb")
    text = page.read_text()
    with obdlab.open_stack([LSMT / "l1.lz4tar.lsmt", LSMT / "l2.sealed.lsmt"]) as disk:
        held = b"".join(
            disk[part.begin : part.end] for part in disk.owners() if part.layer is not None and not part.zeroed
        )
    assert f"sha256 of all {len(held):,} bytes that layers hold: {hashlib.sha256(held).hexdigest()}" in text
    assert "l1.lz4tar.lsmt" in text
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    pictures = [o for cell in cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
