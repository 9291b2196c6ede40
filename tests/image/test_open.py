"""Opening files, stacks and images: golden sums, writable uppers, and nothing left open after a failure."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

import obdlab
from obdlab.blob import WritableBlob
from obdlab.errors import FormatError, ObdlabError, SourceError
from obdlab.formats.tar import wrap_header, wrap_tail
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.open import ImageOpenError, open_image, open_stack, open_zfile
from obdlab.layers.append import AppendUpper
from obdlab.layers.upper import SparseUpper
from obdlab.settings.settings import Settings
from tests.layers.golden import GOLDEN, LSMT, manifest, sha256_of

ZEROS = bytes(1 << 20)
PLAIN = [LSMT / "l1.plain.lsmt", LSMT / "l2.plain.lsmt"]
STACK_SHA256 = next(entry["decoded_sha256"] for entry in manifest("lsmt")["entries"] if "stack" in entry)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_leaks() -> object:
    before = open_descriptors()
    yield
    assert open_descriptors() <= before  # threads of tests before may still close theirs


@pytest.mark.parametrize("name", ["text.lz4.4.zfile", "text.lz4.4.tar.zfile", "input.zstd.16.zfile"])
def test_open_zfile(name: str) -> None:
    entry = next(entry for entry in manifest("zfile")["entries"] if entry["file"] == name)
    with obdlab.open_zfile(str(GOLDEN / "zfile" / name)) as content:
        assert content.size == entry["decoded_size"]
        assert sha256_of(content) == entry["decoded_sha256"]


@pytest.mark.parametrize("tops", [("l2.plain.lsmt",), ("l2.lz4.lsmt",), ("l2.sealed.lsmt",)])
@pytest.mark.parametrize(
    "bottom", ["l1.plain.lsmt", "l1.lz4.lsmt", "l1.lz4tar.lsmt", "l1.zstd16.lsmt", "l1.sealed.lsmt"]
)
def test_open_stack_of_any_kinds(bottom: str, tops: tuple[str, ...]) -> None:
    with obdlab.open_stack([LSMT / bottom, *(str(LSMT / top) for top in tops)]) as stack:
        assert stack.size == 1 << 20
        assert sha256_of(stack) == STACK_SHA256


@pytest.mark.parametrize("depth", [1, 2])
def test_ext4_images_of_the_original(depth: int) -> None:
    wanted = manifest("ext4")["merged"][f"layers1-{depth}"]
    with open_stack([GOLDEN / "ext4" / f"layer{number + 1}.obd" for number in range(depth)]) as stack:
        assert stack.size == wanted["vsize"]
        assert sha256_of(stack) == wanted["raw_sha256"]


@pytest.mark.parametrize("content", [b"", b"x", bytes(511), bytes(100_000), b"\x1f\x8b" + bytes(5000)])
def test_files_that_are_neither(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layer"
    path.write_bytes(content)
    for opener in (open_zfile, lambda path: open_stack([PLAIN[0], path])):
        with pytest.raises(FormatError, match=f"^{path}: "):
            opener(path)


@pytest.mark.parametrize("name", ["l1.plain.lsmt", "l1.lz4.lsmt", "l1.lz4tar.lsmt", "l1.sealed.lsmt"])
def test_files_cut_short(tmp_path: Path, name: str) -> None:
    data = (LSMT / name).read_bytes()
    path = tmp_path / "layer"
    for length in (*range(0, 5000, 97), *range(5000, len(data) - 1536, 9973), len(data) - 1536):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match=f"^{path}: "):
            open_stack([PLAIN[0], path])


def test_missing_files() -> None:
    with pytest.raises(SourceError, match="/nowhere: cannot open"):
        open_stack([PLAIN[0], "/nowhere"])
    with pytest.raises(SourceError, match="/nowhere: cannot open"):
        open_zfile("/nowhere")


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="sequence of paths"):
        open_stack(str(PLAIN[0]))
    with pytest.raises(ObdlabError, match="0 layers"):
        open_stack([])
    with pytest.raises(ObdlabError, match="256 layers"):
        open_stack([PLAIN[0]] * 256)


def test_as_many_layers_as_there_may_be() -> None:
    with open_stack([PLAIN[0], *[LSMT / "c1.empty.lsmt"] * 253, PLAIN[1]]) as stack:
        assert sha256_of(stack) == STACK_SHA256


def lowers_of(*paths: Path) -> tuple[LowerConfig, ...]:
    return tuple(LowerConfig(file=str(path)) for path in paths)


def test_image_of_local_files(settings: Settings, tmp_path: Path) -> None:
    result = tmp_path / "result"
    result.write_text("what was there before, and longer than success")
    with open_image(ImageConfig(lowers=lowers_of(*PLAIN), result_file=str(result)), settings) as image:
        assert not isinstance(image, WritableBlob)
        assert sha256_of(image) == STACK_SHA256
    assert result.read_text() == "success"
    assert not settings.cache_dir.exists(), "a local image needs no cache"


@pytest.mark.parametrize("name", ["overlaybd.commit", ".commit", "overlaybd.sealed"])
def test_layer_in_a_directory(settings: Settings, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(PLAIN[1])
    lowers = (LowerConfig(file=str(PLAIN[0])), LowerConfig(file="/nowhere", dir=str(tmp_path)))
    with open_image(ImageConfig(lowers=lowers), settings) as image:
        assert sha256_of(image) == STACK_SHA256


def test_the_first_candidate_counts(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / ".commit").write_bytes(b"rubbish")
    (tmp_path / "overlaybd.sealed").symlink_to(PLAIN[1])
    lowers = (LowerConfig(file=str(PLAIN[0])), LowerConfig(dir=str(tmp_path)))
    with pytest.raises(ImageOpenError, match=r"lower 1 of 2 .*/\.commit"):
        open_image(ImageConfig(lowers=lowers), settings)
    (tmp_path / "overlaybd.commit").symlink_to(PLAIN[1])
    with open_image(ImageConfig(lowers=lowers), settings) as image:
        assert sha256_of(image) == STACK_SHA256


def test_an_acceleration_layer_is_left_out(settings: Settings) -> None:
    lowers = (*lowers_of(*PLAIN), LowerConfig(dir="/nowhere", digest="sha256:" + "0" * 64, size=1))
    with open_image(ImageConfig(lowers=lowers, acceleration_layer=True), settings) as image:
        assert sha256_of(image) == STACK_SHA256


def upper_config(path: Path, virtual_size: int) -> UpperConfig:
    SparseUpper.create(path, virtual_size).close()
    return UpperConfig(index=str(path) + ".index", data=str(path))


def test_writable_image(settings: Settings, tmp_path: Path) -> None:
    config = ImageConfig(lowers=lowers_of(*PLAIN), upper=upper_config(tmp_path / "data", 0))
    with open_stack(PLAIN) as stack:
        before = bytearray(stack.read_at(0, stack.size))
    with open_image(config, settings) as image:
        assert isinstance(image, WritableBlob)
        assert image.read_at(0, image.size) == before
        image.write_at(5 * 4096, b"new" * 4096)
        image.flush()
    before[5 * 4096 : 8 * 4096] = b"new" * 4096
    with open_image(config, settings) as image:
        assert image.read_at(0, image.size) == before


def test_writable_image_in_append_mode(settings: Settings, tmp_path: Path) -> None:
    data, index = tmp_path / "data", tmp_path / "index"
    AppendUpper.create(data, index, 0).close()
    config = ImageConfig(lowers=lowers_of(*PLAIN), upper=UpperConfig(index=str(index), data=str(data)))
    with open_image(config, settings) as image:
        before = bytearray(image.read_at(0, image.size))
        image.write_at(5000, b"new" * 4096)
        image.discard(65536, 8192)
        image.flush()
        with pytest.raises(ObdlabError, match="in use by another opener"):
            open_image(config, settings)
    before[5000 : 5000 + 12288] = b"new" * 4096
    before[65536 : 65536 + 8192] = bytes(8192)
    with open_image(config, settings) as image:
        assert image.read_at(0, image.size) == before


def test_upper_alone(settings: Settings, tmp_path: Path) -> None:
    config = ImageConfig(upper=upper_config(tmp_path / "data", 1 << 20))
    with open_image(config, settings) as image:
        assert image.read_at(0, image.size) == ZEROS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ImageConfig(), "neither lowers nor an upper"),
        (
            ImageConfig(lowers=(*lowers_of(*PLAIN), LowerConfig(dir="/nowhere"))),
            "lower 2 of 3 (/nowhere): no layer there",
        ),
        (ImageConfig(lowers=lowers_of(PLAIN[0], Path("/nowhere"))), "lower 1 of 2 (/nowhere): no layer there"),
        (ImageConfig(lowers=lowers_of(PLAIN[0], LSMT / "l1.data")), "lower 1 of 2 (" + str(LSMT / "l1.data")),
        (ImageConfig(lowers=lowers_of(PLAIN[0]), upper=UpperConfig("/i", "/nowhere")), "/nowhere"),
        (
            ImageConfig(lowers=(LowerConfig(file=str(PLAIN[0]), target_file="/x"),)),
            "/x: cannot open",
        ),
        (ImageConfig(lowers=lowers_of(*[PLAIN[0]] * 256)), "got 256, wanted at most 255"),
        (ImageConfig(lowers=(LowerConfig(digest="sha256:" + "0" * 64, size=1),)), "blob URL"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_failures_tell_which_and_why(settings: Settings, tmp_path: Path, config: ImageConfig, message: str) -> None:
    result = tmp_path / "result"
    config = ImageConfig(
        lowers=config.lowers, upper=config.upper, repo_blob_url=config.repo_blob_url, result_file=str(result)
    )
    with pytest.raises(ObdlabError) as caught:
        open_image(config, settings)
    assert message in str(caught.value)
    assert result.read_text() == f"failed:{caught.value}"


def test_a_result_file_that_cannot_be_written_stops_nothing(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    config = ImageConfig(lowers=lowers_of(PLAIN[0]), result_file="/nowhere/result")
    with open_image(config, settings):
        pass
    assert "/nowhere/result: cannot write" in caplog.text


def test_wrapped_layer_with_a_plain_header(tmp_path: Path) -> None:
    # As base layers are uploaded: the header of a tar, no pax.
    import tarfile

    content = PLAIN[0].read_bytes()
    info = tarfile.TarInfo("overlaybd.commit")
    info.size = len(content)
    path = tmp_path / "base"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(content))
    path.write_bytes(out.getvalue())
    with open_stack([path]) as stack, open_stack([PLAIN[0]]) as plain:
        assert stack.read_at(0, stack.size) == plain.read_at(0, plain.size)


def test_zeros_after_the_tar_do_no_harm(tmp_path: Path) -> None:
    # Converters inside containerd end the archive twice.
    content = PLAIN[0].read_bytes()
    path = tmp_path / "layer"
    path.write_bytes(wrap_header(len(content)) + content + wrap_tail(len(content)) + bytes(1024))
    with open_stack([path]) as stack:
        assert (
            hashlib.sha256(stack.read_at(0, stack.size)).hexdigest()
            == manifest("lsmt")["entries"][1]["decoded_sha256"]
        )


@settings_of_hypothesis(max_examples=300, deadline=None)
@given(flips=st.lists(st.integers(0, 8 * 214_528 - 1), min_size=1, max_size=3))
def test_flipped_bits_under_checksums_never_give_wrong_bytes(
    tmp_path_factory: pytest.TempPathFactory, flips: list[int]
) -> None:
    data = bytearray((LSMT / "l1.lz4tar.lsmt").read_bytes())
    for bit in flips:
        data[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(data)
    try:
        with open_stack([path, PLAIN[1]]) as stack:
            assert sha256_of(stack) == STACK_SHA256
    except FormatError as error:
        assert str(error).startswith(f"{path}: ")
