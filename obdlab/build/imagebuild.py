"""A whole build: the stages that the target needs, and the new image at its destination.

The base's layers stay where they are: devices read of them what steps need, and a registry that has them in another
repository is asked to mount them. New layers are packed and stored while later steps run.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.build.bases import BaseImage, empty_layer, open_base
from obdlab.build.committing import Committer
from obdlab.build.copying import Tree
from obdlab.build.imagesettings import ImageSettings
from obdlab.build.layerstore import LayerStore
from obdlab.build.publishing import NewImage, publish
from obdlab.build.stagebuild import Built, Options, StageBuild, Step, Surroundings
from obdlab.build.stagedisk import StageDisk
from obdlab.build.stages import SCRATCH, Stage, Stages, stages_of
from obdlab.convert.workdir import work_directory
from obdlab.formats import oci
from obdlab.image.config import LowerConfig
from obdlab.layerfiles.writing import Packing
from obdlab.registry.platform import host_platform
from obdlab.server.capture.directories import place_for_start
from obdlab.system.abi import own_mounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.build.dockerfile import Dockerfile, Instruction
    from obdlab.build.layerstore import LayerBlob
    from obdlab.convert.endpoints.endpoint import ImageDestination
    from obdlab.convert.progress import Progress
    from obdlab.registry.client import RegistryClient
    from obdlab.server.client import DeviceService

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of a build. Sizes in bytes."""

    steps: Options = field(default_factory=Options)
    target: str = ""
    #: Of the bases and the new image; None: this machine's.
    platform: oci.Platform | None = None
    packing: Packing = field(default_factory=lambda: Packing(tar=True))
    #: Size of the disk of an image from scratch; others have their base's.
    virtual_size: int = 64 * _GIB
    #: Give layers hash trees, by which readers check them, if the destination is a registry.
    hash_trees: bool = True
    #: The time that the image says it was created at, in RFC 3339.
    created: str = ""
    work_dir: Path = Path("/var/tmp")
    #: Where layers are kept for later builds, and their most bytes.
    cache_dir: Path = Path("/var/lib/obdlab/build")
    cache_quota: int = 10 * _GIB


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """The new image: the descriptor of its manifest, the steps, and the time that each phase took, in seconds."""

    name: str
    descriptor: oci.Descriptor
    layers: int
    new_layers: int
    new_size: int
    #: Bytes that were read of the base's layers, and those of layers that had to be copied to the destination.
    base_read: int
    base_size: int
    steps: tuple[Step, ...]
    seconds: dict[str, float]


def build_image(
    file: Dockerfile,
    context: Tree,
    destination: ImageDestination,
    client: RegistryClient,
    service: DeviceService,
    options: BuildOptions,
    *,
    output: int,
    say: Callable[[str], None],
    progress: Progress,
) -> BuiltImage:
    """Build the image of a Dockerfile and store it at ``destination``, its manifest last.

    Needs root. Gives this thread a mount namespace of its own. Output of commands goes to the descriptor ``output``.
    Raises BuildError with file and line for a step that fails, and errors of registries, devices and files. At the
    end, also after an error, nothing is mounted, attached or left in the work directory.
    """
    began = time.monotonic()
    platform = options.platform or host_platform()
    stages = stages_of(file, options.steps.arguments, platform)
    needed = stages.needed(options.target)
    service.check_place()
    service.start_host()  # it must not live in this thread's namespace
    own_mounts()
    with ExitStack() as ending:
        kept = ending.enter_context(LayerStore(options.cache_dir))
        place = ending.enter_context(place_for_start(service.run_dir, "build"))
        work = ending.enter_context(work_directory(options.work_dir))

        def store(blob: LayerBlob) -> None:
            destination.put_file(oci.Descriptor(oci.OCI_LAYER, blob.digest, blob.size), blob.path, lambda _: None)

        committer = ending.enter_context(Committer(kept, options.packing, store))
        build = _Build(stages, client, service, committer, kept, options, platform, place, work, ending)
        around = Surroundings(
            options=options.steps,
            context=context,
            escape=file.escape,
            place=place,
            kept=kept,
            committer=committer,
            created=options.created,
            output=output,
            say=say,
            global_variables=stages.variables,
            tree_of=build.tree_of,
            open_disk=build.writable_disk,
            uuid_of=lambda built: "" if built.base is None else built.base.top_uuid(),
        )
        built = build.run(needed, around)
        steps_done = time.monotonic()
        committer.wait()
        waited = time.monotonic()
        new = [layer.blob.result() for layer in built.layers]
        image = NewImage(built.base, tuple(new), built.settings, tuple(built.history), options.created, platform)
        descriptor = publish(image, destination, work, hash_trees=options.hash_trees, progress=progress)
        base_read = sum(disk.bytes_fetched() for disk in build.disks)
        ended = time.monotonic()
    with LayerStore(options.cache_dir) as kept:
        kept.prune(options.cache_quota)
    of_base = () if built.base is None else built.base.manifest.layers
    return BuiltImage(
        name=destination.name,
        descriptor=descriptor,
        layers=len(of_base) + len(new),
        new_layers=len(new),
        new_size=sum(blob.size for blob in new),
        base_read=base_read,
        base_size=sum(layer.size for layer in of_base),
        steps=tuple(build.steps),
        seconds={
            "bases": build.bases_s,
            "steps": steps_done - began - build.bases_s,
            "seal": sum(step.seal_s for step in build.steps),
            "commit": committer.pack_s,
            "store": committer.store_s,
            "commit_and_store_after_steps": waited - steps_done,
            "publish": ended - waited,
            "total": time.monotonic() - began,
        },
    )


class _Build:
    def __init__(
        self,
        stages: Stages,
        client: RegistryClient,
        service: DeviceService,
        committer: Committer,
        kept: LayerStore,
        options: BuildOptions,
        platform: oci.Platform,
        place: Path,
        work: Path,
        ending: ExitStack,
    ) -> None:
        self._stages = stages
        self._client = client
        self._service = service
        self._committer = committer
        self._kept = kept
        self._options = options
        self._platform = platform
        self._place = place
        self._work = work
        self._ending = ending
        self._built: dict[int, Built] = {}
        self._bases: dict[str, BaseImage] = {}
        self._looked_into: dict[str, StageDisk] = {}
        self.disks: list[StageDisk] = []
        self.steps: list[Step] = []
        self.bases_s = 0.0

    def run(self, needed: list[Stage], around: Surroundings) -> Built:
        last = needed[-1]
        published = self._lineage(last)
        for stage in needed:
            around.say(f"{stage.begin.place} {stage.begin.source}")
            is_published = stage.number in published
            built = self._begin(stage, around.escape, publish=is_published)
            self._built[stage.number] = built
            build = StageBuild(around, built, stage.number, publish=is_published)
            build.run(stage.instructions)
            self.steps += build.steps
        return self._built[last.number]

    # Layers of the other stages are no part of the image.
    def _lineage(self, stage: Stage) -> set[int]:
        found = {stage.number}
        while stage.parent is not None:
            stage = self._stages.all[stage.parent]
            found.add(stage.number)
        return found

    def _begin(self, stage: Stage, escape: str, *, publish: bool) -> Built:
        if stage.parent is not None:
            parent = self._built[stage.parent]
            settings = ImageSettings(parent.settings.document, escape)
            settings.author = parent.settings.author
            return Built(parent.base, settings, parent.key, list(parent.layers), list(parent.history))
        if stage.base == SCRATCH:
            blob = empty_layer(self._kept, self._work, self._options.virtual_size)
            layer = self._committer.add_finished(blob, publish=publish)
            history = [{"created": self._options.created, "created_by": "FROM scratch", "comment": "obdlab"}]
            return Built(None, ImageSettings(escape=escape), blob.digest, [layer], history)
        base = self._base(stage.base, stage.begin)
        document = base.config.document.get("config") or {}
        if document.get("OnBuild"):
            raise stage.begin.error(f"{stage.base}: the image has triggers (ONBUILD), which are not supported")
        return Built(base, ImageSettings(document, escape), base.digest)

    def _base(self, name: str, instruction: Instruction) -> BaseImage:
        if name not in self._bases:
            began = time.monotonic()
            self._bases[name] = open_base(name, instruction, self._client, self._platform)
            self.bases_s += time.monotonic() - began
        return self._bases[name]

    # -- disks -------------------------------------------------------------------------------------------------------

    def writable_disk(self, built: Built) -> StageDisk:
        self._committer.start()
        return self._disk(built.base, [LowerConfig(file=str(layer.path)) for layer in built.layers], writable=True)

    def _disk(self, base: BaseImage | None, lowers: list[LowerConfig], *, writable: bool) -> StageDisk:
        below = () if base is None else base.lowers
        url = "" if base is None else base.repo_blob_url
        number = len(self.disks)
        disk = StageDisk(self._service, self._place, self._work, number, (*below, *lowers), url, writable=writable)
        self.disks.append(self._ending.enter_context(disk))
        return disk

    def tree_of(self, instruction: Instruction, number: int) -> tuple[str, Callable[[], Tree]]:
        name = instruction.flag("from")
        stage = self._stages.find(name, number)
        if stage is not None:
            built = self._built[stage.number]
            return built.key, lambda: self._tree_of_stage(built)
        if name.isdecimal() or self._stages.find(name) is not None:
            raise instruction.error(f"--from={name}: not an earlier stage")
        base = self._base(name, instruction)
        return base.digest, lambda: self._tree_of_image(name, base)

    def _tree_of_stage(self, built: Built) -> Tree:
        if built.disk is None:
            lowers = [LowerConfig(file=str(layer.path)) for layer in built.layers]
            built.disk = self._disk(built.base, lowers, writable=False)
        return Tree(built.disk.inside, is_image=True)

    def _tree_of_image(self, name: str, base: BaseImage) -> Tree:
        if name not in self._looked_into:
            self._looked_into[name] = self._disk(base, [], writable=False)
        return Tree(self._looked_into[name].inside, is_image=True)
