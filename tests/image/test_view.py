"""Which layer holds what: against each layer's own answer, sector by sector."""

from __future__ import annotations

import subprocess
import sys

import pytest

import obdlab
from obdlab.errors import OutOfRangeError
from obdlab.frames import LabExtraError
from obdlab.image.view import Owned
from tests.layers.golden import LSMT

PATHS = [LSMT / "l1.lz4tar.lsmt", LSMT / "l2.sealed.lsmt", LSMT / "l1.plain.lsmt"]


def held(path: object) -> dict[int, bool]:
    # Sectors that one layer holds, and whether as zeros; from its own index alone.
    with obdlab.open_stack([path]) as disk:  # type: ignore[list-item]
        sectors: dict[int, bool] = {}
        for begin, length, _, zeroed, _ in disk.layers[0].index.segments().rows():
            sectors.update(dict.fromkeys(range(begin, begin + length), zeroed))
        return sectors


@pytest.mark.parametrize("count", [1, 2, 3])
def test_owners_are_the_topmost_that_hold_a_sector(count: int) -> None:
    layers = [held(path) for path in PATHS[:count]]
    with obdlab.open_stack(PATHS[:count]) as disk:
        assert len(disk) == 1 << 20
        owned = disk.owners()
        assert [part.end for part in owned[:-1]] == [part.begin for part in owned[1:]]
        assert (owned[0].begin, owned[-1].end) == (0, len(disk))
        for part in owned:
            for sector in range(part.begin // 512, part.end // 512):
                holder = next((number for number in reversed(range(count)) if sector in layers[number]), None)
                assert part.layer == holder
                assert part.zeroed == (holder is not None and layers[holder][sector])


def test_owners_of_a_part_by_bytes() -> None:
    with obdlab.open_stack(PATHS) as disk:
        all_ = disk.owners()
        begin, end = all_[3].begin + 7, all_[9].end - 1
        part = disk.owners(begin, end)
        assert part[0] == Owned(begin, all_[3].end, all_[3].layer, all_[3].zeroed)
        assert part[1:-1] == all_[4:9]
        assert part[-1] == Owned(all_[9].begin, end, all_[9].layer, all_[9].zeroed)
        assert disk.owners(5, 5) == []
        for bounds in ((-1, 5), (0, len(disk) + 1), (9, 8)):
            with pytest.raises(OutOfRangeError):
                disk.owners(*bounds)


def test_frames() -> None:
    with obdlab.open_stack(PATHS[:2]) as disk:
        frame = disk.index_frame()
        assert list(frame.columns) == ["begin", "end", "size", "layer", "name", "zeroed", "file_offset"]
        owned = [part for part in disk.owners() if part.layer is not None]
        assert list(zip(frame["begin"], frame["end"], frame["layer"], frame["zeroed"], strict=True)) == [
            (part.begin, part.end, part.layer, part.zeroed) for part in owned
        ]
        for row in frame.head(20).itertuples():
            if not row.zeroed:
                layer = disk.layers[row.layer]
                assert layer.data[row.file_offset : row.file_offset + row.size] == disk[row.begin : row.end]
                assert row.name == layer.name
        layers = disk.layer_frame()
        assert list(layers["name"]) == [str(path) for path in PATHS[:2]]
        assert layers["visible"][1] == layers["held"][1], "nothing hides the top"
        assert list(layers["visible"]) == [
            int(frame[(frame.layer == n) & ~frame.zeroed]["size"].sum()) for n in (0, 1)
        ]


def test_pandas_is_asked_for_by_name_and_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"import obdlab, sys; obdlab.open_stack([{str(PATHS[0])!r}]).owners(); print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
    monkeypatch.setitem(sys.modules, "pandas", None)
    with obdlab.open_stack(PATHS[:1]) as disk, pytest.raises(LabExtraError, match=r"pip install .*\[lab\]'"):
        disk.index_frame()
