"""One stage: its instructions in order, as layers on its base and as settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from obdlab.build.copying import Copier, Tree, digest_of
from obdlab.build.expansion import ExpansionError, expand_document
from obdlab.build.inside import Inside, Ownership
from obdlab.build.localarchive import is_archive, unpack
from obdlab.build.runstep import HOST, NETWORKS, NONE, Command, Secret, run, secret_of
from obdlab.build.stages import PROXIES
from obdlab.errors import DeviceError, FormatError
from obdlab.server.capture.containerbundle import user_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from obdlab.build.bases import BaseImage
    from obdlab.build.committing import Committer, Layer
    from obdlab.build.dockerfile import Heredoc, Instruction
    from obdlab.build.imagesettings import ImageSettings
    from obdlab.build.layerstore import LayerStore
    from obdlab.build.stagedisk import StageDisk

# Raised by each change that makes another layer of the same step.
_VERSION = 1
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|git@", re.ASCII | re.IGNORECASE)
_OWNER = re.compile(r"[^:\s]+(?::[^:\s]+)?")


@dataclass(frozen=True, slots=True)
class Options:
    """Inputs of a build's steps beside the Dockerfile."""

    arguments: Mapping[str, str] = field(default_factory=dict)
    network: str = NONE
    secrets: Mapping[str, Path] = field(default_factory=dict)
    use_cache: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was done: the instruction, whether its layer was in the cache, and the seconds it took."""

    place: str
    source: str
    cached: bool
    seconds: float
    seal_s: float


@dataclass(slots=True)
class Built:
    """A stage as far as it is built. ``layers`` lie on those of the base."""

    base: BaseImage | None
    settings: ImageSettings
    key: str
    layers: list[Layer] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    disk: StageDisk | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The parts that all stages of a build have in common."""

    options: Options
    context: Tree
    escape: str
    #: In the run directory, in memory, and for large files.
    place: Path
    kept: LayerStore
    committer: Committer
    created: str
    #: Where the output of commands goes.
    output: int
    say: Callable[[str], None]
    global_variables: Mapping[str, str | None]
    #: Returns a key of the content that COPY --from names, and a function that opens its tree.
    tree_of: Callable[[Instruction, int], tuple[str, Callable[[], Tree]]]
    #: Returns the mounted, writable disk of a stage.
    open_disk: Callable[[Built], StageDisk]
    #: Returns the UUID of the topmost layer of a stage's base.
    uuid_of: Callable[[Built], str]


class StageBuild:
    """Follows the instructions of stage ``number`` on ``built``, which starts as its base."""

    def __init__(self, around: Surroundings, built: Built, number: int, *, publish: bool) -> None:
        self._around = around
        self._built = built
        self._number = number
        self._publish = publish
        #: Working directories that do not have to exist yet: (path, user).
        self._directories: list[tuple[str, str]] = []
        self._inline: list[Inside] = []
        self.steps: list[Step] = []

    def run(self, instructions: Sequence[Instruction]) -> None:
        """Follow all instructions. Raises BuildError with file and line, and errors of devices and registries."""
        try:
            for instruction in instructions:
                try:
                    self._follow(instruction)
                except (OSError, FormatError, DeviceError) as error:
                    raise instruction.error(_reason(error)) from error
            if self._directories:
                self._step(instructions[-1], self._key("directories"), lambda disk: None, note=False)
        finally:
            for each in self._inline:
                each.close()

    def _follow(self, instruction: Instruction) -> None:
        settings = self._built.settings
        match instruction.name:
            case "RUN":
                self._run(instruction)
                return
            case "COPY" | "ADD":
                self._copy(instruction)
                return
            case "ARG":
                settings.declare(instruction, self._around.options.arguments, self._around.global_variables)
            case "WORKDIR":
                path = settings.absolute(settings.expanded(instruction, instruction.text)).rstrip("/") or "/"
                settings.document["WorkingDir"] = path
                if path != "/":
                    self._directories.append((path, settings.user))
            case _:
                settings.apply(instruction)
        self._note(instruction, empty=True)

    # -- steps that make layers --------------------------------------------------------------------------------------

    def _run(self, instruction: Instruction) -> None:
        options, settings = self._around.options, self._built.settings
        network = instruction.flag("network") or options.network
        network = options.network if network == "default" else network
        if network not in NETWORKS:
            raise instruction.error(f"--network: got {network!r}, wanted default, {NONE} or {HOST}")
        if network == HOST and options.network != HOST:
            raise instruction.error(f"--network={HOST} must be allowed for the whole build, by the same option")
        mounts = [value for name, value in instruction.flags if name == "mount"]
        found = [secret_of(instruction, value, options.secrets) for value in mounts]
        words = self._command(instruction)
        config = settings.for_run({})
        key = self._key("run", words, config, network, mounts)
        proxies = {name: value for name, value in options.arguments.items() if name in PROXIES}
        command = Command(
            words, settings.for_run(proxies), network == HOST, [each for each in found if isinstance(each, Secret)]
        )

        def act(disk: StageDisk) -> None:
            place = self._around.place / "run"
            status = run(command, disk, place, self._around.output)
            if status:
                hint = "" if network == HOST else f" (it had no network: --network {HOST} gives it the host's)"
                raise instruction.error(f"its command ended with status {status}{hint}")

        self._step(instruction, key, act)

    # A command that is a here-document alone is a script for the shell; else the shell reads it with the command.
    def _command(self, instruction: Instruction) -> list[str]:
        settings = self._built.settings
        if not instruction.heredocs:
            return settings.command_words(instruction)
        if re.fullmatch(r"""<<-?["']?\w[\w.]*["']?""", instruction.text):
            return settings.command_words(instruction, instruction.heredocs[0].text)
        documents = "".join(f"{each.text}{each.name}\n" for each in instruction.heredocs)
        return settings.command_words(instruction, f"{instruction.text}\n{documents}")

    def _copy(self, instruction: Instruction) -> None:
        adds = instruction.name == "ADD"
        settings, around = self._built.settings, self._around
        words = settings.words(instruction)
        if len(words) < 2:
            raise instruction.error("wants a source and a destination")
        *names, last = words
        target = settings.absolute(last)
        owner_text = settings.expanded(instruction, instruction.flag("chown"))
        if owner_text and _OWNER.fullmatch(owner_text) is None:
            raise instruction.error(f"--chown: got {owner_text!r}, wanted USER or USER:GROUP")
        mode = _mode(instruction, settings.expanded(instruction, instruction.flag("chmod")))
        key_parts: list[object] = [instruction.name, target, owner_text, mode]
        if instruction.flag("from"):
            content, open_tree = around.tree_of(instruction, self._number)
            key_parts += [content, names]
            chosen: list[tuple[Tree, str]] = []
            digest = ""
        else:
            chosen = self._chosen(instruction, names, adds)
            digest = digest_of(chosen)
            key_parts.append(digest)

        def act(disk: StageDisk) -> None:
            sources = chosen
            if instruction.flag("from"):
                tree = open_tree()
                sources = [(tree, path) for name in names for path in tree.select(name, _prefix(instruction))]
            self._copy_to(instruction, disk, sources, target, _owner(instruction, owner_text, disk), mode, digest)

        self._step(instruction, self._key(*key_parts), act)

    def _chosen(self, instruction: Instruction, names: Sequence[str], adds: bool) -> list[tuple[Tree, str]]:
        documents = {each.name: each for each in instruction.heredocs}
        chosen: list[tuple[Tree, str]] = []
        for name in names:
            document = documents.get(name.removeprefix("<<").removeprefix("-")) if name.startswith("<<") else None
            if document is not None:
                chosen.append((self._inline_tree(instruction, document), document.name))
                continue
            if _URL.match(name):
                raise instruction.error(
                    f"{name}: URLs are not fetched" if adds else f"{name}: not a file of the build context"
                )
            chosen += [
                (self._around.context, path) for path in self._around.context.select(name, _prefix(instruction))
            ]
        return chosen

    def _inline_tree(self, instruction: Instruction, document: Heredoc) -> Tree:
        directory = self._around.place / f"inline-{self._number}-{len(self._inline)}"
        directory.mkdir()
        try:
            variables = self._built.settings.variables
            text = (
                expand_document(document.text, variables, self._around.escape) if document.expands else document.text
            )
        except ExpansionError as error:
            raise instruction.error(str(error)) from None
        (directory / document.name).write_bytes(text.encode("utf-8", "surrogateescape"))
        (directory / document.name).chmod(0o644)
        self._inline.append(Inside(directory))
        return Tree(self._inline[-1])

    def _copy_to(
        self,
        instruction: Instruction,
        disk: StageDisk,
        sources: Sequence[tuple[Tree, str]],
        target: str,
        owner: Ownership | None,
        mode: int | None,
        digest: str,
    ) -> None:
        found = disk.inside.status(os.fsencode(target))
        into = target.endswith("/") or (found is not None and stat.S_ISDIR(found.st_mode))
        if len(sources) > 1 and not target.endswith("/"):
            raise instruction.error(f"several sources want a directory that ends with '/' (got {target!r})")
        copier = Copier(disk.inside, owner, mode)
        for tree, path in sources:
            if instruction.name == "ADD" and self._unpacked(tree, path, disk, target, owner):
                continue
            copier.copy(tree, path, target, into=into)
        if digest and instruction.name == "COPY" and copier.digest.hexdigest() != digest:
            raise instruction.error("its sources changed while they were copied")

    def _unpacked(self, tree: Tree, path: str, disk: StageDisk, target: str, owner: Ownership | None) -> bool:
        with closing(tree.entries(path)) as entries:
            entry = next(entries)
            if entry.kind != stat.S_IFREG:
                return False
            descriptor = entry.open()
            try:
                if not is_archive(descriptor, path):
                    return False
                unpack(descriptor, path, disk.inside, target.rstrip("/") or "/", owner)
            finally:
                os.close(descriptor)
        return True

    # -- layers, keys, history ---------------------------------------------------------------------------------------

    def _step(
        self, instruction: Instruction, key: str, act: Callable[[StageDisk], None], *, note: bool = True
    ) -> None:
        built, around = self._built, self._around
        began = time.monotonic()
        around.say(f"{instruction.place} {_short(instruction.source)}")
        found = around.kept.find(key) if around.options.use_cache and built.disk is None else None
        seal_s = 0.0
        if found is not None:
            built.layers.append(around.committer.add_finished(found, publish=self._publish))
            around.say("  cached")
        else:
            if built.disk is None:
                built.disk = around.open_disk(built)
            for path, user in self._directories:
                owner = _owner(instruction, user, built.disk) or Ownership()
                built.disk.inside.make_directories(os.fsencode(path), owner)
            act(built.disk)
            middle = time.monotonic()
            sealed = built.disk.seal()
            seal_s = time.monotonic() - middle
            below = built.layers[-1].path if built.layers else around.uuid_of(built)
            built.layers.append(around.committer.add(sealed, key, below, publish=self._publish))
            around.say(f"  {time.monotonic() - began:.1f} s")
        self._directories = []
        built.key = key
        self.steps.append(
            Step(instruction.place, instruction.source, found is not None, time.monotonic() - began, seal_s)
        )
        self._note(instruction, empty=False, source=None if note else "WORKDIR")

    def _key(self, *parts: object) -> str:
        whole = [_VERSION, self._built.key, self._directories, *parts]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()

    # Values of ARG are no part of it, unlike Docker's: they may be secrets.
    def _note(self, instruction: Instruction, *, empty: bool, source: str | None = None) -> None:
        entry: dict[str, Any] = {"created": self._around.created, "created_by": source or instruction.source}
        if empty:
            entry["empty_layer"] = True
        self._built.history.append(entry | {"comment": "obdlab"})


def _prefix(instruction: Instruction) -> str:
    return f"{instruction.place}: {instruction.name}"


def _mode(instruction: Instruction, text: str) -> int | None:
    if not text:
        return None
    if re.fullmatch(r"[0-7]{3,4}", text, re.ASCII) is None:
        raise instruction.error(f"--chmod: got {text!r}, wanted an octal mode such as 755")
    return int(text, 8)


# Without a group, the group has the number of the user, as in Docker.
def _owner(instruction: Instruction, text: str, disk: StageDisk) -> Ownership | None:
    if not text:
        return None
    try:
        uid, gid, _ = user_of(text, disk.root)
    except DeviceError as error:
        raise instruction.error(str(error)) from None
    return Ownership(uid, gid if ":" in text else uid)


def _reason(error: OSError | FormatError | DeviceError) -> str:
    if isinstance(error, OSError):
        name = error.filename
        shown = os.fsdecode(name) if isinstance(name, bytes) else name
        return f"{shown}: {error.strerror}" if shown else str(error.strerror or error)
    return str(error)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:97]}..."
