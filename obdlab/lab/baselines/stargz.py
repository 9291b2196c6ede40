"""stargz-snapshotter: layers as eStargz, files read by FUSE when they are needed.

Debian has the client (``ctr-remote``, package stargz-snapshotter) and the library; ``scripts/build-stargz`` builds
the daemon from that library. A daemon from the stargz project's releases works too, if it is in the PATH.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from obdlab.lab.baselines.adapter import first_line
from obdlab.lab.baselines.overlayfs import Overlayfs
from obdlab.lab.images.ocilayout import push_layout
from obdlab.lab.testbed.process import run
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.images.recipe import Recipe
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.lab.testbed.registry import RegistryHost
    from obdlab.registry.client import RegistryClient

_CONVERT_TIMEOUT_S = 1800.0
_PULL_TIMEOUT_S = 600.0
# The daemon's defaults, except for valid_interval: after its default of 60 s the daemon would check blobs at the
# registry again, and a warm start must not need the registry.
_CONFIG = "[blob]\nvalid_interval = 86400\n"


class Stargz(Overlayfs):
    """eStargz as ``ctr-remote images convert`` makes it: nothing recorded, no prefetch; background fetch is on."""

    name: ClassVar[str] = "stargz"
    title: ClassVar[str] = "stargz"
    programs: ClassVar[dict[str, str]] = {
        **Overlayfs.programs,
        "ctr-remote": "stargz-snapshotter",
        "containerd-stargz-grpc": "run scripts/build-stargz",
    }
    proxy: ClassVar[bool] = True
    background: ClassVar[bool] = True

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image."""
        return f"{source.identity}-estargz1"

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Convert the layers one by one, in containerd's content store."""
        with fetched(host, source, client, reference) as plain:
            words = ("images", *self.conversion(source.recipe), plain, reference)
            run(["ctr-remote", *host.ctr[1:], *words], timeout_s=_CONVERT_TIMEOUT_S)
            run([*host.ctr, "images", "push", "--plain-http", reference], timeout_s=_CONVERT_TIMEOUT_S)
            run([*host.ctr, "images", "remove", "--sync", reference])

    def conversion(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the command of ``ctr-remote images`` that converts, with its options."""
        return ("convert", "--estargz", "--oci")

    def serving(self, host: OwnContainerd, registry: RegistryHost) -> AbstractContextManager[None]:
        """Run the snapshotter's daemon."""
        root = host.proxy_root(self.name)
        config = host.state / f"{self.name}.toml"
        config.write_text(_CONFIG)
        options = ("--address", host.proxy_socket(self.name), "--root", root, "--config", config)
        return host.serving(self.name, ["containerd-stargz-grpc", "--log-level", "info", *options])

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Pull metadata; the daemon fetches each layer's table of contents."""
        options = (
            *host.plain_http(reference),
            "--use-containerd-labels",
            "--snapshotter",
            self.snapshotter or self.name,
        )
        words = ["ctr-remote", *host.ctr[1:], "images", "rpull", *options, reference]
        run(words, timeout_s=_PULL_TIMEOUT_S, environment=host.environment)

    def versions(self) -> dict[str, str]:
        """Return the versions of client and daemon."""
        return {
            "ctr-remote": first_line("dpkg-query", "-W", "-f", "${Version}", "stargz-snapshotter"),
            "containerd-stargz-grpc": first_line("containerd-stargz-grpc", "--version"),
        }


class StargzZstd(Stargz):
    """zstd:chunked: the same with zstd in place of gzip, as obdlab's own compression is."""

    name: ClassVar[str] = "stargz-zstd"
    title: ClassVar[str] = "stargz with zstd:chunked"

    def tag(self, source: Source) -> str:
        """Return the tag of the converted image."""
        return f"{source.identity}-zstdchunked1"

    def conversion(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the command of ``ctr-remote images`` that converts, with its options."""
        return ("convert", "--zstdchunked", "--oci")


class StargzRecorded(Stargz):
    """eStargz optimized by its own recorder: files that one start opened come first, and are prefetched."""

    name: ClassVar[str] = "stargz-recorded"
    title: ClassVar[str] = "stargz with a recorded start"
    recorded: ClassVar[bool] = True

    def tag(self, source: Source) -> str:
        """Return the tag of the optimized image."""
        return f"{source.identity}-estargz-recorded2"

    def conversion(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the command of ``ctr-remote images`` that records a start and converts, with its options."""
        probe, config = recipe.probe, recipe.config
        period = ("--period", f"{probe.timeout_s:.0f}", "--wait-on-line", probe.ready_line)
        command = probe.command or (*config.entrypoint, *config.command)
        # The recorder looks for the line in standard output alone; without it, it records for the whole period.
        merged = json.dumps(["/bin/sh", "-c", 'exec "$@" 2>&1', "sh", *command])
        return ("optimize", "--oci", *period, *(("--entrypoint", merged, "--args", "[]") if command else ()))


@contextmanager
def fetched(host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> Iterator[str]:
    """Fetch the image as built into containerd's content store for tools that convert it; yield its reference."""
    plain = reference.rpartition(":")[0] + ":" + source.identity
    push_layout(source.layout, client, Reference.parse(plain))
    run([*host.ctr, "content", "fetch", "--plain-http", plain], timeout_s=_PULL_TIMEOUT_S)
    try:
        yield plain
    finally:
        host.remove_image(plain)
