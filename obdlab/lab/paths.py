"""The directories of experiments on this host."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.lab.images.builder import DEFAULT_WORK_DIR, BuiltImage, build_image
from obdlab.lab.images.recipe import find_recipe
from obdlab.lab.testbed.process import LabError
from obdlab.lab.workbench import dataset_folders

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class LabPaths:
    """The directories and demands of an experiment that outlive it."""

    #: Directories that hold ``<name>/recipe.toml``.
    datasets: tuple[Path, ...] = field(default_factory=dataset_folders)
    images: Path = DEFAULT_WORK_DIR
    #: The registry's storage and containerd's directories; on a real disk.
    work: Path = Path("/var/lib/obdlab/lab")
    #: Images must hold the packages of their recipe's lock.
    locked: bool = False
    #: Demanded digests by image name; an image without an entry may have any digest.
    digests: Mapping[str, str] = field(default_factory=dict)

    def image(self, name: str, say: Callable[[str], None], *, pin: str = "") -> BuiltImage:
        """Return the image of a recipe, preferably the one with the digest ``pin``; build it if there is no image.

        Raises LabError if ``digests`` demands another digest, and the errors of ``build_image``.
        """
        demanded = self.digests.get(name, "")
        recipe = find_recipe(name, self.datasets)
        image = build_image(recipe, self.images, say, pin=demanded or pin, locked=self.locked)
        if demanded and image.digest != demanded:
            raise LabError(f"image {name}: got {image.digest} (wanted {demanded}, which is not in {self.images})")
        return image
