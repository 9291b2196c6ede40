"""The base class of adapters: publish an image in the adapter's form, pull it, start a container of it."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from obdlab.errors import ObdlabError
from obdlab.lab.testbed.process import LabError, run
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from obdlab.lab.images.builder import BuiltImage
    from obdlab.lab.images.recipe import Probe, Recipe
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.lab.testbed.registry import RegistryHost
    from obdlab.lab.testbed.startedcontainer import RunningContainer
    from obdlab.registry.client import RegistryClient


@dataclass(frozen=True, slots=True)
class Source:
    """A built image to publish, with the compression of obdlab's form and the readahead of recorded starts."""

    image: BuiltImage
    algorithm: str
    block_size: int
    readahead_kib: int

    @property
    def recipe(self) -> Recipe:
        """The recipe that the image was built from."""
        return self.image.recipe

    @property
    def layout(self) -> Path:
        """The image's OCI layout directory."""
        return self.image.layout

    @property
    def identity(self) -> str:
        """16 hex digits of the image's digest; the tag of every form begins with them."""
        return self.image.digest.removeprefix("sha256:")[:16]


class Adapter(Protocol):
    """One way to start containers. Adapters hold no state; all state is on the host."""

    #: The adapter's name in declarations and rows.
    name: ClassVar[str]
    #: A noun phrase for sentences in reports.
    title: ClassVar[str] = ""
    #: Programs that the adapter needs. The value is a Debian package, or an instruction (it holds a space).
    programs: ClassVar[dict[str, str]]
    #: True for a proxy snapshotter, whose daemon :meth:`serving` starts.
    proxy: ClassVar[bool] = False
    #: True if references must name the registry's TLS host.
    secure: ClassVar[bool] = False
    #: True if the published image holds a recorded start: a ratio to an arm without one is mixed.
    recorded: ClassVar[bool] = False
    #: True if the snapshotter goes on fetching after a container is ready.
    background: ClassVar[bool] = False
    #: True if a warm start finds its data as blocks of a device, so that the files of :meth:`layers` are not cached.
    cached_above: ClassVar[bool] = False
    #: Estimates as shares of the image's compressed size: storage on the registry, most storage on the host, and
    #: bytes that a cold start fetches.
    registry_share: ClassVar[float] = 1.2
    host_share: ClassVar[float] = 1.2
    start_share: ClassVar[float] = 0.4

    def tag(self, source: Source) -> str:
        """Return the tag of this form of an image; it changes with everything that changes the form."""

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Store this form of the image in the experiment's registry, over a link that is not shaped.

        ``reference`` names the registry by the host that speaks plain HTTP.
        """

    def serving(self, host: OwnContainerd, registry: RegistryHost) -> AbstractContextManager[None]:
        """Run the daemon that only this adapter's cells need; its start is not timed."""
        return nullcontext()

    def pull(self, host: OwnContainerd, reference: str) -> None:
        """Pull the image so that a container can be started; timed as ``pull_s``."""

    def running(
        self, host: OwnContainerd, reference: str, name: str, probe: Probe
    ) -> AbstractContextManager[RunningContainer]:
        """Start a container, wait until it is ready, and remove it at the end."""

    def remove(self, host: OwnContainerd, reference: str) -> None:
        """Remove the image from the host."""

    def layers(self, host: OwnContainerd) -> Path:
        """Return the directory with the data of pulled images."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the measured programs, for the rows' environment."""


def check_programs(what: str, programs: Mapping[str, str]) -> None:
    """Raise LabError naming those of ``programs`` (each with its origin) that this host lacks."""
    if missing := _missing(programs):
        lacking = ", ".join(f"{name} ({fix})" for name, fix in missing.items())
        raise LabError(f"{what}: not installed: {lacking}")


def missing_programs(adapter: Adapter) -> dict[str, str]:
    """Return the programs that an adapter needs and this host lacks, each with the command that installs it."""
    return _missing(adapter.programs)


def _missing(programs: Mapping[str, str]) -> dict[str, str]:
    return {name: how_to_install(of) for name, of in programs.items() if not shutil.which(name)}


def how_to_install(origin: str) -> str:
    """Return the command that installs a program, from its value in ``Adapter.programs``."""
    return origin if " " in origin else f"apt-get install {origin}"


def first_line(*command: str) -> str:
    """Return the first line of a program's output; '' if the program cannot be run."""
    try:
        return (run(command, timeout_s=10).strip().splitlines() or [""])[0]
    except LabError:
        return ""


def is_published(client: RegistryClient, reference: str) -> bool:
    """Return True if the registry has a manifest for the reference."""
    try:
        client.get_manifest(Reference.parse(reference))
    except ObdlabError:
        return False
    return True
