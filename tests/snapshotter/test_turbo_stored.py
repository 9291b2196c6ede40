"""turboOCI images that start from containerd's content store: made there, or pulled with all their blobs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.containerd.client import Containerd
from obdlab.formats import oci
from obdlab.pull.errors import PullError
from obdlab.pull.stored import unpack_stored
from obdlab.pull.unpack import Outcome
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.system import mount
from tests import capabilities
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.registry.server import running_registry
from tests.snapshotter import imagefiles
from tests.snapshotter.test_lazy_images import run
from tests.snapshotter.test_turbo_images import made

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.containerd

IMAGE = "registry.invalid/apps/busybox:1"
TURBO = f"{IMAGE}-turbo"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ObdlabHost]:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    config = tmp_path / "config.json"
    store = tmp_path / "host" / "containerd" / "root" / "io.containerd.content.v1.content"
    config.write_text(json.dumps({"contentStore": str(store), "autoRemoveDev": True}))
    with containerd_with_obdlab(tmp_path / "host", "--config", str(config)) as running:
        yield running


def imported(host: ObdlabHost, directory: Path) -> None:
    archive = directory / "image.tar"
    imagefiles.write_oci_archive(archive, IMAGE, imagefiles.busybox_layers())
    host.ctr("images", "import", "--no-unpack", str(archive))


def turbo(host: ObdlabHost, *arguments: str) -> int:
    names = ("containerd:test:" + IMAGE, "--containerd", host.containerd.address)
    return main(["image", "turbo", *names, "--quiet", *arguments])


def lowers(host: ObdlabHost) -> list[dict[str, str]]:
    files = sorted(host.snapshotter.root.glob("snapshots/*/block/config.v1.json"))
    return json.loads(max(files, key=lambda path: int(path.parts[-3])).read_text())["lowers"]


@pytest.mark.parametrize("filesystem", ["ext4", "both"])
def test_an_imported_image_runs_without_any_registry(host: ObdlabHost, tmp_path: Path, filesystem: str) -> None:
    imported(host, tmp_path)
    assert turbo(host, "--fs", filesystem, "--work-dir", str(tmp_path)) == 0
    # The ordinary image's name may go: what the new one needs stays.
    host.ctr("images", "rm", "--sync", IMAGE)
    printed = host.ctr(
        *("run", "--rm", "--snapshotter", NAME, TURBO, "one"),
        *("/bin/sh", "-c", "cat /data/old/visible /replaced; ls /data; echo mine > /w; cat /w"),
    )
    assert printed.startswith("newnow a file")
    assert printed.endswith("mine\n")
    assert "deleted" not in printed
    assert all("targetFile" in lower and "targetDigest" not in lower for lower in lowers(host))
    # Whoever removes the image gives all of it back.
    host.ctr("images", "rm", "--sync", TURBO)
    assert host.ctr("content", "ls", "-q").split() == []
    assert "sha256:" not in host.ctr("snapshots", "--snapshotter", NAME, "ls")
    assert [point for point in mount.mounts() if host.snapshotter.root in point.mountpoint.parents] == []


def test_a_second_run_makes_nothing_new(host: ObdlabHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(host, tmp_path)
    outcomes, digests = [], []
    for _ in range(2):
        assert turbo(host, "--json", "--work-dir", str(tmp_path)) == 0
        answer = json.loads(capsys.readouterr().out)
        outcomes.append({layer["outcome"] for layer in answer["unpacked"]})
        digests.append(answer["digest"])
    assert outcomes == [{"unpacked"}, {"present"}]
    assert digests[0] == digests[1]


def test_missing_content_is_named(host: ObdlabHost, tmp_path: Path) -> None:
    imported(host, tmp_path)
    assert turbo(host, "--no-unpack", "--work-dir", str(tmp_path)) == 0
    with Containerd(host.containerd.address, "test") as client:
        digest = client.images.get(TURBO).digest
        manifest = oci.Manifest.parse(client.content.read(digest), TURBO)
        target = manifest.layers[1].turbo_target or ""
        client.content.delete(target)
        with pytest.raises(PullError, match=f"does not have all of this image .*{target}"):
            unpack_stored(client, TURBO, snapshotter=NAME, platform=host_platform())
        assert client.snapshots(NAME).list() == []


def changed_target(tmp_path: Path) -> tuple[str, Path]:
    """Change one byte near the end of the image's lowest layer behind containerd's back; return digest and file."""
    documents, manifest = imagefiles.image_documents(imagefiles.busybox_layers())
    digest = oci.Manifest.parse(documents[manifest], IMAGE).layers[0].digest
    store = tmp_path / "host" / "containerd" / "root" / "io.containerd.content.v1.content"
    path = store / "blobs" / digest.replace(":", "/")
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])
    return digest, path


def test_a_content_store_that_lies_makes_no_image(
    host: ObdlabHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(host, tmp_path)
    digest, _ = changed_target(tmp_path)
    assert turbo(host, "--work-dir", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert re.search(rf"content {digest}: the store holds other bytes .got sha256:\w+, wanted {digest}", error)
    assert TURBO not in host.ctr("images", "ls", "-q")
    assert "sha256:" not in host.ctr("snapshots", "--snapshotter", NAME, "ls")


def test_a_content_store_that_lies_later_is_found(
    host: ObdlabHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(host, tmp_path)
    assert turbo(host, "--work-dir", str(tmp_path)) == 0
    digest, path = changed_target(tmp_path)
    capsys.readouterr()
    inspect = ("image", "inspect", f"containerd:test:{TURBO}", "--containerd", host.containerd.address)
    assert main([*inspect]) == 0
    assert main([*inspect, "--verify"]) == 1
    error = capsys.readouterr().err
    assert f"the files of layer 0 cannot be read: content {digest}: the store holds other bytes (got sha256:" in error
    # A container sees an error, and never other bytes.
    with pytest.raises(AssertionError, match=r"[Ii]nput/output error|EIO"):
        host.ctr("run", "--rm", "--snapshotter", NAME, TURBO, "one", "/bin/sh", "-c", "cat /data/kept")
    path.unlink()
    assert main([*inspect]) == 1
    assert "target of a turboOCI layer is not there" in capsys.readouterr().err


def test_another_content_store_is_refused_with_the_setting(tmp_path: Path) -> None:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"contentStore": str(tmp_path / "elsewhere")}))
    with containerd_with_obdlab(tmp_path / "host", "--config", str(config)) as host:
        imported(host, tmp_path)
        assert turbo(host, "--no-unpack", "--work-dir", str(tmp_path)) == 0
        with (
            Containerd(host.containerd.address, "test") as client,
            pytest.raises(Exception, match=r"not in containerd's content store .*elsewhere.*contentStore"),
        ):
            unpack_stored(client, TURBO, snapshotter=NAME, platform=host_platform())


def test_blobs_that_were_downloaded_need_no_registry(host: ObdlabHost, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as server:
        image = made(server, "downloaded", tmp_path, "ext4")
        result = host.rpull(image, download=True)
        assert {layer.outcome for layer in result.layers} == {Outcome.UNPACKED}
        with Containerd(host.containerd.address, "test") as client:
            manifest = oci.Manifest.parse(client.content.read(client.images.get(image).digest), image)
            for layer in manifest.layers:
                assert client.content.exists(layer.turbo_target or "")
        again = host.rpull(image, download=True)
        assert [layer.origin for layer in again.layers] == ["", ""]
    assert run(host, image, "offline", "echo ran; /busybox ls /") != ""
    assert Reference.parse(image).tag == "turbo"


def test_a_lazy_pull_is_reported_as_lazy(host: ObdlabHost, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as server:
        image = made(server, "lazy", tmp_path, "ext4")
        host.rpull(image)
        again = host.rpull(image, download=True)
        assert [layer.origin for layer in again.layers] == [image, image]
        assert len(again.still_lazy) == 2
