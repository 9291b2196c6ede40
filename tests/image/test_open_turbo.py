"""turboOCI layers: the original's files opened as images, local and from a registry, and all that is refused."""

from __future__ import annotations

import gc
import io
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import obdlab
from obdlab.blob import Blob, Joint, Wrapper, find
from obdlab.cache.admin import blobs_of, check_blob, entries
from obdlab.cache.eviction import EvictingSpace
from obdlab.errors import CorruptBlobError, FormatError, ObdlabError, SourceError
from obdlab.formats.oci import digest_of
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.identity import expected_name
from obdlab.image.open import Image, ImageOpenError, WritableImage, open_image, open_warp
from obdlab.layerfiles.flatten import flat_name
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.gzipwriter import write_gzip_index
from obdlab.layers.upper import SparseUpper
from obdlab.layers.warp import WarpFile
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from tests.layers.golden import TURBO, sha256_of, target_tar, turbo_stack
from tests.registry.server import RegistryServer

CHAIN = ["l1", "l2", "l3"]
STEP = 4 << 20


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", read_deadline_s=20, request_timeout_s=10)


@pytest.fixture(autouse=True)
def nothing_leaks() -> object:
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()  # an error's traceback keeps a file that could not be opened to its end
    assert len(os.listdir("/proc/self/fd")) <= before


def meta(name: str) -> str:
    return str(TURBO / f"{name}.ext4.fs.meta")


def tar_file(directory: Path, name: str) -> str:
    path = directory / f"{name}.tar"
    path.write_bytes(target_tar(name)[:])
    return str(path)


def packed(name: str) -> LowerConfig:
    return LowerConfig(
        file=meta(name), target_file=str(TURBO / f"{name}.tar.gz"), gzip_index=str(TURBO / f"{name}.gzip.meta")
    )


def plain(directory: Path, name: str) -> LowerConfig:
    return LowerConfig(file=meta(name), target_file=tar_file(directory, name))


def test_open_warp() -> None:
    with obdlab.open_warp(meta("plain.tar"), TURBO / "plain.tar") as disk:
        wanted = turbo_stack("plain.tar")
        assert disk.size == wanted["vsize"]
        assert sha256_of(disk, STEP) == wanted["decoded_sha256"]
        assert sum(owned.layer == 0 for owned in disk.owners()) == len(disk.index)


def test_a_chain(tmp_path: Path, settings: Settings) -> None:
    config = ImageConfig(lowers=tuple(plain(tmp_path, name) for name in CHAIN))
    with open_image(config, settings) as image:
        assert sha256_of(image, STEP) == turbo_stack(*CHAIN)["decoded_sha256"]
        assert isinstance(image, Image)
        assert len(set(image.identity)) == 3
        assert flat_name(image) == expected_name(config)
        assert all(" with target file " in one for one in image.identity)


def test_the_identity_is_also_that_of_the_target(tmp_path: Path, settings: Settings) -> None:
    lower = plain(tmp_path, "plain.tar")
    shutil.copyfile(lower.target_file, tmp_path / "other.tar")

    def identity(lower: LowerConfig) -> tuple[str, ...]:
        with open_image(ImageConfig(lowers=(lower,)), settings) as image:
            assert isinstance(image, Image)
            return image.identity

    assert identity(lower) == identity(lower)
    assert identity(lower) != identity(replace(lower, target_file=str(tmp_path / "other.tar")))


def test_one_meta_twice_in_an_image(tmp_path: Path, settings: Settings) -> None:
    # With one target only the topmost shows; with two targets both are open.
    lower = plain(tmp_path, "plain.tar")
    changed = bytearray(target_tar("plain.tar")[:])
    changed[512:1024] = bytes(512)
    (tmp_path / "changed.tar").write_bytes(changed)
    other = replace(lower, target_file=str(tmp_path / "changed.tar"))
    for lowers, wanted in (((lower, other), [1, 1]), ((lower, lower), [0, 1])):
        with open_image(ImageConfig(lowers=lowers), settings) as image:
            assert isinstance(image, Image)
            assert [len(layer.index) > 0 for layer in image.layers] == wanted


def test_a_writable_layer_on_top(tmp_path: Path, settings: Settings) -> None:
    SparseUpper.create(tmp_path / "data", 0).close()
    config = ImageConfig(
        lowers=(plain(tmp_path, "plain.tar"),), upper=UpperConfig(str(tmp_path / "index"), str(tmp_path / "data"))
    )
    with open_warp(meta("plain.tar"), TURBO / "plain.tar") as bare, open_image(config, settings) as image:
        assert isinstance(image, WritableImage)
        begin = 5192 * 512
        image.write_at(begin + 100, b"mine")
        wanted = bytearray(bare.read_at(begin, 8192))
        wanted[100:104] = b"mine"
        assert image.read_at(begin, 8192) == wanted


@pytest.mark.registry
@pytest.mark.parametrize("compressed", [True, False])
def test_targets_in_a_registry(registry_server: RegistryServer, settings: Settings, compressed: bool) -> None:
    client = RegistryClient()
    repository = client.repository(Reference.parse(f"{registry_server.host}/open/turbo:latest"))

    def push(data: bytes) -> str:
        digest = digest_of(data)
        client.push_blob(repository, digest, len(data), lambda: io.BytesIO(data))
        return digest

    targets = [
        (TURBO / f"{name}.tar.gz").read_bytes() if compressed else target_tar(name)[:] for name in ("l1", "l2")
    ]
    lowers = [
        LowerConfig(file=meta("l1"), target_digest=push(targets[0])),
        LowerConfig(digest=push(Path(meta("l2")).read_bytes()), target_digest=push(targets[1])),
    ]
    if compressed:
        lowers = [replace(lower, gzip_index=packed(f"l{n}").gzip_index) for n, lower in enumerate(lowers, 1)]
    client.close()
    config = ImageConfig(repo_blob_url=repository.blobs_url, lowers=tuple(lowers))
    wanted = turbo_stack("l1", "l2")["decoded_sha256"]
    with open_image(config, settings) as image:
        assert image.statistics()["demand_bytes"] < 1 << 20
        assert sha256_of(image, STEP) == wanted
        assert image.statistics()["requests"] > 0
        assert isinstance(image, Image)
        assert f" with target {lowers[0].target_digest}" in image.identity[0]
        assert image.identity[1].startswith(f"{lowers[1].digest} with target {lowers[1].target_digest}")
        assert [", index file " in one for one in image.identity] == [compressed, compressed]
        assert flat_name(image) == expected_name(config)
    with open_image(config, settings) as image:
        assert sha256_of(image, STEP) == wanted
        assert image.statistics()["requests"] <= 2  # the sizes of the targets, which configurations lack
    missing = replace(lowers[0], target_digest="sha256:" + "ab" * 32)
    with pytest.raises(
        ImageOpenError, match=r"lower 0 of 1 .*404.* must stay in its repository: was the source deleted"
    ):
        open_image(replace(config, lowers=(missing,)), settings)
    if not compressed:
        return
    keeping = replace(settings, cache_decompressed=True)
    for decompressed in (True, False):
        with open_image(config, keeping) as image:
            assert sha256_of(image, STEP) == wanted
            assert isinstance(image, Image)
            found = [
                find(layer.data.target, GzipTarget) for layer in image.layers if isinstance(layer.data, WarpFile)
            ]
            assert [target.decoded_bytes > 0 for target in found if target] == [decompressed] * 2
    space = EvictingSpace(settings.cache_dir)
    kept = [each for each in entries(space) if each.registry.endswith("+tar")]
    assert [each.cached_bytes for each in kept] == [each.size for each in kept]
    assert {each.size for each in kept} == {len(target_tar("l1")), len(target_tar("l2"))}
    for directory in blobs_of(space):
        checked = check_blob(space, directory, repair=True)
        assert checked is not None
        assert checked.sound
    assert len([each for each in entries(space) if each.registry.endswith("+tar")]) == 2


@pytest.mark.registry
def test_content_is_shared_by_images_of_the_same_index_alone(
    registry_server: RegistryServer, settings: Settings, tmp_path: Path
) -> None:
    # An index says with which bytes decompression begins, so that one made for the purpose changes the content.
    client = RegistryClient()
    repository = client.repository(Reference.parse(f"{registry_server.host}/open/shared:latest"))
    data = (TURBO / "good.tar.gz").read_bytes()
    digest = digest_of(data)
    client.push_blob(repository, digest, len(data), lambda: io.BytesIO(data))
    client.close()
    write_gzip_index(io.BytesIO(data), other := io.BytesIO(), span=64 << 10)
    (tmp_path / "other.gzip.meta").write_bytes(other.getvalue())
    keeping = replace(settings, cache_decompressed=True)
    for index in (packed("good").gzip_index, str(tmp_path / "other.gzip.meta")):
        lower = LowerConfig(file=meta("good"), target_digest=digest, gzip_index=index)
        with open_image(ImageConfig(repo_blob_url=repository.blobs_url, lowers=(lower,)), keeping) as image:
            assert sha256_of(image, STEP) == turbo_stack("good")["decoded_sha256"]
    assert len([each for each in entries(EvictingSpace(settings.cache_dir)) if each.registry.endswith("+tar")]) == 2


def test_wrappers_see_the_target(tmp_path: Path, settings: Settings) -> None:
    put: list[tuple[Joint, str]] = []

    class Seen(Wrapper):
        pass

    def around(joint: Joint, blob: Blob) -> Blob:
        put.append((joint, Path(blob.name).name))
        return Seen(blob)

    lower = plain(tmp_path, "plain.tar")
    with open_image(ImageConfig(lowers=(lower,)), settings, around=around) as image:
        assert sha256_of(image, STEP) == turbo_stack("plain.tar")["decoded_sha256"]
    tar, file = "plain.tar.tar", "plain.tar.ext4.fs.meta"
    assert put == [
        ("origin", tar), ("target", tar), ("origin", file), ("zfile", file), ("layer", file), ("stack", file)
    ]  # fmt: skip


@pytest.mark.parametrize("failing", ["origin", "target", "zfile", "layer", "stack"])
def test_an_error_of_around_leaves_nothing_open(tmp_path: Path, settings: Settings, failing: Joint) -> None:
    def around(joint: Joint, blob: Blob) -> Blob:
        if joint == failing:
            raise RuntimeError(failing)
        return blob

    gz = LowerConfig(
        str(meta("good")), target_file=str(TURBO / "good.tar.gz"), gzip_index=str(TURBO / "good.gzip.meta")
    )
    for lower in (plain(tmp_path, "plain.tar"), gz):
        with pytest.raises(RuntimeError, match=failing):
            open_image(ImageConfig(lowers=(lower,)), settings, around=around)


# What is changed in a sound lower, and what the error says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "target-missing": ({"target_file": "/nowhere/x.tar"}, r"/nowhere/x\.tar: cannot open \(No such file"),
    "target-missing-in-spite-of-a-digest": (
        {"target_file": "/nowhere/x.tar", "target_digest": "sha256:" + "a" * 64}, r"/nowhere/x\.tar: cannot open"
    ),
    "meta-missing": ({"file": "/nowhere/ext4.fs.meta"}, r"no layer there \(/nowhere/ext4\.fs\.meta\)"),
    "index-not-named": (
        {"target_file": str(TURBO / "good.tar.gz")}, r"good\.tar\.gz: .*no index is named \(got gzip, wanted an"
    ),
    "index-without-target": (
        {"target_file": "", "gzip_index": str(TURBO / "good.gzip.meta")}, "gzip index without a target"
    ),
    "plain-short": ({}, r"short\.tar: .*needs more bytes than its target has .*got 74752 bytes .*at least 76800"),
    "target-a-directory": ({"target_file": "/"}, "is a directory"),
    "meta-not-a-layer": ({"file": str(TURBO / "plain.tar")}, "tar|ZFile"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_opening(tmp_path: Path, settings: Settings, name: str) -> None:
    lower = plain(tmp_path, "plain.tar")
    if name == "plain-short":
        (tmp_path / "short.tar").write_bytes(target_tar("plain.tar")[:74752])
        lower = replace(lower, target_file=str(tmp_path / "short.tar"))
    changes, message = REFUSED[name]
    with pytest.raises(ImageOpenError, match=message) as caught:
        open_image(ImageConfig(lowers=(replace(lower, **changes),)), settings)
    assert re.match(r"cannot open lower 0 of 1 \(", str(caught.value))


@pytest.mark.parametrize("name", ["l1", "good", "other"])
def test_open_warp_with_a_gzip_target(name: str) -> None:
    with obdlab.open_warp(meta(name), TURBO / f"{name}.tar.gz", TURBO / f"{name}.gzip.meta") as disk:
        assert sha256_of(disk, STEP) == turbo_stack(name)["decoded_sha256"]


def test_a_chain_of_gzip_targets(tmp_path: Path, settings: Settings) -> None:
    lowers = tuple(
        LowerConfig(
            str(meta(name)), target_file=str(TURBO / f"{name}.tar.gz"), gzip_index=str(TURBO / f"{name}.gzip.meta")
        )
        for name in ("l1", "l2", "l3")
    )
    with open_image(ImageConfig(lowers=lowers), settings) as image:
        assert sha256_of(image, STEP) == turbo_stack(*CHAIN)["decoded_sha256"]


def test_gzip_targets_and_indexes_that_do_not_fit(tmp_path: Path, settings: Settings) -> None:
    def opened(target: str, index: str, *, of: str = "good") -> Image | WritableImage:
        lower = LowerConfig(str(meta(of)), target_file=str(TURBO / target), gzip_index=str(TURBO / index))
        return open_image(ImageConfig(lowers=(lower,)), settings)

    for target, index, what in (
        ("good.tar.gz", "other.gzip.meta", "index of another gzip file: its first entry"),
        ("good.tar.gz", "twomember.gzip.meta", "index of another gzip file .got 487422 bytes"),
        ("twomember.tar.gz", "twomember.gzip.meta", "needs more bytes than its target has .*got 1642596 bytes"),
        ("good.tar.gz", "missing.gzip.meta", "missing.gzip.meta: cannot open"),
        ("plain.tar", "good.gzip.meta", "plain.tar: .*index of another gzip file"),
    ):
        with pytest.raises(ImageOpenError, match=what):
            opened(target, index)


def test_open_warp_refuses_what_does_not_fit(tmp_path: Path) -> None:
    for target, error in (("/nowhere", SourceError), (TURBO / "l2.tar.gz", FormatError), (meta("l1"), ObdlabError)):
        with pytest.raises(error):
            open_warp(meta("l1"), target)


def flipped(data: bytes, at: int, bits: int = 1) -> bytes:
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


# How the index of a sound layer is damaged, and what opening says.
DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "index|short|cut"),
    "cut100": (lambda index: index[:100], "index|short|cut"),
    "cut333": (lambda index: index[:333], "index"),
    "cuthalf": (lambda index: index[:6440], "index"),
    "cutlast": (lambda index: index[:-1], "index"),
    "longer": (lambda index: index + bytes(16), "index"),
    "fliphdr": (lambda index: flipped(index, 49), "index"),
    "flipmagic": (lambda index: flipped(index, 2), "index"),
    "fliptable": (lambda index: flipped(index, len(index) - 20), "index"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_index_is_refused_at_opening(tmp_path: Path, settings: Settings, name: str) -> None:
    damage, message = DAMAGED[name]
    index = tmp_path / "bad.gzip.meta"
    index.write_bytes(damage((TURBO / "good.gzip.meta").read_bytes()))
    with pytest.raises(ImageOpenError, match=rf"bad\.gzip\.meta: .*({message})"):
        open_image(ImageConfig(lowers=(replace(packed("good"), gzip_index=str(index)),)), settings)


def wrong_bytes(lower: LowerConfig, settings: Settings) -> int:
    """Read all; return how many records raise, and fail if any gives other bytes than the sound layer."""
    raised = 0
    with obdlab.open_warp(meta("good"), TURBO / "good.tar.gz", TURBO / "good.gzip.meta") as sound:
        rows = sound.index.segments().rows()
        try:
            image = open_image(ImageConfig(lowers=(lower,)), settings)
        except ImageOpenError:
            return len(rows)
        with image:
            for begin, length, *_ in rows:
                try:
                    assert image.read_at(begin * 512, length * 512) == sound.read_at(begin * 512, length * 512)
                except CorruptBlobError:
                    raised += 1
    return raised


# A changed byte of the target that still inflates, to the same length, is the business of its digest or hash tree.
@pytest.mark.parametrize("name", ["flipwindow", "foreign of the same size"])
def test_damage_that_opening_cannot_see_gives_errors_and_no_other_bytes(
    tmp_path: Path, settings: Settings, name: str
) -> None:
    lower = packed("good")
    if name == "flipwindow":
        index = (TURBO / "good.gzip.meta").read_bytes()
        (tmp_path / "index").write_bytes(flipped(index, 2000))
        lower = replace(lower, gzip_index=str(tmp_path / "index"))
    else:
        lower = replace(lower, gzip_index=str(TURBO / "other.gzip.meta"))
    assert wrong_bytes(lower, settings) > 0
