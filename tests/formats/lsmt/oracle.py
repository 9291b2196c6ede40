"""Slow and plain twins of what the package does in numpy, written from the format's description alone."""

from __future__ import annotations

Row = tuple[int, int, int, bool, int]  # offset, length, moffset, zeroed, tag; sectors


def merge_rows(layers: list[list[Row]]) -> list[Row]:
    """Merge ``[bottom, ..., top]``: walk the top layer, filling its gaps from the layers below. Tag 0 = top."""
    result: list[Row] = []
    for depth, rows in enumerate(layers):
        result = _put_over(result, [(*row[:4], len(layers) - 1 - depth) for row in rows])
    return result


def _put_over(lower: list[Row], upper: list[Row]) -> list[Row]:
    out: list[Row] = []
    at = 0  # where the gap before the next upper segment begins
    i = 0
    for segment in [*upper, None]:
        gap_end = segment[0] if segment else 1 << 62
        while i < len(lower) and lower[i][0] < gap_end:
            offset, length, moffset, zeroed, tag = lower[i]
            begin, end = max(offset, at), min(offset + length, gap_end)
            if begin < end:
                out.append((begin, end - begin, moffset if zeroed else moffset + begin - offset, zeroed, tag))
            if offset + length > gap_end:
                break  # the rest of it may show up after this upper segment
            i += 1
        if segment:
            out.append(segment)
            at = segment[0] + segment[1]
    return out


def coalesce_rows(rows: list[Row]) -> list[Row]:
    """Join neighbours greedily, one by one; the joined length stays below 16383."""
    out: list[Row] = []
    for row in rows:
        if out:
            offset, length, moffset, zeroed, tag = out[-1]
            mapped_end = moffset if zeroed else moffset + length
            if (
                offset + length == row[0]
                and mapped_end == row[2]
                and (zeroed, tag) == row[3:]
                and length + row[1] < 16383
            ):
                out[-1] = (offset, length + row[1], moffset, zeroed, tag)
                continue
        out.append(row)
    return out
