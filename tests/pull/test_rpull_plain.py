"""Plain images: rpull must do what an ordinary pull does, on containerd's own overlayfs snapshotter."""

from __future__ import annotations

import gzip
import threading
from typing import TYPE_CHECKING

import pytest
import zstandard

from obdlab.containerd.errors import NotFoundError
from obdlab.containerd.snapshots import Kind
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.formats.oci import (
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_ZSTD,
    Descriptor,
    Index,
    Platform,
    digest_of,
)
from obdlab.pull.errors import PullError
from obdlab.pull.rpull import rpull
from obdlab.pull.unpack import Outcome
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from tests.pull import images
from tests.pull.images import Layer, layer, lose_blob, push_image, push_index, shell_layer, stored_blob

if TYPE_CHECKING:
    from obdlab.containerd.client import Containerd
    from obdlab.pull.rpull import PullResult
    from obdlab.registry.client import RegistryClient
    from tests.containerd.host import ContainerdHost
    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry]

OTHER = Platform("linux", "riscv64")


def pull(containerd: Containerd, registry: RegistryClient, reference: Reference, **options: object) -> PullResult:
    arguments: dict[str, object] = {"snapshotter": "overlayfs", "platform": host_platform()} | options
    return rpull(containerd, registry, reference, **arguments)  # type: ignore[arg-type]


def assert_nothing_left(containerd: Containerd) -> None:
    assert containerd.snapshots("overlayfs").list() == []
    assert containerd.content.list() == []
    assert containerd.images.list() == []
    assert containerd.leases.list() == []


class Recorder:
    """Progress that is remembered."""

    def __init__(self) -> None:
        self.expected = self.advanced = 0
        self._lock = threading.Lock()

    def expect(self, size: int) -> None:
        with self._lock:
            self.expected += size

    def advance(self, size: int) -> None:
        with self._lock:
            self.advanced += size


def test_pull_run_and_remove(
    containerd: Containerd, containerd_host: ContainerdHost, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [shell_layer(), layer({"a": b"one"}), layer({"a": b"two", "b": b"three"})]
    reference, manifest = push_image(registry, f"{registry_server.host}/plain/run:v1", layers)
    progress = Recorder()
    result = pull(containerd, registry, reference, progress=progress)

    sizes = sum(item.size for item in manifest.layers)
    assert [item.outcome for item in result.layers] == [Outcome.UNPACKED] * 3
    assert progress.expected == progress.advanced == result.layer_bytes == sizes
    assert result.metadata_bytes == len(manifest.to_bytes()) + manifest.config.size
    assert containerd.leases.list() == []
    assert [info.kind for info in containerd.snapshots("overlayfs").list()] == [Kind.COMMITTED] * 3

    ctr = ("-n", containerd.namespace)
    ran = containerd_host.ctr(*ctr, "run", "--rm", str(reference), "one", "/bin/sh", "-c", "read x < /a; echo got $x")
    assert "got two" in ran
    assert "complete (4/4)" in containerd_host.ctr(*ctr, "images", "check")
    containerd_host.ctr(*ctr, "images", "rm", "--sync", str(reference))
    assert_nothing_left(containerd)


def test_second_pull_fetches_documents_only(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    reference, _ = push_image(
        registry, f"{registry_server.host}/plain/twice", [layer({"a": b"1"}), layer({"b": b"2"})]
    )
    first = pull(containerd, registry, reference)
    before = (containerd.snapshots("overlayfs").list(), containerd.content.list(), containerd.images.list())
    again = pull(containerd, registry, reference)
    assert again.layer_bytes == 0
    assert again.count(Outcome.PRESENT) == 2
    assert (first.digest, first.name) == (again.digest, again.name)
    assert (containerd.snapshots("overlayfs").list(), containerd.content.list(), containerd.images.list()) == before


def test_moved_tag_and_shared_lower_layer(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    base = layer({"base": b"b"})
    name = f"{registry_server.host}/plain/moved:latest"
    pull(containerd, registry, push_image(registry, name, [base, layer({"v": b"1"})])[0])
    reference, manifest = push_image(registry, name, [base, layer({"v": b"2"})])
    result = pull(containerd, registry, reference)
    assert [item.outcome for item in result.layers] == [Outcome.PRESENT, Outcome.UNPACKED]
    assert containerd.images.get(str(reference)).digest == digest_of(manifest.to_bytes())


def test_same_layer_twice_is_fetched_once(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    same = layer({"x": b"x"})
    reference, manifest = push_image(registry, f"{registry_server.host}/plain/same", [same, same])
    result = pull(containerd, registry, reference)
    assert result.layer_bytes == manifest.layers[0].size
    assert result.count(Outcome.UNPACKED) == 2


@pytest.mark.parametrize("media_type", [OCI_LAYER_ZSTD, DOCKER_LAYER_GZIP, DOCKER_LAYER, OCI_LAYER])
def test_compressions(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer, media_type: str
) -> None:
    plain = gzip.decompress(layer({"name": media_type.encode() * 10_000}).data)
    compress = {OCI_LAYER_ZSTD: zstandard.compress, DOCKER_LAYER_GZIP: gzip.compress}.get(media_type, bytes)
    made = Layer(compress(plain), digest_of(plain), media_type)
    reference, _ = push_image(registry, f"{registry_server.host}/plain/compressed", [made])
    assert pull(containerd, registry, reference).count(Outcome.UNPACKED) == 1
    assert containerd.snapshots("overlayfs").usage(made.diff_id).size >= 10_000 * len(media_type)


def test_index_in_an_index(containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer) -> None:
    name = f"{registry_server.host}/plain/nested"
    _, manifest = push_image(registry, f"{name}:image", [layer({"n": b"1"})])
    _, inner = push_index(registry, f"{name}:inner", {host_platform(): manifest})
    data = inner.to_bytes()
    entry = Descriptor(OCI_INDEX, digest_of(data), len(data), platform=host_platform())
    outer = Reference.parse(f"{name}:outer")
    registry.put_manifest(outer, OCI_INDEX, Index((entry,)).to_bytes())
    with pytest.raises(PullError, match="index inside an index"):
        pull(containerd, registry, outer)


def test_index_chooses_platform(
    containerd: Containerd, containerd_host: ContainerdHost, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    name = f"{registry_server.host}/plain/index"
    mine, theirs = [layer({"mine": b"1"})], [layer({"theirs": b"1"})]
    _, manifest = push_image(registry, f"{name}:mine", mine)
    _, other = push_image(registry, f"{name}:theirs", theirs, config=images.config_of(theirs, OTHER))
    reference, index = push_index(registry, f"{name}:both", {OTHER: other, host_platform(): manifest})

    result = pull(containerd, registry, reference)
    assert result.digest == digest_of(index.to_bytes())
    assert [item.digest for item in result.layers] == [item.digest for item in manifest.layers]
    assert str(reference) in containerd_host.ctr("-n", containerd.namespace, "images", "ls")

    result = pull(containerd, registry, reference, platform=OTHER)
    assert [item.digest for item in result.layers] == [item.digest for item in other.layers]

    with pytest.raises(FormatError, match="no image for this platform"):
        pull(containerd, registry, reference, platform=Platform("linux", "sparc"))
    containerd.images.delete(str(reference), sync=True)
    assert_nothing_left(containerd)


def test_single_manifest_for_another_platform(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [layer({"x": b"x"})]
    name = f"{registry_server.host}/plain/foreign"
    reference, _ = push_image(registry, name, layers, config=images.config_of(layers, OTHER))
    with pytest.raises(PullError, match=r"got linux/riscv64, wanted linux/"):
        pull(containerd, registry, reference)


def test_missing_layer_leaves_nothing(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [layer({"m0": b"here"}), layer({"m1": b"lost"})]
    name = f"{registry_server.host}/plain/missing"
    reference, manifest = push_image(registry, name, layers)
    lose_blob(registry_server, reference, manifest.layers[1].digest)
    with pytest.raises(SourceError, match="404") as failure:
        pull(containerd, registry, reference)
    assert manifest.layers[1].digest in str(failure.value)
    assert_nothing_left(containerd)


def test_damaged_layer_leaves_nothing(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [layer({"d0": b"good"}), layer({"d1": b"bad"})]
    reference, manifest = push_image(registry, f"{registry_server.host}/plain/damaged", layers)
    stored_blob(registry_server, manifest.layers[1].digest).write_bytes(bytes(manifest.layers[1].size))
    with pytest.raises(CorruptBlobError, match=manifest.layers[1].digest):
        pull(containerd, registry, reference)
    assert_nothing_left(containerd)


def test_wrong_diff_id_leaves_nothing(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    good, lying = layer({"l0": b"0"}), layer({"l1": b"1"})
    layers = [good, Layer(lying.data, digest_of(b"something else"))]
    reference, _ = push_image(registry, f"{registry_server.host}/plain/lying", layers)
    with pytest.raises(PullError, match="unpacks to other bytes"):
        pull(containerd, registry, reference)
    assert_nothing_left(containerd)


def test_layer_that_is_no_archive_leaves_nothing(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    junk = Layer(b"no archive", digest_of(b"no archive"), "application/vnd.oci.image.layer.v1.tar")
    reference, _ = push_image(registry, f"{registry_server.host}/plain/junk", [junk])
    with pytest.raises(Exception, match=junk.descriptor.digest):
        pull(containerd, registry, reference)
    assert_nothing_left(containerd)


def test_layer_count_must_match_config(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [layer({"c0": b"0"}), layer({"c1": b"1"})]
    name = f"{registry_server.host}/plain/count"
    reference, _ = push_image(registry, name, layers, config=images.config_of(layers[:1]))
    with pytest.raises(PullError, match="got 2 layers, wanted 1"):
        pull(containerd, registry, reference)


def test_unknown_snapshotter(containerd: Containerd, registry: RegistryClient) -> None:
    with pytest.raises(PullError, match="no snapshotter 'absent'"):
        pull(containerd, registry, Reference.parse("127.0.0.1:1/never/asked"), snapshotter="absent")


def test_unknown_tag(containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer) -> None:
    with pytest.raises(SourceError, match="404"):
        pull(containerd, registry, Reference.parse(f"{registry_server.host}/plain/none:gone"))


def test_interrupted_while_unpacking_leaves_nothing(
    containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    layers = [layer({"i0": b"0"}), layer({"i1": b"1"})]
    reference, _ = push_image(registry, f"{registry_server.host}/plain/interrupted", layers)

    class Interrupts(Recorder):
        # Ctrl-C reaches the main thread; a download thread is where this test can make it happen for sure.
        def advance(self, size: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(containerd, registry, reference, progress=Interrupts())
    assert_nothing_left(containerd)


def test_two_pulls_at_once(containerd: Containerd, registry: RegistryClient, registry_server: RegistryServer) -> None:
    layers = [layer({f"p{number}": bytes([number]) * 300_000}) for number in range(2)]
    reference, _ = push_image(registry, f"{registry_server.host}/plain/both", layers)
    results: list[PullResult] = []
    threads = [
        threading.Thread(target=lambda: results.append(pull(containerd, registry, reference))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    kinds = [info.kind for info in containerd.snapshots("overlayfs").list()]
    assert kinds == [Kind.COMMITTED] * 2
    assert containerd.leases.list() == []


def test_other_images_removal_takes_nothing(
    containerd: Containerd, containerd_host: ContainerdHost, registry: RegistryClient, registry_server: RegistryServer
) -> None:
    base = shell_layer()
    keep, _ = push_image(registry, f"{registry_server.host}/plain/keep", [base, layer({"k": b"kept"})])
    drop, _ = push_image(registry, f"{registry_server.host}/plain/drop", [base, layer({"k": b"dropped"})])
    pull(containerd, registry, keep)
    pull(containerd, registry, drop)
    ctr = ("-n", containerd.namespace)
    containerd_host.ctr(*ctr, "images", "rm", "--sync", str(drop))
    containerd_host.ctr(*ctr, "content", "prune", "references")
    assert len(containerd.snapshots("overlayfs").list()) == 2
    ran = containerd_host.ctr(*ctr, "run", "--rm", str(keep), "two", "/bin/sh", "-c", "read x < /k; echo got $x")
    assert "got kept" in ran
    with pytest.raises(NotFoundError):
        containerd.images.get(str(drop))
