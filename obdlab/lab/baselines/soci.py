"""soci-snapshotter: plain gzip layers with an index beside each; FUSE reads files when they are needed.

Debian's package soci-snapshotter has client and daemon. The daemon fetches indices by HTTPS regardless of its
configuration, and takes 127.0.0.0/8 for a registry without TLS. Over plain HTTP it retries for ten seconds a layer
and then pulls everything without a warning. So the adapter uses the registry's TLS host, and a pull that mounted no
layer lazily is an error.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, ClassVar

from obdlab.lab.baselines.adapter import first_line
from obdlab.lab.baselines.overlayfs import Overlayfs
from obdlab.lab.baselines.stargz import fetched
from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.testbed.process import LabError, run

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.lab.testbed.registry import RegistryHost
    from obdlab.registry.client import RegistryClient

_INDEX_TIMEOUT_S = 1800.0
_PULL_TIMEOUT_S = 600.0
# SOCI's default. If all layers are smaller, the largest one is indexed: an image without an index is no SOCI image.
_LEAST_INDEXED = 10 << 20
# The client's database has a fixed place, so each call gets a mount namespace with a private directory there.
_CLIENT_DIRECTORY = "/var/lib/soci-snapshotter-grpc"
_IN_PRIVATE = f'mkdir -p {_CLIENT_DIRECTORY}; mount --bind "$1" {_CLIENT_DIRECTORY}; shift; exec "$@"'


class Soci(Overlayfs):
    """SOCI with its defaults: spans of 4 MiB, no index for layers below 10 MiB, background fetch after 30 s."""

    name: ClassVar[str] = "soci"
    title: ClassVar[str] = "SOCI"
    programs: ClassVar[dict[str, str]] = {
        **Overlayfs.programs,
        "soci": "soci-snapshotter",
        "soci-snapshotter-grpc": "soci-snapshotter",
        "openssl": "openssl",
    }
    proxy: ClassVar[bool] = True
    secure: ClassVar[bool] = True
    background: ClassVar[bool] = True

    def tag(self, source: Source) -> str:
        """Return the tag of the image with an index."""
        return f"{source.identity}-soci2"

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Index the image as built; push the image and the index."""
        with fetched(host, source, client, reference) as plain, tempfile.TemporaryDirectory() as directory:
            run([*host.ctr, "images", "tag", plain, reference])
            largest = max(layer.size for layer in OciLayout(source.layout).manifest.layers)
            indexed = str(min(_LEAST_INDEXED, largest))
            try:
                for command in (("create", "--min-layer-size", indexed), ("push", "--plain-http", "--quiet")):
                    words = ("soci", *host.ctr[1:], *command, reference)
                    private = ("unshare", "--mount", "sh", "-euc", _IN_PRIVATE, "sh", directory)
                    run([*private, *words], timeout_s=_INDEX_TIMEOUT_S)
                # The image is pushed last: is_published() looks for its manifest only.
                run([*host.ctr, "images", "push", "--plain-http", reference], timeout_s=_INDEX_TIMEOUT_S)
            finally:
                run([*host.ctr, "images", "remove", "--sync", reference])

    def serving(self, host: OwnContainerd, registry: RegistryHost) -> AbstractContextManager[None]:
        """Run the snapshotter's daemon."""
        config = host.state / f"{self.name}.toml"
        config.write_text("")
        command = ["soci-snapshotter-grpc", "--address", str(host.proxy_socket(self.name))]
        command += ["--root", str(host.proxy_root(self.name)), "--config", str(config)]
        return host.serving(self.name, command)

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Pull metadata; the daemon fetches the index, and layers without an index whole."""
        options = ("--snapshotter", self.name)
        words = ["soci", *host.ctr[1:], "image", "rpull", *options, reference]
        run(words, timeout_s=_PULL_TIMEOUT_S, environment=host.environment)
        if not any(" fuse." in line for line in _mounts_below(host, self.name)):
            raise LabError(f"{self.name}: pulled everything: no layer is mounted lazily (see {host.logs}/soci.log)")

    def versions(self) -> dict[str, str]:
        """Return the package's version."""
        return {"soci": first_line("soci", "--version")}


def _mounts_below(host: OwnContainerd, name: str) -> list[str]:
    with open("/proc/self/mounts") as mounts:
        return [line for line in mounts if str(host.proxy_root(name)) in line]
