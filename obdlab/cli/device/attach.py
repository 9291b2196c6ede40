"""``obdlab device attach``, ``detach`` and ``list``: images as block devices, without mounting them."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import (
    add_device_option,
    add_registry_options,
    add_runtime_options,
    add_trace_option,
    device_service_from,
    registry_from,
)
from obdlab.cli.numbers import real
from obdlab.errors import DeviceError, ObdlabError, SourceError
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from obdlab.image.config import ImageConfig
    from obdlab.server.client import AttachedDevice, DeviceService

SOURCE_HELP = (
    "image reference; or the path of a config.v1.json; or paths of local layers, bottom first (separate arguments or "
    "joined by commas)"
)
TIMEOUT_HELP = "wait so many seconds, for a registry that does not answer too, then give up (default: %(default)g)"
#: Below the run directory: configurations made for images that are given without one.
_IMAGES = "images"
_CONFIG = "config.v1.json"
#: Transient states (``DeviceState``).
_PASSING = ("without keeper", "restarting")
#: A listing reports requests that have been under way for longer.
_LONG_WAIT_S = 5.0
#: Time left for the attach itself, even if waiting for the registry used up the deadline.
LEAST_ATTACH_S = 1.0
#: Between two tries to reach a registry.
_PAUSE_S = 2.0


def declare_attach(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = "Prints the device's node. See also: mount."
    parser.add_argument("source", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--id", help="name of the device (default: made from the image)")
    add_device_option(parser)
    parser.add_argument("--timeout", type=real(above=0), default=150.0, metavar="S", help=TIMEOUT_HELP)
    add_runtime_options(parser)
    add_registry_options(parser)
    add_trace_option(parser)
    parser.set_defaults(run=run_attach)


def declare_detach(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("device", help="its id, or its node such as /dev/loop3")
    add_runtime_options(parser)
    parser.set_defaults(run=run_detach)


def declare_list(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with counters")
    add_runtime_options(parser)
    parser.set_defaults(run=run_list)


def run_attach(args: argparse.Namespace) -> int:
    """Attach; print the node."""
    if args.id == "":
        raise DeviceError("--id: empty (wanted a name; without the option one is made from the image)")
    deadline = time.monotonic() + args.timeout
    config, device_id = config_of(args.source, args)
    service = device_service_from(args)
    try:
        timeout_s = max(LEAST_ATTACH_S, deadline - time.monotonic())
        device = service.attach(config, args.id or device_id, timeout_s=timeout_s)
    except BaseException:
        forget_config(service, config)
        raise
    print(device.path)
    return 0


def run_detach(args: argparse.Namespace) -> int:
    """Detach."""
    from obdlab.devices.usage import STARTS_END_S

    service = device_service_from(args)
    named = next((each for each in service.list() if args.device in (each.device_id, str(each.path))), None)
    missing = DeviceError(f"{args.device}: no device of this run directory ({args.run_dir})")
    if args.device.startswith("/") and named is None:
        raise missing
    device_id = args.device if named is None else named.device_id
    gone = service.detach(device_id, patience_s=STARTS_END_S)
    made = args.run_dir.absolute() / _IMAGES / device_id / _CONFIG
    forget_config(service, made if named is None else named.config)
    if not gone:
        raise missing
    print(f"{device_id}: detached")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """List the devices, one a line."""
    service = device_service_from(args)
    for device in service.list():
        counters = _counters_of(service, device) if device.alive and not device.graduated else {}
        if args.json:
            known = {"id": device.device_id, "path": str(device.path), "size": device.size, "pid": device.pid}
            known |= {"read_only": device.read_only, "config": str(device.config), "alive": device.alive}
            known |= {"kind": device.kind, "keeper_pid": device.keeper_pid, "restarts": device.restarts}
            known |= {"graduated": device.graduated, "state": device.state}
            print(json.dumps(known | counters))
        else:
            mode = "ro" if device.read_only else "rw"
            state = f"pid {device.pid}{_trouble(counters)}" if device.alive else "server dead"
            if device.state in _PASSING:
                state += f"  {device.state}"
            state = "graduated" if device.graduated else state
            what = f"{device.size >> 20} MiB  {mode}  {device.kind}"
            print(f"{device.device_id}  {device.path}  {what}  {state}  {device.config}")
    return 0


# A server that hangs or is being replaced must not keep the other devices from being listed.
def _counters_of(service: DeviceService, device: AttachedDevice) -> dict[str, Any]:
    try:
        return service.statistics(device.device_id)
    except ObdlabError as error:
        return {"unanswered": str(error)}


def _trouble(counters: dict[str, Any]) -> str:
    if "unanswered" in counters:
        return " (does not answer)"
    longest_s = max(counters.get("under_way_s", ()), default=0.0)
    return f" (a request has waited {longest_s:.0f} s)" if longest_s >= _LONG_WAIT_S else ""


def config_of(source: Sequence[str], args: argparse.Namespace) -> tuple[Path, str | None]:
    """Return the image configuration that ``source`` names, and a device id if it was made here.

    Raises DeviceError, ConfigError or the registry's error.
    """
    from obdlab.server.rundir import RunDir

    names = _names(source)
    if _is_config(names):
        return Path(names[0]), None
    config = _made_config(names, args)
    text = json.dumps(config.to_json(), sort_keys=True)
    device_id = f"image-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    run = RunDir(args.run_dir)
    run.create()
    directory = run.path / _IMAGES / device_id
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _CONFIG
    config.save(path)
    return path, device_id


def image_config_of(source: Sequence[str], args: argparse.Namespace) -> ImageConfig:
    """Return the image configuration that ``source`` names; leaves no file. Raises as :func:`config_of`."""
    from obdlab.image.config import ImageConfig

    names = _names(source)
    return ImageConfig.load(names[0]) if _is_config(names) else _made_config(names, args)


def _names(source: Sequence[str]) -> list[str]:
    return [name for argument in source for name in argument.split(",") if name]


def _is_config(names: Sequence[str]) -> bool:
    return len(names) == 1 and Path(names[0]).is_file() and _is_json(Path(names[0]))


def _made_config(names: Sequence[str], args: argparse.Namespace) -> ImageConfig:
    from obdlab.image.config import ImageConfig, LowerConfig

    paths = [Path(name) for name in names]
    if any(name.startswith(("/", "./", "../")) for name in names) or all(path.is_file() for path in paths):
        for path in paths:
            if not path.is_file():
                raise DeviceError(f"{path}: no such layer file")
        return ImageConfig(lowers=tuple(LowerConfig(file=str(path.resolve())) for path in paths))
    if len(names) == 1:
        return _config_from_registry(names[0], args)
    missing = ", ".join(str(path) for path in paths if not path.is_file())
    raise DeviceError(f"several sources must be layer files (no such file: {missing})")


def _config_from_registry(name: str, args: argparse.Namespace) -> ImageConfig:
    from obdlab.image.from_manifest import fetch_config
    from obdlab.registry.platform import host_platform
    from obdlab.registry.reference import Reference

    client = registry_from(args)
    deadline = time.monotonic() + getattr(args, "timeout", 0.0)
    wanted = getattr(args, "trace", None) is None
    told = False
    try:
        while True:
            try:
                return fetch_config(client, Reference.parse(name), host_platform(), traces=wanted)
            except SourceError as error:
                _wait_for_registry(error, name, deadline, quietly=told)
                told = True
    except ObdlabError as error:
        if _may_be_a_path(name):
            what = "a directory" if Path(name).is_dir() else "no such file"
            raise DeviceError(f"{name}: {what}, and as the reference of an image: {error}") from error
        raise
    finally:
        client.close()


# Waits until the deadline of mount or attach. Permanent errors, and names that may be mistyped paths, fail at once.
def _wait_for_registry(error: SourceError, name: str, deadline: float, *, quietly: bool) -> None:
    left_s = deadline - time.monotonic()
    if not error.temporary or left_s <= _PAUSE_S or _may_be_a_path(name):
        raise error
    if not quietly:
        print(f"{printable(str(error))}; waiting for the registry, {left_s:.0f} s more at most", file=sys.stderr)
    time.sleep(_PAUSE_S)


# Usual names of layer files, and names without a registry (which would be Docker Hub's).
def _may_be_a_path(name: str) -> bool:
    first, slash, _ = name.partition("/")
    names_registry = bool(slash) and (first == "localhost" or any(character in first for character in ".:["))
    return not names_registry or "./" in name or name.endswith((".obd", ".json", ".lsmt", ".zfile", ".tar"))


def forget_config(service: DeviceService, config: Path) -> None:
    """Remove a configuration that :func:`config_of` made, unless a device of the run directory uses it."""
    directory = config.absolute().parent
    if directory.parent.resolve() != (service.run_dir.path / _IMAGES).resolve():
        return
    devices = service.list()
    attaching = len(service.run_dir.device_directories()) > len(devices)
    if attaching or any(each.config == config.absolute() for each in devices):
        return
    config.unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError:  # missing, or holds other files
        pass


def _is_json(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(64).lstrip().startswith(b"{")
