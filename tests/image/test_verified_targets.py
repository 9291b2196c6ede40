"""turboOCI images with sums: mirrors, proxies, redirect targets and registries may answer anything."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import obdlab
from obdlab.blob import Blob
from obdlab.convert.compare.listing import differences, list_volume
from obdlab.convert.turbo.builder import TurboBuilder
from obdlab.errors import CorruptBlobError, ObdlabError
from obdlab.formats.oci import digest_of
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import ImageOpenError
from obdlab.observe.counters import counted
from obdlab.settings.settings import Settings
from obdlab.volumes.ext4.volume import Volume
from tests.convert.layouts import compress, member, tar_bytes
from tests.convert.turbo.test_builder import OPTIONS, add, listing_of
from tests.image.test_verified_images import flipping
from tests.registry import faulty
from tests.registry.faulty import FaultyRegistry, faulty_registry
from tests.registry.proxy import running_proxy

HOW = ("plain", "gzip", "zstd frames")
LARGE = random.Random(4).randbytes(700_000)
# Text, so that deflate has more than stored blocks.
TEXT = b"".join(b"line %d of a file\n" % number for number in range(60_000))
TARS = [
    tar_bytes([member("large", LARGE), member("text", TEXT)]),
    tar_bytes([member("text", TEXT[::-1]), member("small", b"s" * 5000)]),
]


@dataclass(frozen=True)
class Place:
    lowers: tuple[LowerConfig, ...]
    targets: tuple[bytes, ...]


@pytest.fixture(scope="module", params=HOW)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory = tmp_path_factory.mktemp("layers")
    targets = tuple(compress(tar, request.param) for tar in TARS)
    lowers = []
    with TurboBuilder(directory, OPTIONS, ("ext4",), zstd=True) as builder:
        for tar, target in zip(TARS, targets, strict=True):
            files = add(builder, directory, tar, blob=target).files
            index = next((str(path) for name, path in files.items() if name in ("gzip.meta", "zstd.meta")), "")
            (meta,) = (str(path) for name, path in files.items() if name.startswith("ext4."))
            sums = str(files["tar.sums"])
            lowers.append(
                LowerConfig(
                    file=meta,
                    gzip_index=index,
                    target_digest=digest_of(target),
                    target_size=len(target),
                    tar_sums=sums,
                )
            )
    return Place(tuple(lowers), targets)


@contextmanager
def registry_with(place: Place, directory: Path) -> Iterator[tuple[FaultyRegistry, Settings, ImageConfig]]:
    with faulty_registry() as registry:
        for target in place.targets:
            registry.add_blob(target)
        settings = Settings(
            cache_dir=directory / "cache",
            hosts_dir=directory / "hosts",
            cache_extent_max=0,
            readahead_max=0,
            open_deadline_s=20,
            read_deadline_s=20,
        )
        yield registry, settings, ImageConfig(registry.repository().blobs_url, place.lowers)


def is_right(disk: Blob) -> bool:
    return differences(list_volume(Volume(disk)), listing_of(TARS)) == []


def targets_refused() -> float:
    return counted().get("checksum_failures", {}).get("target", 0)


@pytest.mark.parametrize("source", ["mirror", "P2P proxy", "HTTP proxy"])
def test_forged_answers_on_the_way_are_read_again_past_them(place: Place, tmp_path: Path, source: str) -> None:
    with registry_with(place, tmp_path) as (registry, settings, config), ExitStack() as opened:
        if source == "mirror":
            mirror = opened.enter_context(faulty_registry())
            for target in place.targets:
                mirror.add_blob(target)
            mirror.always(flipping())
            hosts = tmp_path / "hosts" / f"127.0.0.1_{registry.port}_"
            hosts.mkdir(parents=True)
            (hosts / "hosts.toml").write_text(f'[host."http://{mirror.host}"]\n')
            asked = mirror.requests
        else:
            proxy = opened.enter_context(running_proxy())
            proxy.fails_with = "lies"
            address = proxy.address if source == "P2P proxy" else f"http-proxy://127.0.0.1:{proxy.port}"
            settings = replace(settings, p2p_address=address)
            asked = proxy.asked  # type: ignore[assignment]
        with obdlab.open_image(config, replace(settings, verify="require")) as disk:
            assert is_right(disk)
        assert asked
        # What is cached is right, too.
        registry.always(faulty.status(404))
        with obdlab.open_image(config, settings) as disk:
            assert is_right(disk)


@pytest.mark.parametrize("source", ["registry", "redirect target"])
def test_a_forging_origin_gives_errors_and_no_wrong_byte(place: Place, tmp_path: Path, source: str) -> None:
    with registry_with(place, tmp_path) as (registry, settings, config), faulty_registry() as storage:
        for target in place.targets:
            storage.add_blob(target)
        if source == "registry":
            registry.always(flipping())
        else:
            storage.always(flipping())
            registry.always(faulty.redirect(f"http://{storage.host}/storage/{{digest}}"))
        before = targets_refused()
        right = wrong = 0
        try:
            with obdlab.open_image(config, settings) as disk, obdlab.open_image(local(place, tmp_path)) as sound:
                for begin, length, *_ in sound.index.segments().rows():  # type: ignore[union-attr]
                    try:
                        data = disk.read_at(begin * 512, length * 512)
                    except CorruptBlobError:
                        wrong += 1
                    else:
                        assert data == sound.read_at(begin * 512, length * 512)
                        right += 1
            assert right
            assert wrong
        except ImageOpenError:  # a gzip header that is none
            assert place.lowers[0].gzip_index
        else:
            # A broken stream of deflate or zstd says so itself.
            assert targets_refused() > before or place.lowers[0].gzip_index


def local(place: Place, directory: Path) -> ImageConfig:
    lowers = []
    for number, (lower, target) in enumerate(zip(place.lowers, place.targets, strict=True)):
        path = directory / f"target-{number}"
        path.write_bytes(target)
        lowers.append(replace(lower, target_digest="", target_file=str(path)))
    return ImageConfig(lowers=tuple(lowers))


@pytest.mark.parametrize("how", HOW)
def test_another_file_of_the_same_form_is_refused_by_the_sums_alone(tmp_path: Path, how: str) -> None:
    """A mirror serves a whole target of its own making: it inflates, to the right length, and has right CRCs."""
    tar = tar_bytes([member("a", b"right" * 20_000)])
    forged = tar.replace(b"right", b"wrong")
    with TurboBuilder(tmp_path, OPTIONS, ("ext4",), zstd=True) as builder:
        files = add(builder, tmp_path, tar, blob=compress(tar, how)).files
    (tmp_path / "forged").mkdir()
    index = next((name for name in ("gzip.meta", "zstd.meta") if name in files), "")
    (tmp_path / "target").write_bytes(compress(forged, how))
    (meta,) = (str(path) for name, path in files.items() if name.startswith("ext4."))
    lower = LowerConfig(file=meta, target_file=str(tmp_path / "target"))
    if index:
        # The forger's index, as a target of the same spans would have: with the true one reading fails earlier.
        with TurboBuilder(tmp_path / "forged", OPTIONS, ("ext4",), zstd=True) as builder:
            other = add(builder, tmp_path / "forged", forged, blob=compress(forged, how)).files
        lower = replace(lower, gzip_index=str(other[index]))
    with obdlab.open_image(ImageConfig(lowers=(lower,)), Settings(cache_dir=tmp_path)) as disk:
        assert any(b"wrong" in disk.read_at(begin * 512, 512) for begin, *_ in disk.index.segments().rows())  # type: ignore[union-attr]
    checked = ImageConfig(lowers=(replace(lower, tar_sums=str(files["tar.sums"])),))
    with obdlab.open_image(checked, Settings(cache_dir=tmp_path)) as disk:
        target_reads = 0
        for begin, length, *_ in disk.index.segments().rows():  # type: ignore[union-attr]
            try:
                assert b"wrong" not in disk.read_at(begin * 512, length * 512)
            except CorruptBlobError as error:
                assert "does not match the turboOCI layer's sums" in str(error)
                target_reads += 1
        assert target_reads
    with obdlab.open_image(checked, Settings(cache_dir=tmp_path, verify="off")) as disk:
        assert any(b"wrong" in disk.read_at(begin * 512, 512) for begin, *_ in disk.index.segments().rows())  # type: ignore[union-attr]


def test_require_wants_sums(place: Place, tmp_path: Path) -> None:
    with registry_with(place, tmp_path) as (_, settings, config):
        bare = replace(config, lowers=(config.lowers[0], replace(config.lowers[1], tar_sums="")))
        before = dict(counted().get("lazy_layers", {}))
        with obdlab.open_image(bare, settings) as disk:
            assert is_right(disk)
        after = counted()["lazy_layers"]
        assert {label: after[label] - before.get(label, 0) for label in after} == {"checked": 1, "unchecked": 1}
        with pytest.raises(ImageOpenError, match=r"no hash tree .*verify: require.*turboOCI image again"):
            obdlab.open_image(bare, replace(settings, verify="require"))


@pytest.mark.parametrize("damage", ["missing", "short", "of another tar", "a bit"])
def test_damaged_sums_give_no_bytes(place: Place, tmp_path: Path, damage: str) -> None:
    config = local(place, tmp_path)
    sums = Path(config.lowers[0].tar_sums).read_bytes()
    path = tmp_path / "sums"
    if damage == "short":
        path.write_bytes(sums[:-1])
    elif damage == "of another tar":
        path.write_bytes(Path(config.lowers[1].tar_sums).read_bytes())
    elif damage == "a bit":
        path.write_bytes(sums[:40] + bytes([sums[40] ^ 1]) + sums[41:])
    lowers = (replace(config.lowers[0], tar_sums=str(path)), config.lowers[1])
    with (
        pytest.raises(ObdlabError, match="sums"),
        obdlab.open_image(ImageConfig(lowers=lowers), Settings(cache_dir=tmp_path)) as disk,
    ):
        list_volume(Volume(disk))
