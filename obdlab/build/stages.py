"""The stages of a Dockerfile, and which of them a target needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.build.dockerfile import BuildError
from obdlab.build.imagesettings import ImageSettings
from obdlab.registry.platform import host_platform

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from obdlab.build.dockerfile import Dockerfile, Instruction
    from obdlab.formats.oci import Platform

#: The base that is an empty file system.
SCRATCH = "scratch"
#: Variables for commands alone: they need no ARG, and are no part of a step's key.
PROXIES = frozenset(
    name
    for each in ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")
    for name in (each, each.upper())
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A FROM and the instructions after it."""

    number: int
    name: str
    #: An image's name, "scratch", or "" for a stage on top of the stage ``parent``.
    base: str
    parent: int | None
    begin: Instruction
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Stages:
    """All stages, and the global variables, with None for those that are declared without a value."""

    all: tuple[Stage, ...]
    variables: Mapping[str, str | None]

    def find(self, name: str, before: int | None = None) -> Stage | None:
        """Return the stage of a name or number, of those before the stage number ``before``."""
        earlier = self.all[: len(self.all) if before is None else before]
        named = [stage for stage in earlier if stage.name == name.lower() and stage.name]
        if named:
            return named[-1]
        if name.isdecimal() and name.isascii() and int(name) < len(earlier):
            return earlier[int(name)]
        return None

    def needed(self, target: str) -> list[Stage]:
        """Return the stages that ``target`` needs, in order, itself last; "" is the last stage. Raises BuildError."""
        last = self.find(target) if target else self.all[-1]
        if last is None:
            known = ", ".join(stage.name or str(stage.number) for stage in self.all)
            raise BuildError(f"target {target!r}: no such stage (wanted one of {known})")
        wanted, pending = set(), [last]
        while pending:
            stage = pending.pop()
            if stage.number in wanted:
                continue
            wanted.add(stage.number)
            if stage.parent is not None:
                pending.append(self.all[stage.parent])
            for instruction in stage.instructions:
                if instruction.name == "COPY" and instruction.flag("from"):
                    found = self.find(instruction.flag("from"), stage.number)
                    if found is not None:
                        pending.append(found)
        return [stage for stage in self.all if stage.number in wanted]


def stages_of(file: Dockerfile, given: Mapping[str, str], platform: Platform) -> Stages:
    """Return the stages of a Dockerfile, with the variables in its FROMs replaced. Raises BuildError."""
    variables: dict[str, str | None] = dict(_platform_variables(platform))
    top = ImageSettings(escape=file.escape)
    stages: list[Stage] = []
    bodies: list[list[Instruction]] = []
    for instruction in file.instructions:
        if instruction.name == "FROM":
            stages.append(_stage(instruction, top, variables, stages))
            bodies.append([])
        elif bodies:
            bodies[-1].append(instruction)
        elif instruction.name == "ARG":
            top.arguments = _set(variables)
            for name, default in top.argument_pairs(instruction):
                variables[name] = given.get(name, default)
        else:
            raise instruction.error("stands before the first FROM (wanted ARG or FROM)")
    if not stages:
        raise file.instructions[-1].error("no FROM after it")
    whole = (
        Stage(each.number, each.name, each.base, each.parent, each.begin, tuple(body))
        for each, body in zip(stages, bodies, strict=True)
    )
    return Stages(tuple(whole), variables)


def unused_arguments(file: Dockerfile, given: Mapping[str, str]) -> list[str]:
    """Return the names of values given for the build that no ARG declares."""
    declared = set(PROXIES)
    for instruction in file.instructions:
        if instruction.name == "ARG":
            declared |= {name for name, _ in ImageSettings(escape=file.escape).argument_pairs(instruction)}
    return sorted(set(given) - declared)


def _stage(
    instruction: Instruction, top: ImageSettings, variables: Mapping[str, str | None], earlier: Sequence[Stage]
) -> Stage:
    top.arguments = _set(variables)
    words = top.words(instruction)
    if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS") or not words[0]:
        raise instruction.error(f"got {instruction.text!r}, wanted IMAGE or IMAGE AS NAME")
    wanted = top.expanded(instruction, instruction.flag("platform"))
    own = variables["TARGETPLATFORM"]
    if wanted and wanted != own:
        raise instruction.error(f"--platform: another than the build's (got {wanted}, wanted {own})")
    name = words[2].lower() if len(words) == 3 else ""
    known = Stages(tuple(earlier), variables)
    if name and (name.isdecimal() or any(stage.name == name for stage in earlier)):
        raise instruction.error(f"not a new name of a stage (got {name!r})")
    parent = next((stage for stage in earlier if stage.name and stage.name == words[0].lower()), None)
    if parent is not None:
        return Stage(len(known.all), name, "", parent.number, instruction, ())
    return Stage(len(known.all), name, words[0], None, instruction, ())


def _set(variables: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if value is not None}


def _platform_variables(target: Platform) -> dict[str, str]:
    found: dict[str, str] = {}
    for prefix, platform in (("TARGET", target), ("BUILD", host_platform())):
        parts = [platform.os, platform.architecture, *([platform.variant] if platform.variant else [])]
        found |= {
            f"{prefix}PLATFORM": "/".join(parts),
            f"{prefix}OS": platform.os,
            f"{prefix}ARCH": platform.architecture,
            f"{prefix}VARIANT": platform.variant,
        }
    return found
