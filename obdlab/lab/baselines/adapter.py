"""What an adapter does: publish an image in its own form, pull it, start a container of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from obdlab.errors import ObdlabError
from obdlab.lab.process import LabError, run
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from obdlab.lab.containerd import OwnContainerd, RunningContainer
    from obdlab.lab.recipe import Probe, Recipe
    from obdlab.registry.client import RegistryClient


@dataclass(frozen=True, slots=True)
class Source:
    """A built image about to be published, and how obdlab's own form of it is to be compressed."""

    recipe: Recipe
    layout: Path
    algorithm: str
    block_size: int


class Adapter(Protocol):
    """One way to start containers. It has no state: what it needs to know is on the host."""

    #: Its name in declarations and rows.
    name: ClassVar[str]
    #: Programs it needs, with the Debian package that has each.
    programs: ClassVar[dict[str, str]]

    def tag(self, source: Source) -> str:
        """Return the tag that this form of an image is kept under: it changes with anything that changes the form."""

    def publish(self, source: Source, client: RegistryClient, reference: str) -> None:
        """Put this form of the image into the experiment's registry, over a link that is not shaped."""

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
    missing = [f"{name} (apt-get install {deb})" for name, deb in adapter.programs.items() if not shutil.which(name)]
    if missing:
        raise LabError(f"{adapter.name}: not installed: {', '.join(missing)}")


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
