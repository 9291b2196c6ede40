"""What an adapter does: publish an image in its own form, pull it, start a container of it.

Adapters inherit from :class:`Adapter`, which has what most of them have in common.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from obdlab.errors import ObdlabError
from obdlab.lab.process import LabError, run
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from obdlab.lab.build import BuiltImage
    from obdlab.lab.containerd import OwnContainerd, RunningContainer
    from obdlab.lab.recipe import Probe, Recipe
    from obdlab.lab.registry import RegistryHost
    from obdlab.registry.client import RegistryClient


@dataclass(frozen=True, slots=True)
class Source:
    """A built image about to be published, how obdlab's own form of it is to be compressed, its starts recorded."""

    image: BuiltImage
    algorithm: str
    block_size: int
    readahead_kib: int

    @property
    def recipe(self) -> Recipe:
        """What the image was built from."""
        return self.image.recipe

    @property
    def layout(self) -> Path:
        """Its OCI layout directory."""
        return self.image.layout

    @property
    def identity(self) -> str:
        """16 hex digits of its digest, which begin the tag of every form of it."""
        return self.image.digest.removeprefix("sha256:")[:16]


class Adapter(Protocol):
    """One way to start containers. It has no state: what it needs to know is on the host."""

    #: Its name in declarations and rows.
    name: ClassVar[str]
    #: What it is, for a sentence.
    title: ClassVar[str] = ""
    #: Programs it needs, with what installs each: a Debian package, or words that hold a space.
    programs: ClassVar[dict[str, str]]
    #: Whether it is a snapshotter whose daemon :meth:`serving` starts.
    proxy: ClassVar[bool] = False
    #: Whether its references are to name the registry by the host that speaks TLS.
    secure: ClassVar[bool] = False
    #: Whether it goes on fetching by itself once a container is ready.
    background: ClassVar[bool] = False
    #: Estimates, as shares of the image's compressed size: what its form adds to the registry, what it takes on the
    #: host at most, and what a cold start fetches.
    registry_share: ClassVar[float] = 1.2
    host_share: ClassVar[float] = 1.2
    start_share: ClassVar[float] = 0.4

    def tag(self, source: Source) -> str:
        """Return the tag that this form of an image is kept under: it changes with anything that changes the form."""

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Put this form of the image into the experiment's registry, over a link that is not shaped.

        ``reference`` names the registry by the host that speaks plain HTTP.
        """

    def serving(self, host: OwnContainerd, registry: RegistryHost) -> AbstractContextManager[None]:
        """Have running what cells of this adapter need and others must not meet; not timed."""
        return nullcontext()

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Do what comes before a container can be started; timed as ``pull_s``."""

    def running(
        self, host: OwnContainerd, reference: str, name: str, probe: Probe
    ) -> AbstractContextManager[RunningContainer]:
        """Start a container, wait until it is ready, and remove it at the end."""

    def remove(self, host: OwnContainerd, reference: str) -> None:
        """Remove the image from the host."""

    def layers(self, host: OwnContainerd) -> Path:
        """Return where the data of pulled images is."""

    def versions(self) -> dict[str, str]:
        """Return the versions of what is measured, for the rows' environment."""


def check_programs(adapter: Adapter) -> None:
    """Raise LabError naming the programs that an adapter needs and this host does not have."""
    missing = missing_programs(adapter)
    if missing:
        told = ", ".join(f"{name} ({fix})" for name, fix in missing.items())
        raise LabError(f"{adapter.name}: not installed: {told}")


def missing_programs(adapter: Adapter) -> dict[str, str]:
    """Return the programs that an adapter needs and this host does not have, with what installs each."""
    return {name: how_to_install(of) for name, of in adapter.programs.items() if not shutil.which(name)}


def how_to_install(origin: str) -> str:
    """Return the command that brings a program, by what ``Adapter.programs`` says of it."""
    return origin if " " in origin else f"apt-get install {origin}"


def first_line(*command: str) -> str:
    """Return the first line of what a program prints, '' if it cannot be run."""
    try:
        return (run(command, timeout_s=10).strip().splitlines() or [""])[0]
    except LabError:
        return ""


def is_published(client: RegistryClient, reference: str) -> bool:
    """Tell whether the registry has a manifest of that name."""
    try:
        client.get_manifest(Reference.parse(reference))
    except ObdlabError:
        return False
    return True
