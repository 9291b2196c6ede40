"""Whole images with hash trees: registry, mirror and cache may answer anything, and no wrong byte is read."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import obdlab
from obdlab.blob import unwrapped
from obdlab.errors import CorruptBlobError, ObdlabError, SourceError
from obdlab.formats.oci import digest_of
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.open import Image, ImageOpenError
from obdlab.image.priming import prime
from obdlab.image.remote import RemoteLayers, UncheckedLayerError
from obdlab.image.target import open_target
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.layers.append import AppendUpper
from obdlab.layers.spancache import SpanCache
from obdlab.layers.upper import SparseUpper
from obdlab.observe.counters import counted
from obdlab.settings.settings import Settings, SettingsError
from obdlab.traces.hotlayer import write_hot_layer
from tests.cache.origin import wait_until
from tests.image.trees import tree_of
from tests.registry.faulty import Answer, Fault, FaultyRegistry, faulty_registry

SIZE = 12 << 20


def write(directory: Path, number: int) -> Path:
    directory.mkdir()
    values = random.Random(number)
    with AppendUpper.create(directory / "data", directory / "index", SIZE) as upper:
        for at in range(number << 20, SIZE, 2 << 20):
            upper.write_at(at, values.randbytes(1 << 20))
        write_layer(upper, directory / "layer.obd", Packing("lz4", 4096, tar=True))
    return directory / "layer.obd"


@dataclass(frozen=True)
class Place:
    """Layers, their disk's content, and the configuration of the image without its place."""

    layers: tuple[bytes, ...]
    disk: bytes
    lowers: tuple[LowerConfig, ...]
    hot: bytes
    trace: bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory = tmp_path_factory.mktemp("layers")
    paths = [write(directory / str(number), number) for number in range(2)]
    choose = random.Random(3)
    reads = [(number, choose.randrange(4096, 4 << 20, 4096), 4096) for number in (0, 1) for _ in range(30)]
    trace = Trace.from_reads(reads).to_bytes()
    with obdlab.open_stack(paths) as disk:
        content = disk.read_at(0, SIZE)
        with (directory / "hot").open("wb") as file, Packing(tar=True).around(file) as sink:
            write_hot_layer(disk, trace, sink)
    layers = tuple(path.read_bytes() for path in paths)
    return Place(layers, content, tuple(map(lower_of, layers)), (directory / "hot").read_bytes(), trace)


def lower_of(layer: bytes) -> LowerConfig:
    return LowerConfig(digest=digest_of(layer), size=len(layer), hash_tree=str(tree_of(layer).reference))


def put(registry: FaultyRegistry, *layers: bytes, trees: bool = True) -> None:
    for layer in layers:
        registry.add_blob(layer)
        if trees:
            registry.add_blob(tree_of(layer).file)


@dataclass
class Served:
    """A registry with the image, its mirror, and the settings to read through both."""

    registry: FaultyRegistry
    mirror: FaultyRegistry
    config: ImageConfig
    settings: Settings

    def open(self, directory: str = "cache", **options: object) -> Image:
        settings = replace(self.settings, cache_dir=self.settings.cache_dir / directory, **options)  # type: ignore[arg-type]
        image = obdlab.open_image(self.config, settings)
        assert isinstance(image, Image)
        return image


@contextmanager
def serving(place: Place, directory: Path, *, mirrored: bool = True, trees: bool = True) -> Iterator[Served]:
    with faulty_registry() as registry, faulty_registry() as mirror:
        put(registry, *place.layers, place.hot, trees=trees)
        put(mirror, *place.layers, place.hot)
        hosts = directory / "hosts" / f"127.0.0.1_{registry.port}_"
        if mirrored:
            hosts.mkdir(parents=True)
            (hosts / "hosts.toml").write_text(f'[host."http://{mirror.host}"]\n')
        settings = Settings(
            cache_dir=directory,
            hosts_dir=directory / "hosts",
            cache_extent_max=0,
            readahead_max=0,
            open_deadline_s=20,
            read_deadline_s=20,
        )
        yield Served(registry, mirror, ImageConfig(registry.repository().blobs_url, place.lowers), settings)


def flipping(share: float = 1.0, seed: int = 0, *, only: str = "") -> Fault:
    """Flip a random bit of each answer, or of a share of them; ``only`` of a blob."""
    choose = random.Random(seed)
    lock = threading.Lock()

    def fault(answer: Answer) -> None:
        with lock:
            chosen, bit = choose.random() < share, choose.randrange(8 * len(answer.body) or 1)
        if chosen and answer.status in (200, 206) and only in answer.handler.path:
            wrong = bytearray(answer.body)
            wrong[bit // 8] ^= 1 << bit % 8
            answer.body = bytes(wrong)
        answer.send()

    return fault


def missing(*digests: str) -> Fault:
    def fault(answer: Answer) -> None:
        if any(digest in answer.handler.path for digest in digests):
            answer.status, answer.body = 404, b"{}"
            answer.headers = {}
        answer.send()

    return fault


def ranges(registry: FaultyRegistry, place: Place) -> set[str]:
    """Return the requests for layers, without those for trees. A lagging one is sent twice, and counts once."""
    layers = [digest_of(layer) for layer in place.layers]
    return {
        f"{request.path.rpartition('/')[2][7:13]} {request.range}"
        for request in registry.blob_requests()
        if any(digest in request.path for digest in layers)
    }


def some_reads(image: Image, place: Place, seed: int = 5, count: int = 60) -> None:
    choose = random.Random(seed)
    for _ in range(count):
        offset, length = choose.randrange(SIZE - 50_000), choose.randrange(1, 50_000)
        assert image.read_at(offset, length) == place.disk[offset : offset + length]


def test_the_requests_for_layers_are_those_without_trees(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path, mirrored=False) as served:
        before = counted().get("lazy_layers", {})
        with served.open("off", verify="off") as image:
            some_reads(image, place)
            requests = image.statistics()["requests"]
        unchecked = ranges(served.registry, place)
        served.registry.requests.clear()
        with served.open("checked") as image:
            some_reads(image, place)
            assert image.statistics()["wrong_units"] == 0
            # One or two for the tree of each layer of 6 MB.
            assert 2 <= image.statistics()["requests"] - requests <= 4
        assert ranges(served.registry, place) == unchecked
        after = counted()["lazy_layers"]
        assert {label: after[label] - before.get(label, 0) for label in after} == {"checked": 2, "unchecked": 2}
        # All is in the cache now, the trees too.
        served.registry.requests.clear()
        with served.open("checked") as image:
            some_reads(image, place)
        assert not served.registry.blob_requests()


def test_a_forging_mirror_costs_requests_and_no_wrong_byte(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(place, tmp_path) as served:
        served.mirror.always(flipping())
        with served.open() as image:
            assert image.read_at(0, SIZE) == place.disk
            assert image.statistics()["wrong_units"] > 0
        assert served.registry.blob_requests()
        assert f"mirror http://{served.mirror.host}" in caplog.text
        assert "do not match the hash tree of the manifest at offset" in caplog.text


@pytest.mark.parametrize("seed", range(4))
def test_a_forging_registry_leads_to_errors_or_right_bytes(place: Place, tmp_path: Path, seed: int) -> None:
    with serving(place, tmp_path, mirrored=False) as served:
        served.registry.always(flipping(0.3, seed))
        right = 0
        for _ in range(30):
            try:
                with served.open() as image:
                    choose = random.Random(seed)
                    for _ in range(20):
                        offset, length = choose.randrange(SIZE - 50_000), choose.randrange(1, 50_000)
                        assert image.read_at(offset, length) == place.disk[offset : offset + length]
                        right += 1
            except CorruptBlobError:
                pass
            except ImageOpenError as error:
                assert "hash tree" in str(error)
        assert right


def test_without_checking_a_forged_answer_is_not_found(place: Place, tmp_path: Path) -> None:
    """The reason for hash trees: bits of stored blocks whose own sums nothing checks."""
    with serving(place, tmp_path, mirrored=False) as served:
        # The checksums of these layers' blocks are part of what is forged: serve another layer under the digest.
        forged = write(tmp_path / "forged", 1).read_bytes()
        served.registry.blobs[digest_of(place.layers[0])] = forged + bytes(len(place.layers[0]) - len(forged))
        with served.open("off", verify="off") as image:
            assert image.read_at(0, SIZE) != place.disk
        with pytest.raises(ImageOpenError, match="do not match the hash tree of the manifest at offset 0"):
            served.open("checked")


def test_a_tree_that_a_mirror_withholds_comes_from_the_registry(place: Place, tmp_path: Path) -> None:
    files = [digest_of(tree_of(layer).file) for layer in place.layers]
    with serving(place, tmp_path) as served:
        served.mirror.always(missing(*files))
        with served.open() as image:
            some_reads(image, place)
        assert {request.path.rpartition("/")[2] for request in served.registry.blob_requests()} == set(files)


def test_a_tree_that_is_nowhere_is_an_error_in_every_mode_but_off(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path, mirrored=False, trees=False) as served:
        for mode in ("available", "require"):
            with pytest.raises(ImageOpenError, match=r"cannot be checked without their hash tree: .*404"):
                served.open(verify=mode)
        with served.open(verify="off") as image:
            some_reads(image, place)


def test_require_refuses_layers_without_a_tree(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path, mirrored=False) as served:
        lowers = (place.lowers[0], replace(place.lowers[1], hash_tree=""))
        served.config = replace(served.config, lowers=lowers)
        with served.open() as image:  # as available
            some_reads(image, place)
        with pytest.raises(ImageOpenError, match=r"no hash tree in the image's manifest.*verify: require"):
            served.open(verify="require")
        with pytest.raises(UncheckedLayerError):
            prime(served.config, replace(served.settings, verify="require"))
        # A layer on this machine was checked when it came here.
        local = tmp_path / "layer"
        local.write_bytes(place.layers[1])
        served.config = replace(served.config, lowers=(place.lowers[0], LowerConfig(file=str(local))))
        with served.open(verify="require") as image:
            some_reads(image, place)


def test_require_refuses_targets_of_turboOCI_layers(place: Place, tmp_path: Path) -> None:  # noqa: N802 - its name
    with serving(place, tmp_path, mirrored=False) as served:
        lower = LowerConfig(dir=str(tmp_path), target_digest=place.lowers[0].digest)
        settings = replace(served.settings, cache_dir=tmp_path / "cache", verify="require")
        with (
            closing(RemoteLayers(served.config.repo_blob_url, settings)) as remote,
            pytest.raises(UncheckedLayerError),
        ):
            open_target(lower, remote, unwrapped, SpanCache())


def test_malformed_trees_in_a_configuration_are_refused(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path, mirrored=False) as served:
        for text in ("x", "sha256:12,sha256:34", place.lowers[0].hash_tree + "0"):
            served.config = replace(served.config, lowers=(replace(place.lowers[0], hash_tree=text),))
            with pytest.raises(ImageOpenError, match=r"hash tree of sha256:.*not a digest"):
                served.open()


def test_a_download_through_a_forging_mirror_is_whole_and_right(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path) as served:
        served.mirror.always(flipping(0.5, 2))
        now = {"download_enabled": True, "download_delay_s": 0.0, "download_delay_extra_s": 0.0}
        with served.open(**now) as image:
            wait_until(lambda: image.unverified() == 0)
            wait_until(lambda: "obdlab-download" not in [thread.name for thread in threading.enumerate()])
        served.registry.always(missing("sha256"))
        served.mirror.always(missing("sha256"))
        with served.open(verify="require") as image:  # without any source
            assert image.read_at(0, SIZE) == place.disk


def test_a_hot_layer_streams_through_a_forging_mirror(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path) as served:
        served.mirror.always(flipping(1, 3, only=digest_of(place.hot)))
        served.config = replace(served.config, lowers=(*place.lowers, replace(lower_of(place.hot), hot=True)))
        with served.open() as image:
            some_reads(image, place)
            wait_until(lambda: "obdlab-stream" not in [thread.name for thread in threading.enumerate()])
            assert image.read_at(0, SIZE) == place.disk
            assert image.statistics()["prefetch_bytes"] > 0


def test_a_replay_through_a_forging_mirror(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path) as served:
        served.registry.add_blob(place.trace)
        served.mirror.add_blob(place.trace)
        trace = LowerConfig(digest=digest_of(place.trace), size=len(place.trace))
        served.config = replace(served.config, trace=trace)
        served.mirror.always(flipping(0.5, 4))
        with served.open() as image:
            wait_until(lambda: "obdlab-prefetch" not in [thread.name for thread in threading.enumerate()])
            assert image.statistics()["prefetch_bytes"] > 0
            assert image.read_at(0, SIZE) == place.disk


def test_a_forged_trace_is_not_replayed(place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(place, tmp_path, mirrored=False) as served:
        other = Trace.from_reads([(0, 0, 4096)] * (len(place.trace) // 24 - 1)).to_bytes()
        digest = digest_of(place.trace)
        served.registry.blobs[digest] = other
        served.config = replace(served.config, trace=LowerConfig(digest=digest, size=len(other)))
        with served.open() as image:
            wait_until(lambda: "obdlab-prefetch" not in [thread.name for thread in threading.enumerate()])
            some_reads(image, place)
        assert f"wrong content (got {digest_of(other)}, wanted {digest})" in caplog.text


def test_lowers_of_a_writable_image_are_checked(place: Place, tmp_path: Path) -> None:
    SparseUpper.create(tmp_path / "data", SIZE).close()
    with serving(place, tmp_path, mirrored=False) as served:
        upper = UpperConfig(data=str(tmp_path / "data"), index=str(tmp_path / "data"))
        served.config = replace(served.config, upper=upper)
        served.registry.always(flipping())
        with pytest.raises(ImageOpenError, match="hash tree"):
            obdlab.open_image(served.config, replace(served.settings, cache_dir=tmp_path / "cache"))


def test_a_blob_too_large_for_the_cache_is_checked_as_well(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obdlab.cache.blockcache._LARGEST", 1 << 20)
    with serving(place, tmp_path, mirrored=False) as served:
        with served.open() as image:
            some_reads(image, place)
        served.registry.always(flipping(1, 5, only=digest_of(place.layers[0])))
        with pytest.raises(ImageOpenError, match="do not match the hash tree"):
            served.open()


def test_an_error_of_opening_the_tree_leaves_nothing_open(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path, mirrored=False) as served:
        remote = RemoteLayers(served.config.repo_blob_url, replace(served.settings, cache_dir=tmp_path / "cache"))
        with pytest.raises(ObdlabError):
            remote.open_layer(replace(place.lowers[0], digest="sha256:x"))
        blob = remote.open_layer(place.lowers[0])
        assert remote._users == 3  # the blob, its tree's file, and the opener
        blob.close()
        assert remote._users == 1
        remote.close()
        with pytest.raises(SourceError):
            blob.read_at(0, 1)


def test_the_setting_has_three_values() -> None:
    assert Settings().verify == "available"
    with pytest.raises(SettingsError, match=r"verify: wanted one of off, available, require \(got 'on'\)"):
        Settings(verify="on")
