"""turboOCI layers in the core: unpacked by the client, and part of a device once committed. No devices."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.formats import oci
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.snapshotter import turbo
from obdlab.snapshotter.core import Snapshotter
from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from obdlab.snapshotter.overlaybd import LABEL_IMAGE_REF
from tests.snapshotter.test_core import CHAIN, DIGESTS, open_snapshotter, pull, pull_labels, root

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGETS = ["sha256:" + digit * 64 for digit in "abc"]
BOTH = ("ext4.fs.meta", "erofs.fs.meta")


@pytest.fixture
def snapshotter(tmp_path: Path) -> Iterator[Snapshotter]:
    snapshotter = open_snapshotter(tmp_path)
    yield snapshotter
    snapshotter.close()


@pytest.fixture(params=[True, False], ids=["kernel with erofs", "without"])
def erofs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[bool]:
    known = tmp_path / "filesystems"
    known.write_text("nodev\tsysfs\n\text4\n" + ("\terofs\n" if request.param else ""))
    monkeypatch.setattr(turbo, "_FILE_SYSTEMS", known)
    monkeypatch.setenv("PATH", str(tmp_path))  # no modprobe
    turbo._has_erofs.cache_clear()
    yield request.param
    turbo._has_erofs.cache_clear()


def turbo_labels(number: int = 0, media_type: str = oci.OCI_LAYER_GZIP, **more: str) -> dict[str, str]:
    labels = pull_labels(number, **more)
    return labels | {oci.TURBO_TARGET_DIGEST: TARGETS[number], oci.TURBO_TARGET_MEDIA_TYPE: media_type}


def unpacked(
    snapshotter: Snapshotter,
    labels: dict[str, str],
    number: int = 0,
    parent: str = "",
    files: tuple[str, ...] = ("ext4.fs.meta", "gzip.meta"),
    named: str | None = "",
) -> Path:
    """Do as a client does: prepare, unpack the blob, commit. ``named`` names another target in the blob, or none."""
    key = f"extract-{number}"
    (mount,) = snapshotter.prepare(key, parent, labels)
    assert (mount.type, mount.options) == ("bind", ("rw", "rbind"))
    assert snapshotter.mounts(key) == [mount]
    fs = Path(mount.source)
    for name in (*files, ".turbo.ociv1"):
        (fs / name).touch()
    if named is not None:
        (fs / ".turbo.target").write_text(named or f"{TARGETS[number]},1000\n")
    snapshotter.commit(CHAIN[number], key, labels)
    return fs


def config_of(fs: Path) -> ImageConfig:
    return ImageConfig.load(fs.parent / "block" / "config.v1.json")


def test_the_configuration_is_the_originals(snapshotter: Snapshotter, tmp_path: Path) -> None:
    first = unpacked(snapshotter, turbo_labels())
    plain = turbo_labels(1, oci.DOCKER_LAYER)
    second = unpacked(snapshotter, plain, 1, CHAIN[0], ("ext4.fs.meta",))
    assert config_of(second).to_json() == {
        "repoBlobUrl": "https://registry.test/v2/a/b/blobs",
        "lowers": [
            {
                "gzipIndex": f"{first}/gzip.meta",
                "file": f"{first}/ext4.fs.meta",
                "targetDigest": TARGETS[0],
                "targetSize": 1000,
                "dir": str(first),
            },
            {
                "file": f"{second}/ext4.fs.meta",
                "targetDigest": TARGETS[1],
                "targetSize": 1000,
                "dir": str(second),
            },
        ],
        "upper": {},
        "resultFile": f"{root(tmp_path)}/2/block/init-debug.log",
    }
    assert snapshotter.stat(CHAIN[1]).labels == plain


def test_labels_of_the_name_before(snapshotter: Snapshotter) -> None:
    labels = pull_labels() | {
        oci.FASTOCI_TARGET_DIGEST: TARGETS[0],
        oci.FASTOCI_TARGET_MEDIA_TYPE: oci.DOCKER_LAYER_GZIP,
    }
    (lower,) = config_of(unpacked(snapshotter, labels)).lowers
    assert lower.target_digest == TARGETS[0]
    assert lower.gzip_index


def test_the_bottom_layer_chooses_the_file_system(snapshotter: Snapshotter, erofs: bool) -> None:
    first = unpacked(snapshotter, turbo_labels(), files=(*BOTH, "gzip.meta"))
    second = unpacked(snapshotter, turbo_labels(1), 1, CHAIN[0], (*BOTH, "gzip.meta"))
    wanted = "erofs.fs.meta" if erofs else "ext4.fs.meta"
    assert [Path(lower.file).name for lower in config_of(second).lowers] == [wanted, wanted]
    assert [lower.dir for lower in config_of(second).lowers] == [str(first), str(second)]


@pytest.mark.parametrize(("fs_type", "wanted"), [("erofs", "erofs.fs.meta"), ("ext4", "ext4.fs.meta"), ("", "ext4")])
def test_over_ordinary_overlaybd_layers_their_label_chooses(
    snapshotter: Snapshotter, fs_type: str, wanted: str
) -> None:
    pull(snapshotter, 0, **({oci.BLOB_FS_TYPE: fs_type} if fs_type else {}))
    fs = unpacked(snapshotter, turbo_labels(1), 1, CHAIN[0], (*BOTH, "gzip.meta"))
    native, layer = config_of(fs).lowers
    assert native.digest == DIGESTS[0]
    assert Path(layer.file).name.startswith(wanted)


def test_an_ordinary_overlaybd_layer_lies_on_it(snapshotter: Snapshotter, tmp_path: Path) -> None:
    unpacked(snapshotter, turbo_labels())
    pull(snapshotter, 1, CHAIN[0])
    unpacked(snapshotter, turbo_labels(2), 2, CHAIN[1])
    lowers = ImageConfig.load(root(tmp_path) / "3" / "block" / "config.v1.json").lowers
    assert [lower.is_turbo for lower in lowers] == [True, False, True]


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        ({oci.TURBO_TARGET_MEDIA_TYPE: f"{oci.OCI_LAYER}+xz"}, FailedPreconditionError, r"media type .*\+xz"),
        ({oci.TURBO_TARGET_MEDIA_TYPE: ""}, FailedPreconditionError, "media type"),
        ({oci.TURBO_TARGET_DIGEST: "sha256:../../etc"}, InvalidArgumentError, "target-digest"),
        ({oci.BLOB_DIGEST: ""}, InvalidArgumentError, "blob-digest"),
        ({"containerd.io/snapshot/image-ref": ""}, FailedPreconditionError, "does not say which image.*rpull"),
        ({"containerd.io/snapshot/image-ref": "NOT a ref"}, InvalidArgumentError, "image-ref"),
    ],
)
def test_refused_at_prepare(
    snapshotter: Snapshotter, tmp_path: Path, labels: dict[str, str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        snapshotter.prepare("key", "", turbo_labels() | labels)
    assert snapshotter.walk() == []
    assert list(root(tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (("gzip.meta",), "no metadata that can be mounted here .*erofs.fs.meta or ext4.fs.meta"),
        (("ext4.fs.meta",), "has no gzip.meta"),
    ],
)
def test_refused_at_commit(snapshotter: Snapshotter, files: tuple[str, ...], text: str) -> None:
    with pytest.raises(FailedPreconditionError, match=text):
        unpacked(snapshotter, turbo_labels(), files=files)
    assert [snapshot.key for snapshot in snapshotter.walk()] == ["extract-0"]


@pytest.mark.parametrize("number", [0, 1], ids=["bottom", "above"])
def test_the_blob_names_the_target_and_no_label_does(snapshotter: Snapshotter, number: int) -> None:
    if number:
        unpacked(snapshotter, turbo_labels())
    hostile = turbo_labels(number) | {oci.TURBO_TARGET_DIGEST: TARGETS[2]}
    parent = CHAIN[0] if number else ""
    with pytest.raises(FailedPreconditionError, match=f"got {TARGETS[2]}, wanted {TARGETS[number]}"):
        unpacked(snapshotter, hostile, number, parent)
    with pytest.raises(NotFoundError):
        snapshotter.stat(CHAIN[number])
    snapshotter.remove(f"extract-{number}")
    (*_, lower) = config_of(unpacked(snapshotter, turbo_labels(number), number, parent)).lowers
    assert lower.target_digest == TARGETS[number]


def test_a_label_does_not_hide_the_index(snapshotter: Snapshotter) -> None:
    with pytest.raises(FailedPreconditionError, match=r"target-media-type contradicts .*gzip\.meta"):
        unpacked(snapshotter, turbo_labels(media_type=oci.OCI_LAYER))
    assert [snapshot.key for snapshot in snapshotter.walk()] == ["extract-0"]


def test_a_blob_that_names_no_target_needs_a_setting(tmp_path: Path) -> None:
    with closing(open_snapshotter(tmp_path / "default")) as snapshotter:
        with pytest.raises(FailedPreconditionError, match=r"image convert --as turbo-oci or .*turboTargetsByLabel"):
            unpacked(snapshotter, turbo_labels(), named=None)
        assert [snapshot.key for snapshot in snapshotter.walk()] == ["extract-0"]
    with closing(open_snapshotter(tmp_path / "set", turbo_targets_by_label=True)) as snapshotter:
        (lower,) = config_of(unpacked(snapshotter, turbo_labels(), named=None)).lowers
        assert lower.target_digest == TARGETS[0]
        with pytest.raises(FailedPreconditionError, match="names another layer than the blob"):
            unpacked(snapshotter, turbo_labels(1), 1, CHAIN[0], named=f"{TARGETS[0]},1\n")


@pytest.mark.parametrize(
    "text",
    [f"{TARGETS[0]}\n", f"{TARGETS[0]},1", f"{TARGETS[0]},01\n", f"{TARGETS[0]},1\n" + "\n" * 40, "a,1\n", "\xff"],
)
def test_a_target_that_is_none(tmp_path: Path, text: str) -> None:
    with (
        closing(open_snapshotter(tmp_path, turbo_targets_by_label=True)) as snapshotter,
        pytest.raises(FailedPreconditionError, match=r"turboOCI layer sha256:.*(not a target|not a digest)"),
    ):
        unpacked(snapshotter, turbo_labels(), named=text)


def test_zstd_targets_have_metadata_by_other_names(snapshotter: Snapshotter) -> None:
    zstd = turbo_labels(media_type=oci.OCI_LAYER_ZSTD)
    with pytest.raises(FailedPreconditionError, match=r"no metadata that can be mounted here .*ext4\.zstd\.meta"):
        unpacked(snapshotter, zstd, files=("ext4.fs.meta", "zstd.meta"))
    snapshotter.remove("extract-0")
    with pytest.raises(FailedPreconditionError, match=r"contradicts the blob .*'zstd', but the blob has gzip\.meta"):
        unpacked(snapshotter, zstd, files=("ext4.zstd.meta", "zstd.meta", "gzip.meta"))
    snapshotter.remove("extract-0")
    first = unpacked(snapshotter, zstd, files=("ext4.zstd.meta", "zstd.meta"))
    second = unpacked(snapshotter, turbo_labels(1), 1, CHAIN[0], ("ext4.fs.meta", "gzip.meta"))
    assert [(lower.file, lower.gzip_index) for lower in config_of(second).lowers] == [
        (f"{first}/ext4.zstd.meta", f"{first}/zstd.meta"),
        (f"{second}/ext4.fs.meta", f"{second}/gzip.meta"),
    ]


def test_a_trace_of_the_image_is_replayed(snapshotter: Snapshotter) -> None:
    fs = unpacked(snapshotter, turbo_labels() | {oci.TRACE_LABEL: f"{TARGETS[2]},512"})
    assert config_of(fs).trace == LowerConfig(digest=TARGETS[2], size=512)
    above = unpacked(snapshotter, turbo_labels(1), 1, CHAIN[0])
    assert config_of(above).trace == LowerConfig()  # it is of the image below


STORED = {oci.TURBO_TARGET_PLACE: oci.IN_CONTENT_STORE}


def test_a_target_in_the_content_store(tmp_path: Path) -> None:
    place = tmp_path / "store" / "blobs" / TARGETS[0].replace(":", "/")
    with closing(open_snapshotter(tmp_path / "root", content_store=tmp_path / "store")) as snapshotter:
        labels = turbo_labels() | STORED
        del labels[LABEL_IMAGE_REF]  # an image of no registry
        with pytest.raises(FailedPreconditionError, match=r"not in containerd's content store .*contentStore"):
            unpacked(snapshotter, labels)
        snapshotter.remove("extract-0")
        place.parent.mkdir(parents=True)
        place.write_bytes(bytes(999))
        with pytest.raises(FailedPreconditionError, match=r"another size .*got 999 bytes at .*, wanted 1000"):
            unpacked(snapshotter, labels)
        snapshotter.remove("extract-0")
        place.write_bytes(bytes(1000))
        config = config_of(unpacked(snapshotter, labels))
        (lower,) = config.lowers
        assert (lower.target_file, lower.target_digest, lower.target_size) == (str(place), "", 1000)
        assert config.repo_blob_url == ""
        (*_, above) = config_of(unpacked(snapshotter, turbo_labels(1), 1, CHAIN[0])).lowers
        assert (above.target_file, above.target_digest) == ("", TARGETS[1])


def test_an_annotation_does_not_open_the_content_store(tmp_path: Path) -> None:
    """containerd passes it as a label: without the host's setting the image is read from its own registry."""
    place = tmp_path / "store" / "blobs" / TARGETS[0].replace(":", "/")
    place.parent.mkdir(parents=True)
    place.write_bytes(bytes(1000))
    with closing(open_snapshotter(tmp_path / "root")) as snapshotter:
        (lower,) = config_of(unpacked(snapshotter, turbo_labels() | STORED)).lowers
        assert (lower.target_file, lower.target_digest) == ("", TARGETS[0])
    with closing(open_snapshotter(tmp_path / "other")) as snapshotter:
        labels = turbo_labels() | STORED
        del labels[LABEL_IMAGE_REF]
        with pytest.raises(FailedPreconditionError, match=r"configuration does not allow .*set contentStore"):
            unpacked(snapshotter, labels)


def test_a_link_is_no_content(tmp_path: Path) -> None:
    place = tmp_path / "store" / "blobs" / TARGETS[0].replace(":", "/")
    place.parent.mkdir(parents=True)
    place.symlink_to("/etc/passwd")
    with (
        closing(open_snapshotter(tmp_path / "root", content_store=tmp_path / "store")) as snapshotter,
        pytest.raises(FailedPreconditionError, match="content store"),
    ):
        unpacked(snapshotter, turbo_labels() | STORED)


def test_a_layer_without_the_metadata_of_those_below(snapshotter: Snapshotter) -> None:
    unpacked(snapshotter, turbo_labels(), files=("ext4.fs.meta", "gzip.meta"))
    with pytest.raises(FailedPreconditionError, match=r"has no ext4\.fs\.meta"):
        unpacked(snapshotter, turbo_labels(1), 1, CHAIN[0], ("erofs.fs.meta", "gzip.meta"))


@pytest.mark.parametrize("name", ["ext4.fs.meta", "gzip.meta", ".turbo.target"])
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_a_file_that_is_none(snapshotter: Snapshotter, name: str, kind: str) -> None:
    labels = turbo_labels()
    (mount,) = snapshotter.prepare("key", "", labels)
    for each in ("ext4.fs.meta", "gzip.meta", ".turbo.target"):
        path = Path(mount.source) / each
        if each != name:
            path.touch()
        elif kind == "link":
            path.symlink_to("/etc/passwd")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    with pytest.raises(FailedPreconditionError, match=f"{name} is not a regular file"):
        snapshotter.commit(CHAIN[0], "key", labels)


def test_unpacked_without_labels_it_is_no_plain_layer(snapshotter: Snapshotter) -> None:
    (mount,) = snapshotter.prepare("key", "", {})
    (Path(mount.source) / ".turbo.ociv1").touch()
    with pytest.raises(FailedPreconditionError, match=r"without its labels.*obdlab image pull"):
        snapshotter.commit("name", "key", {})
