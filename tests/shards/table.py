"""Which slow test belongs to which shard.

A shard takes at most 15 minutes on two quiet processors: with the ordinary tests CI is done in 45. Its tests are
named by beginnings of their ids; the longest beginning that fits a test decides, so that a new test of a directory is
in a shard without being named.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """Some of the slow tests. ``covers`` is for people, ``tests`` are beginnings of ids below ``tests/``."""

    name: str
    covers: str
    tests: tuple[str, ...]


_ROUNDS = "server/test_kinds.py::test_many_rounds_leave_nothing"
_UBLK_ROUNDS = "contrib/ublk/test_device.py::TestUblkDevice::test_a_thousand_rounds"
_TCMU_ROUNDS = "devices/tcmu/test_device.py::TestTcmuDevice::test_a_thousand_rounds"
_FUZZED_LAYERS = (
    "gzip-index", "gzip-target", "layer", "layer-applied", "layer-tar", "stack", "tar-wrap", "turbo-blob", "warp",
    "zfile", "zstd-index", "zstd-layer",
)  # fmt: skip
_FUZZED_DISKS = (
    "append-log", "bolt", "erofs", "erofs-base", "ext4", "ext4-base", "nbd", "qcow2", "scsi", "tcmu-events",
    "tcmu-ring",
)  # fmt: skip


def _fuzzed(*targets: str) -> tuple[str, ...]:
    return tuple(f"fuzz/test_fuzz.py::test_for_minutes[{target}]" for target in targets)


# The quarter of that number of each kind of device.
def _rounds(kind: str, tests: str, quarter: int) -> tuple[str, ...]:
    return f"{_ROUNDS}[{kind}-{quarter}]", f"{tests}[{quarter}]"


SHARDS = (
    Shard(
        "convert",
        "conversion of large, hostile and random images, shared databases",
        ("cli", "containerd", "contrib", "convert", "pull", "volumes"),
    ),
    Shard("snapshotter", "the snapshotter under kills, and against a model of its contract", ("snapshotter",)),
    Shard(
        "cache",
        "cache and download under kills and damage, outages of registries, files of layers against models",
        (
            "cache",
            "formats",
            "guard",
            "image",
            "layerfiles",
            "layers",
            "metrics",
            "observe",
            "outage",
            "registry",
            "settings",
            "shards",
            "system",
            "test_localfile.py",
            "traces",
        ),
    ),
    Shard("fuzz-1", "two minutes for each parser of texts, tables and traces", ("fuzz",)),
    Shard("fuzz-2", "two minutes for each parser of layers, indexes and tars", _fuzzed(*_FUZZED_LAYERS)),
    Shard("fuzz-3", "two minutes for each parser of file systems and block protocols", _fuzzed(*_FUZZED_DISKS)),
    Shard(
        "devices",
        "a thousand rounds of FUSE and loop devices, hundreds of killed servers, NBD, systemd units",
        ("contrib/nbd", "devices", "server"),
    ),
    Shard("torture", "writable devices against a model, 300 operations for each seed", ("devices/test_torture.py",)),
    Shard("filesystems", "ext4 and xfs on writable devices, a hundred kills each", ("server/test_filesystems.py",)),
    Shard("containers", "containers, pods and Docker on obdlab; a thousand containers", ("e2e",)),
    Shard(
        "lab",
        "experiments, datasets, notebooks in a browser; an installed wheel",
        ("contrib/dask/test_experiments.py", "lab", "test_wheel.py"),
    ),
    Shard(
        "vm",
        "virtual machine: kills of ublk and TCMU servers, tools, iSCSI, containerd on TCMU and on FUSE devices",
        (
            "contrib/nbd/test_machine.py",
            "devices/tcmu",
            "devices/test_blocktools.py",
            "contrib/ublk",
            "server/test_kinds.py",
            "server/tcmu",
            "snapshotter/test_debian_kernel.py",
            "vm",
        ),
    ),
    *(
        Shard(
            f"vm-rounds-{number}",
            f"virtual machine: quarter {quarter + 1} of a thousand rounds of {name} devices, also with a service",
            _rounds(kind, tests, quarter),
        )
        for number, (kind, name, tests, quarter) in enumerate(
            [
                (*kind, quarter)
                for kind in (("ublk", "ublk", _UBLK_ROUNDS), ("tcmu", "TCMU", _TCMU_ROUNDS))
                for quarter in range(4)
            ],
            start=1,
        )
    ),
)


def named(name: str) -> Shard:
    """Return the shard of that name. Raises ValueError, naming all."""
    for shard in SHARDS:
        if shard.name == name:
            return shard
    raise ValueError(f"no such shard (got {name!r}, wanted one of {', '.join(each.name for each in SHARDS)})")


def beginning_of(nodeid: str) -> tuple[str, str]:
    """Return the shard's name and the beginning that put a test into it; ('', '') if none does."""
    path = nodeid.removeprefix("tests/")
    fitting = [(len(each), shard.name, each) for shard in SHARDS for each in shard.tests if path.startswith(each)]
    return max(fitting)[1:] if fitting else ("", "")
