"""Labels as a hostile image or pod sets them: containerd puts their annotations among the client's own labels."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.formats import oci
from obdlab.image.config import ImageConfig
from obdlab.registry.reference import Reference
from obdlab.snapshotter import fallback, writable
from obdlab.snapshotter.config import ConfigError, SnapshotterConfig
from obdlab.snapshotter.core import Snapshotter
from obdlab.snapshotter.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError
from obdlab.snapshotter.fallback import LABEL_FALLBACK
from obdlab.snapshotter.layout import Layout
from obdlab.snapshotter.overlaybd import (
    LABEL_CRI_IMAGE_REF,
    LABEL_IMAGE_REF,
    LABEL_REMOTE,
    LABEL_STARGZ_REF,
    ImageOptions,
)
from obdlab.snapshotter.quota import LABEL_QUOTA, quota_asked
from obdlab.snapshotter.store import Kind, Store
from obdlab.snapshotter.tracing import LABEL_RECORD, LABEL_RECORD_PATH
from obdlab.snapshotter.writable import LABEL_ACTIVE_PATH, LABEL_COMMIT_PATH, LABEL_VSIZE, LABEL_WRITABLE
from tests.snapshotter.test_core import CHAIN, DIGESTS, StuckImages, downloaded, open_snapshotter, pull, pull_labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

GOLDEN = Path(__file__).parents[1] / "golden" / "image"
TARGET = "containerd.io/snapshot.ref"
VICTIM = "sha256:" + "f" * 64


class QuietImages(StuckImages):
    """Devices that are always there and can be taken away."""

    def release(self, snapshot_id: int) -> bool:
        return True


class RefusingImages(QuietImages):
    """Devices that cannot be had."""

    def mount(self, *arguments: object, **more: object) -> Path:
        raise FailedPreconditionError("no device here")


def opened(directory: Path, images: object = None, **options: object) -> Snapshotter:
    return Snapshotter(Layout(directory / "root"), images or QuietImages(), ImageOptions(**options))


@pytest.fixture
def snapshotter(tmp_path: Path) -> Iterator[Snapshotter]:
    snapshotter = opened(tmp_path)
    yield snapshotter
    snapshotter.close()


def is_ordinary(snapshotter: Snapshotter, parent: str, labels: Mapping[str, str]) -> bool:
    """Return True if the client is to fetch the layer, which it checks, and nothing got the wanted name."""
    before = {snapshot.key for snapshot in snapshotter.walk()}
    snapshotter.prepare("extract", parent, labels)
    made = snapshotter.stat("extract")
    snapshotter.remove("extract")
    return (
        made.kind is Kind.ACTIVE
        and made.labels[LABEL_FALLBACK] == fallback.UNPROVEN
        and {snapshot.key for snapshot in snapshotter.walk()} == before
    )


# -- names -------------------------------------------------------------------------------------------------------


def test_a_blob_does_not_get_the_name_of_another_layer(snapshotter: Snapshotter) -> None:
    # What containerd asks for if a hostile image's config lists the diff IDs of another image.
    assert is_ordinary(snapshotter, "", pull_labels() | {TARGET: VICTIM})
    pull(snapshotter)
    second = oci.chain_id_over(CHAIN[0], VICTIM)
    assert is_ordinary(snapshotter, CHAIN[0], pull_labels(1) | {TARGET: second})
    # The right blob in the wrong place is another layer too.
    assert is_ordinary(snapshotter, CHAIN[0], pull_labels(1) | {TARGET: DIGESTS[1]})
    assert is_ordinary(snapshotter, "", pull_labels(1))
    acceleration = {oci.ACCELERATION_LAYER: "yes"}
    assert is_ordinary(snapshotter, CHAIN[0], pull_labels(1) | acceleration | {TARGET: second})
    pull(snapshotter, 1, CHAIN[0])


@pytest.mark.parametrize("algorithm", ["sha512", "sha384", "SHA256"])
def test_names_by_other_algorithms_prove_nothing(snapshotter: Snapshotter, algorithm: str) -> None:
    assert is_ordinary(snapshotter, "", pull_labels() | {TARGET: f"{algorithm}:{'1' * 128}"})


def test_over_a_layer_of_unknown_chain_nothing_is_proven(snapshotter: Snapshotter, tmp_path: Path) -> None:
    downloaded(snapshotter, tmp_path, "builder's")
    assert is_ordinary(snapshotter, "builder's", pull_labels(1))
    # Nor does the parent count as none: it would be a bottom layer's name, over a parent.
    assert is_ordinary(snapshotter, "builder's", pull_labels())
    # One that the client fetched, and so checked, has its chain ID as a label.
    downloaded(snapshotter, tmp_path, "test/1/" + CHAIN[0], chain=CHAIN[0])
    pull(snapshotter, 1, "test/1/" + CHAIN[0])


@pytest.mark.parametrize(
    "names", [("manifest.json", "config.json"), ("manifest.with-trace.json", "config.with-trace.json")]
)
def test_images_of_the_original_prove_their_names(snapshotter: Snapshotter, names: tuple[str, str]) -> None:
    manifest, config = (json.loads((GOLDEN / name).read_bytes()) for name in names)
    parent = ""
    for layer, chain in zip(manifest["layers"], oci.chain_ids(config["rootfs"]["diff_ids"]), strict=True):
        labels = layer["annotations"] | {TARGET: chain, LABEL_IMAGE_REF: "registry.test/golden:1"}
        with pytest.raises(AlreadyExistsError):
            snapshotter.prepare(f"extract {chain}", parent, labels)
        parent = chain
    assert len(snapshotter.walk(["kind==committed"])) == len(manifest["layers"])


def test_the_originals_converter_names_its_layers_itself(snapshotter: Snapshotter) -> None:
    parent = ""
    for number in (0, 1):
        target = f"overlaybd-conv-sha256:{number}"
        with pytest.raises(AlreadyExistsError):
            snapshotter.prepare("extract", parent, pull_labels(number) | {TARGET: target})
        parent = target
    # Its names are no step towards the name of a pulled layer.
    assert is_ordinary(snapshotter, parent, pull_labels(2) | {TARGET: oci.chain_id_over(DIGESTS[0], DIGESTS[2])})


def poisoned(tmp_path: Path) -> Path:
    """A root with a layer under the name of another, as earlier versions made them."""
    with_wrong_name = opened(tmp_path)
    pull(with_wrong_name)
    pull(with_wrong_name, 1, CHAIN[0])
    with_wrong_name.close()
    store = Store(tmp_path / "root" / "metadata.sqlite")
    with store.write() as writer:
        labels = dict(writer.get(CHAIN[1]).labels) | {TARGET: VICTIM}
        writer.set_labels(CHAIN[1], labels)
        writer._connection.execute("UPDATE snapshot SET key = ? WHERE id = 2", (VICTIM,))
    store.close()
    return tmp_path / "root"


def test_fsck_finds_layers_under_wrong_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = poisoned(tmp_path)
    assert main(["fsck", str(root), "--run-dir", str(tmp_path / "run")]) == 1
    assert "another image's files would show" in capsys.readouterr().out
    main(["fsck", str(root), "--run-dir", str(tmp_path / "run"), "--repair"])
    snapshotter = opened(tmp_path)
    assert [snapshot.key for snapshot in snapshotter.walk()] == [CHAIN[0]]
    snapshotter.close()


def test_fsck_makes_no_image_of_a_plain_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its annotations say that it is one in the attacker's registry."""
    snapshotter = opened(tmp_path)
    labels = pull_labels() | {TARGET: VICTIM, LABEL_REMOTE: "remote snapshot"}
    snapshotter.prepare("extract", "", labels)
    snapshotter.commit("test/1/" + VICTIM, "extract", labels)
    snapshotter.update("test/1/" + VICTIM, labels, ["labels"])  # earlier versions kept the annotation
    snapshotter.close()
    main(["fsck", str(tmp_path / "root"), "--run-dir", str(tmp_path / "run"), "--repair"])
    assert "nothing wrong" in capsys.readouterr().out
    assert not (tmp_path / "root/snapshots/1/block").exists()


# -- labels that only the snapshotter gives ------------------------------------------------------------------------

FORGED = {LABEL_REMOTE: "remote snapshot", LABEL_COMMIT_PATH: "/etc/shadow", LABEL_FALLBACK: "x"}


def test_labels_of_the_snapshotter_are_not_taken_from_clients(snapshotter: Snapshotter) -> None:
    snapshotter.prepare("key", "", FORGED | {"a": "b"})
    assert snapshotter.stat("key").labels == {"a": "b"}
    snapshotter.commit("name", "key", FORGED | {"c": "d"})
    assert snapshotter.stat("name").labels == {"c": "d"}
    snapshotter.view("view", "name", FORGED)
    assert snapshotter.stat("view").labels == {}
    with pytest.raises(AlreadyExistsError):
        snapshotter.prepare("extract", "", pull_labels() | FORGED)
    assert snapshotter.stat(CHAIN[0]).labels == pull_labels() | {LABEL_REMOTE: "remote snapshot"}


# -- which registry ------------------------------------------------------------------------------------------------


def url_of(snapshotter: Snapshotter, labels: Mapping[str, str], tmp_path: Path) -> str:
    with pytest.raises(AlreadyExistsError):
        snapshotter.prepare(
            "extract", "", {key: value for key, value in pull_labels().items() if "image-ref" not in key} | labels
        )
    return ImageConfig.load(tmp_path / "root/snapshots/1/block/config.v1.json").repo_blob_url


@pytest.mark.parametrize(
    "labels",
    [
        {LABEL_IMAGE_REF: "registry.test/a/b:1"},  # the original's rpull
        {LABEL_CRI_IMAGE_REF: "registry.test/a/b:1"},  # Kubernetes, BuildKit
        {LABEL_IMAGE_REF: "registry.test/a/b:1", LABEL_CRI_IMAGE_REF: "registry.test/a/b@" + VICTIM},
        {LABEL_STARGZ_REF: "registry.test/a/b:1"},  # BuildKit, in its mode for stargz
        {LABEL_STARGZ_REF: "registry.test/a/b:1", LABEL_CRI_IMAGE_REF: "registry.test/a/b:1"},  # and for overlaybd
    ],
)
def test_who_names_the_image(snapshotter: Snapshotter, tmp_path: Path, labels: Mapping[str, str]) -> None:
    assert url_of(snapshotter, labels, tmp_path) == "https://registry.test/v2/a/b/blobs"


@pytest.mark.parametrize("other", ["127.0.0.1:8080/a/b:1", "registry.test/a/other:1", "evil.test/a/b:1", "a/b"])
def test_an_annotation_does_not_lead_elsewhere_than_kubernetes(snapshotter: Snapshotter, other: str) -> None:
    for labels in (
        {LABEL_CRI_IMAGE_REF: "registry.test/a/b:1", LABEL_IMAGE_REF: other},
        {LABEL_IMAGE_REF: "registry.test/a/b:1", LABEL_CRI_IMAGE_REF: other},
    ):
        with pytest.raises(InvalidArgumentError, match="another repository") as caught:
            snapshotter.prepare("extract", "", pull_labels() | labels)
        repos = [Reference.parse(labels[label]).repo for label in (LABEL_IMAGE_REF, LABEL_CRI_IMAGE_REF)]
        assert str(caught.value).endswith(f"(got {repos[0]}, wanted {repos[1]})")
    labels = {LABEL_STARGZ_REF: other, LABEL_CRI_IMAGE_REF: "registry.test/a/b:1"}
    with pytest.raises(InvalidArgumentError, match=r"stargz\.reference: another repository"):
        snapshotter.prepare("extract", "", pull_labels() | labels)
    assert snapshotter.walk() == []


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.170.2:80",
        "2852039166:80",
        "0xa9fea9fe:80",
        "169.16689662:80",
        "100.100.100.200",
        "[fe80::1]:5000",
        "[fd00:ec2::254]",
        "[::ffff:169.254.169.254]",
    ],
)
def test_a_metadata_service_is_no_registry(snapshotter: Snapshotter, host: str) -> None:
    for label in (LABEL_IMAGE_REF, LABEL_CRI_IMAGE_REF, LABEL_STARGZ_REF):
        labels = {key: value for key, value in pull_labels().items() if "image-ref" not in key}
        with pytest.raises(InvalidArgumentError, match="link-local"):
            snapshotter.prepare("extract", "", labels | {label: f"{host}/latest/meta-data:1"})


@pytest.mark.parametrize(
    "size", ["0" * 20 + "9" * 30, "0" * 19 + "1", "9" * 5000, "+5", "1_000", "٣", "0", "-1", " 7"]
)
def test_sizes_that_are_none(snapshotter: Snapshotter, size: str) -> None:
    with pytest.raises(InvalidArgumentError, match="blob-size") as caught:
        snapshotter.prepare("extract", "", pull_labels() | {oci.BLOB_SIZE: size})
    assert len(str(caught.value)) < 300


# -- paths of the host ---------------------------------------------------------------------------------------------

OWN = {LABEL_WRITABLE: "dir", LABEL_VSIZE: "1"}


def test_a_writable_layer_lies_where_the_settings_allow(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    allowed.mkdir(mode=0o755)
    (allowed / "link").symlink_to(outside)
    (allowed / "open").mkdir()
    (allowed / "open").chmod(0o777)
    snapshotter = opened(tmp_path, active_roots=(allowed,))
    try:
        for place in (
            *(outside, allowed / ".." / "outside", allowed / "link" / "x", allowed / "open" / "x", "/etc", "/"),
            *(f"{allowed}-other", "relative", f"{allowed}/x\0y", tmp_path),
        ):
            with pytest.raises(InvalidArgumentError, match=r"overlay\.active\.path"):
                snapshotter.prepare("key", "", OWN | {LABEL_ACTIVE_PATH: str(place)})
        with pytest.raises(InvalidArgumentError) as caught:
            snapshotter.prepare("key", "", OWN | {LABEL_ACTIVE_PATH: str(outside)})
        assert str(caught.value).endswith(f"(got {str(outside)!r}, wanted one below: {allowed})")
        assert not outside.exists()
        assert snapshotter.walk() == []
        snapshotter.prepare("key", "", OWN | {LABEL_ACTIVE_PATH: f"{allowed}/deep/place"})
        assert sorted(os.listdir(allowed / "deep/place")) == ["writable_data", "writable_index"]
        snapshotter.remove("key")
        assert os.listdir(allowed / "deep/place") == []
    finally:
        snapshotter.close()


def test_no_path_is_allowed_unless_set(snapshotter: Snapshotter, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"activePathRoots.*wanted one below: none\)"):
        snapshotter.prepare("key", "", OWN | {LABEL_ACTIVE_PATH: str(tmp_path / "new")})
    assert not (tmp_path / "new").exists()


def test_a_refused_container_takes_nothing_from_another(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir(mode=0o755)
    labels = OWN | {LABEL_ACTIVE_PATH: str(allowed)}
    snapshotter = opened(tmp_path, active_roots=(allowed,))
    try:
        snapshotter.prepare("victim", "", labels)
        before = {path: path.read_bytes()[:4096] for path in allowed.iterdir()}
        for _ in range(2):
            with pytest.raises(FailedPreconditionError, match="another container's"):
                snapshotter.prepare("attacker", "", labels)
        assert {path: path.read_bytes()[:4096] for path in allowed.iterdir()} == before
        assert [snapshot.key for snapshot in snapshotter.walk()] == ["victim"]
        # Nor is the index alone taken, or anything else of that name.
        (allowed / "writable_data").rename(allowed / "kept")
        with pytest.raises(FailedPreconditionError, match="writable_index"):
            snapshotter.prepare("attacker", "", labels)
        assert (allowed / "writable_index").exists()
    finally:
        snapshotter.close()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_device_that_cannot_be_had_leaves_only_what_was_there(tmp_path: Path, sparse: bool) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir(mode=0o755)
    (allowed / "other").write_text("x")
    snapshotter = opened(tmp_path, RefusingImages(), active_roots=(allowed,), sparse=sparse)
    try:
        with pytest.raises(FailedPreconditionError, match="no device here"):
            snapshotter.prepare("key", "", OWN | {LABEL_ACTIVE_PATH: str(allowed)})
        assert os.listdir(allowed) == ["other"]
    finally:
        snapshotter.close()


def test_files_of_another_call_are_not_unlinked(tmp_path: Path) -> None:
    """Should one appear between the look and the making."""
    data, index = tmp_path / "data", tmp_path / "index"
    index.write_text("another's")
    real, os.path.lexists = os.path.lexists, lambda path: False
    try:
        for sparse in (False, True):
            with pytest.raises(Exception, match="exists"):
                writable.make_upper(data, index, 1, sparse=sparse, make_ext4=True)
            assert index.read_text() == "another's"
            assert not data.exists()
    finally:
        os.path.lexists = real


def record(path: Path | str) -> dict[str, str]:
    return {LABEL_RECORD: "yes", LABEL_RECORD_PATH: str(path)}


def test_a_trace_lies_where_the_settings_allow(tmp_path: Path) -> None:
    allowed = tmp_path / "traces"
    allowed.mkdir(mode=0o755)
    for path in (tmp_path / "empty", allowed / "empty"):
        path.touch()
    (allowed / "link").symlink_to(tmp_path / "empty")
    snapshotter = opened(tmp_path, trace_roots=(allowed,))
    try:
        pull(snapshotter)
        for path in (
            tmp_path / "empty",
            allowed / "link",
            allowed / "../empty",
            "/etc/hostname",
            allowed / "none",
            allowed,
        ):
            for more in ({}, {LABEL_WRITABLE: "dir"}):
                with pytest.raises(InvalidArgumentError, match="record-trace-path"):
                    snapshotter.prepare("one", CHAIN[0], record(path) | more)
        snapshotter.prepare("one", CHAIN[0], record(allowed / "empty"))
        config = ImageConfig.load(tmp_path / "root/snapshots/1/block/config.v1.json")
        assert config.record_trace_path == str(allowed / "empty")
    finally:
        snapshotter.close()


def test_a_layer_that_is_pulled_records_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    snapshotter = opened(tmp_path, trace_roots=(tmp_path,))
    try:
        pull(snapshotter)
        labels = {TARGET: VICTIM, LABEL_IMAGE_REF: "registry.test/a/b:1"} | record(tmp_path / "empty")
        snapshotter.prepare("extract", CHAIN[0], labels)
        assert ImageConfig.load(tmp_path / "root/snapshots/1/block/config.v1.json").record_trace_path == ""
    finally:
        snapshotter.close()


def test_the_originals_tool_has_its_place() -> None:
    assert ImageOptions().trace_roots == (Path("/tmp/ctr-record-trace"),)


def test_the_roots_are_settings(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"activePathRoots": ["/data"], "traceRoots": []}))
    images = SnapshotterConfig.load(path).images
    assert (images.active_roots, images.trace_roots) == ((Path("/data"),), ())
    for value in ("/data", ["data"], [7], {}):
        path.write_text(json.dumps({"activePathRoots": value}))
        with pytest.raises(ConfigError, match=r"activePathRoots: wrong value .*wanted a (list|path)"):
            SnapshotterConfig.load(path)


# -- file systems --------------------------------------------------------------------------------------------------

HOSTILE_FS = [
    "ext4;;-d /etc/ssl",
    "ext4;;-E discard,root_owner=0:0 -d /etc",
    "ext4;;-J device=/dev/sda",
    "ext4;;-E encoding=utf8",
    "ext4;;-z /etc/undo",
    "ext4;;-O",
    "ext4;;/dev/sda",
    "ext4;;-F --",
    "xfs;;-p /etc/passwd",
    "xfs;;-l logdev=/dev/sda",
    "xfs;;-d file,name=/etc/x",
    "ext4;journal_path=/dev/sda",
    "ext4;discard,errors=panic",
    "ext4;test_dummy_encryption",
    "erofs;device=/dev/sda",
    "xfs;logdev=/dev/sda",
    "xfs;rtdev=/dev/sda",
    "proc",
    "overlay",
    "nfs",
    "ext4ß",
    "ext4;" + "discard," * 1000,
]
HARMLESS_FS = [
    "ext4",
    "xfs",
    "erofs",
    "ext4;discard,noatime",
    "ext4;;-O ^has_journal,sparse_super,flex_bg -G 1 -E discard -F",
    "ext4;discard;-b 4096 -I 256 -m 0 -E discard,lazy_itable_init=1",
    "xfs;nouuid,discard;-f -l size=4m -m crc=0",
    "ext4;",
]


@pytest.mark.parametrize("text", HOSTILE_FS)
def test_a_label_does_not_have_the_host_do_its_work(snapshotter: Snapshotter, text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        snapshotter.prepare("key", "", OWN | {oci.BLOB_FS_TYPE: text})
    with pytest.raises(InvalidArgumentError):
        snapshotter.prepare("extract", "", pull_labels() | {oci.BLOB_FS_TYPE: text})
    assert snapshotter.walk() == []


@pytest.mark.parametrize("text", HARMLESS_FS)
def test_file_systems_that_images_are_made_with(snapshotter: Snapshotter, text: str) -> None:
    pull(snapshotter, **{oci.BLOB_FS_TYPE: text})


def test_the_configuration_may_say_anything(tmp_path: Path) -> None:
    default = "ext4;;-d /srv/skeleton"
    snapshotter = opened(tmp_path, default_fs=default)
    try:
        snapshotter.prepare("key", "", OWN)
        snapshotter.prepare("same", "", OWN | {oci.BLOB_FS_TYPE: default})
    finally:
        snapshotter.close()


# -- limits --------------------------------------------------------------------------------------------------------


def test_a_label_does_not_lift_the_quota_of_the_host(tmp_path: Path) -> None:
    gib = 1 << 30
    assert quota_asked({LABEL_QUOTA: "100g"}, 20 * gib) == 20 * gib
    assert quota_asked({LABEL_QUOTA: "10g"}, 20 * gib) == 10 * gib
    assert quota_asked({LABEL_QUOTA: "100g"}, 0) == 100 * gib
    snapshotter = open_snapshotter(tmp_path)
    try:
        labels = {"containerd.io/snapshot/type": "image", LABEL_QUOTA: "20m"}
        with pytest.raises(FailedPreconditionError, match="quota"):  # this file system has none, so it was wanted
            snapshotter.prepare("key", "", labels)
    finally:
        snapshotter.close()
