"""Options of a conversion and the end of one, without a device."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerBuilder, LayerOptions
from obdlab.system.pauses import wait_until


def test_options_that_change_no_byte_have_one_digest(tmp_path: Path) -> None:
    plain, turbo = ConvertOptions(), ConvertOptions(turbo=("ext4",))
    assert replace(plain, several_members=True).digest() == plain.digest()
    assert replace(plain, work_dir=tmp_path, database="x").digest() == plain.digest()
    different = [plain, turbo, replace(turbo, several_members=True), replace(plain, hash_trees=not plain.hash_trees)]
    different += [replace(plain, docker=True), replace(plain, referrer=True), replace(plain, flatten=1)]
    assert len({options.digest() for options in different}) == len(different)


def test_what_waits_to_be_compressed_is_left_when_a_conversion_ends(tmp_path: Path) -> None:
    compressed = []
    with LayerBuilder(tmp_path, LayerOptions(), large=False) as builder:
        waiting: list[Future[None]] = []
        begun = builder._small_compressors.submit(
            wait_until, lambda: bool(waiting) and waiting[0].cancelled(), 30.0, look_s=0.01
        )
        waiting.append(builder._small_compressors.submit(compressed.append, "a layer that nothing wants"))
    assert begun.result()
    assert waiting[0].cancelled()
    assert not compressed
