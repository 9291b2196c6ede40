"""The command line as a table: groups, their commands, and where each command declares its arguments.

A command is a function ``declare(parser)`` in a module of this package. It adds the arguments and sets
``run=<function(args) -> exit status>``, and ``bounded=False`` if its memory must have no bound (``memorybound``):
either its processes have bounds of their own, or it runs other programs, which would inherit the bound. The module is
imported only when the command line names the command, so that ``obdlab --version`` and help stay fast.

Other packages add commands to a group by an entry point of the group ``obdlab.commands``: its name is
"GROUP.COMMAND", its value a :class:`Command`.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from obdlab import plugins

if TYPE_CHECKING:
    import argparse

#: The group of entry points that add commands.
ENTRY_POINTS = "obdlab.commands"


@dataclass(frozen=True, slots=True)
class Command:
    """One command. ``declare`` is "module:function"; the function adds the arguments to a parser.

    A module that starts with a dot is one of this package. Its file is named after the command, and ends in
    ``_command`` where the module that does the work already has that name.
    """

    name: str
    summary: str
    declare: str

    def build(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments. Raises ImportError or AttributeError if ``declare`` names nothing."""
        module, _, function = self.declare.partition(":")
        getattr(importlib.import_module(module, __package__), function)(parser)


@dataclass(frozen=True, slots=True)
class Group:
    """Commands about one kind of thing. ``example`` is a worked example, shown below the list of commands."""

    name: str
    summary: str
    example: str
    commands: tuple[Command, ...]

    def names(self) -> tuple[str, ...]:
        """Return the names of all commands, added ones included; imports none of them."""
        return (*(each.name for each in self.commands), *_added(self.name))

    def with_added(self) -> Group:
        """Return the group with the commands that entry points add. Logs and leaves out those that fail to load."""
        added = []
        for name in _added(self.name):
            try:
                command = plugins.load(ENTRY_POINTS, f"{self.name}.{name}")
            except plugins.PluginError as error:  # a broken package must not take the other commands away
                logging.getLogger(__name__).warning("%s", error)
                continue
            added.append(replace(command, name=name))
        return replace(self, commands=(*self.commands, *added))

    def has(self, name: str) -> bool:
        """Return True if the table has a command of that name."""
        return any(each.name == name for each in self.commands)


def _added(group: str) -> list[str]:
    return [name.removeprefix(f"{group}.") for name in plugins.names(ENTRY_POINTS) if name.startswith(f"{group}.")]


IMAGE = Group(
    "image",
    "convert images, pull them lazily, look into them",
    """\
example: convert an image, compare the two, look into the new one, make it runnable by containerd
  obdlab image convert registry.example/redis:7 registry.example/redis:7-obd
  obdlab image compare registry.example/redis:7 registry.example/redis:7-obd
  obdlab image ls registry.example/redis:7-obd:/etc
  obdlab image pull registry.example/redis:7-obd
  ctr run --rm --snapshotter obdlab registry.example/redis:7-obd redis""",
    (
        Command("convert", "convert an OCI image to an overlaybd image", ".image.convert:declare"),
        Command("build", "build an image by a Dockerfile, on a lazily read base", ".image.build_command:declare"),
        Command("convert-list", "convert many images, on one host or several", ".image.convert_list:declare"),
        Command("pull", "pull an image lazily into containerd", ".image.pull:declare"),
        Command("compare", "compare two images, or an image and a directory", ".image.compare_command:declare"),
        Command("inspect", "describe images: layers, sizes, annotations", ".image.inspect:declare"),
        Command("verify", "read an image whole and check every checksum", ".image.verify:declare"),
        Command("ls", "list files without mounting the image", ".image.ls:declare"),
        Command("cat", "print a file without mounting the image", ".image.cat:declare"),
        Command("cp", "copy files out of an image without mounting it", ".image.cp:declare"),
        Command("pull-blob", "fetch one manifest, config, layer or blob", ".image.pull_blob:declare"),
        Command("turbo", "start containerd's images from its content store", ".image.turbo_command:declare"),
        Command("publish", "publish an image's trace: hot layers", ".image.publish:declare_publish"),
        Command("protect", "add hash trees, which verify lazy reads", ".image.protect:declare"),
        Command("unpublish", "undo publish --as referrer", ".image.publish:declare_unpublish"),
    ),
)
LAYER = Group(
    "layer",
    "make, write, seal, compact and check layer files",
    """\
example: a writable layer, used as a disk, then stored as one compact layer
  obdlab layer create data index --vsize 1G --mkfs
  echo '{"upper": {"data": "'$PWD'/data", "index": "'$PWD'/index"}}' >config.v1.json
  obdlab device attach config.v1.json --id disk
  obdlab device detach disk
  obdlab layer commit data index layer.obd --tar
  obdlab layer inspect layer.obd --verify""",
    (
        Command("create", "make an empty writable layer", ".layer.create:declare"),
        Command("apply", "apply a layer's tar to an image's writable layer", ".layer.apply_command:declare"),
        Command("commit", "write a layer as a compact, sealed layer file", ".layer.commit_command:declare"),
        Command("seal", "turn a writable layer into a sealed one in place", ".layer.seal_command:declare"),
        Command("merge", "write a stack of layers as one layer", ".layer.merge:declare"),
        Command("gc", "free the space of overwritten data", ".layer.gc_command:declare"),
        Command("resize", "make the disk of a writable layer larger", ".layer.resize:declare"),
        Command("import", "make a base layer of a raw or qcow2 disk image", ".layer.import_:declare"),
        Command("inspect", "describe layer files; --verify reads them whole", ".image.inspect:declare"),
        Command("diff", "list the ranges in which two disks differ", ".layer.diff:declare"),
        Command("zfile", "compress a file to a ZFile, extract or verify one", ".layer.zfile_command:declare"),
        Command("gzip-index", "make or verify the index of a gzip layer", ".layer.gzip_index_command:declare"),
    ),
)
DEVICE = Group(
    "device",
    "images as block devices and mounts, on this host",
    """\
example: mount an image, read a file of it, take everything down again (as root)
  obdlab device mount registry.example/redis:7-obd /mnt
  cat /mnt/etc/os-release
  obdlab device list
  obdlab device umount /mnt""",
    (
        Command("attach", "make an image a block device", ".device.attach:declare_attach"),
        Command("detach", "remove a device", ".device.attach:declare_detach"),
        Command("mount", "mount an image read-only", ".device.mount_command:declare_mount"),
        Command("umount", "undo a mount, and remove its unused device", ".device.mount_command:declare_umount"),
        Command("list", "list the devices and their servers", ".device.attach:declare_list"),
        Command("snapshot", "take a live snapshot of a writable device", ".device.snapshot_command:declare"),
        Command("upgrade", "serve devices in use with the installed code", ".device.upgrade:declare"),
        Command("graduate", "serve a device from an unpacked copy", ".device.graduate:declare"),
        Command("tcmu-attach", "attach as overlaybd-attacher does", ".device.tcmu_attach:declare_attach"),
        Command("tcmu-detach", "remove such a device", ".device.tcmu_attach:declare_detach"),
    ),
)
TRACE = Group(
    "trace",
    "record the reads of a start, to fetch them ahead the next time",
    """\
A trace lists the reads of an image's layers in order, in the original's file format. Devices fetch ahead what it
lists if the image is attached with --trace, has the trace in an acceleration layer, or names it as recordTracePath
in its config.v1.json.

example: record a start, look at it, publish the image with a hot layer made of it
  obdlab trace record registry.example/redis:7-obd -o redis.trace --until-line "Ready to accept"
  obdlab trace files redis.trace registry.example/redis:7-obd
  obdlab image publish registry.example/redis:7-obd registry.example/redis:7-hot --trace redis.trace""",
    (
        Command("record", "record a device in use, or a start of an image", ".trace.record:declare_record"),
        Command("start", "record a device in use until trace stop", ".trace.record:declare_start"),
        Command("stop", "end a recording, and write the trace", ".trace.record:declare_stop"),
        Command("suggest", "derive a trace of a start without running it", ".trace.suggest_command:declare"),
        Command("learn", "learn from recorded traces what starts read", ".trace.learn_command:declare"),
        Command("show", "print a trace", ".trace.sets_command:declare_show"),
        Command("merge", "make one trace of several runs", ".trace.sets_command:declare_merge"),
        Command("diff", "compare two traces; status 1 if they differ", ".trace.sets_command:declare_diff"),
        Command("filter", "keep part of a trace", ".trace.sets_command:declare_filter"),
        Command("files", "list the files that a trace reads", ".trace.files_command:declare_files"),
    ),
)
CACHE = Group(
    "cache",
    "the block cache that all devices share, also while they run",
    """\
example: list the cached blobs, check them all, fetch damaged parts again when they are read
  obdlab cache list
  obdlab cache verify --repair""",
    (
        Command("list", "list the cached blobs, the last used first", ".cache:declare_list"),
        Command("gc", "evict down to the cache's limits", ".cache:declare_gc"),
        Command("clear", "remove all cached blobs, or some", ".cache:declare_clear"),
        Command("verify", "read all cached bytes and check them", ".cache:declare_verify"),
    ),
)
SERVE = Group(
    "serve",
    "services that run until SIGTERM",
    """\
example: the snapshotter with metrics; containerd's configuration names its socket as a proxy plugin
  obdlab serve snapshotter --root /var/lib/obdlab/snapshotter --address /run/obdlab/snapshotter.sock \\
    --exporter 127.0.0.1:9863
  ctr run --rm --snapshotter obdlab registry.example/redis:7-obd redis""",
    (
        Command("snapshotter", "serve containerd as a proxy snapshotter", ".serve.snapshotter:declare"),
        Command("tcmu", "serve TCMU devices, in place of overlaybd-tcmu", ".serve.tcmu_command:declare"),
        Command("exporter", "serve metrics for Prometheus, and health", ".serve.exporter_command:declare"),
        Command("peer", "pass blocks on to this host's devices and other hosts", ".serve.peer_command:declare"),
        Command("snapshot-api", "take live snapshots by HTTP requests", ".serve.snapshot_api:declare"),
        Command("device-host", "fork device servers; started on demand", ".device_host:declare"),
    ),
)
LAB = Group(
    "lab",
    "the workbench: build datasets, run experiments, evaluate the paper's claims",
    """\
example: measure cold starts in two minutes, see the rows, export them (as root, in a checkout)
  obdlab lab dataset list
  obdlab lab run experiments/quick.toml --report
  obdlab lab list
  obdlab lab export quick rows.csv""",
    (
        Command("dataset", "build the images of the datasets", ".lab.dataset:declare"),
        Command("run", "measure the cells that have no rows yet", ".lab.experiment_command:declare_run"),
        Command("plan", "count the repeats that a precision needs", ".lab.experiment_command:declare_plan"),
        Command("resume", "continue a run that was stopped", ".lab.experiment_command:declare_resume"),
        Command("status", "count the measured cells", ".lab.experiment_command:declare_status"),
        Command("show", "print the table of one experiment's results", ".lab.experiment_command:declare_show"),
        Command("list", "list results", ".lab.experiment_command:declare_list"),
        Command("export", "write raw rows as a file, or experiments as a workflow", ".lab.share:declare_export"),
        Command("bundle", "pack results into one file for others", ".lab.share:declare_bundle"),
        Command("unbundle", "check a bundle, and unpack it", ".lab.share:declare_unbundle"),
        Command("evaluate", "measure what the paper's figures need", ".lab.evaluate:declare_evaluate"),
        Command("report", "render the evaluation's report from rows", ".lab.evaluate:declare_report"),
    ),
)
GROUPS = (IMAGE, LAYER, DEVICE, TRACE, CACHE, SERVE, LAB)
#: Commands that stand in no group.
SINGLE = (
    Command("doctor", "check this host, and name the fix of each missing ability", ".host.doctor:declare"),
    Command("cleanup", "unmount and detach everything, also after a crash", ".host.cleanup_command:declare"),
    Command("config", "check a settings file and show the settings", ".host.config:declare"),
    Command("fsck", "check a snapshotter's root, and repair it", ".host.fsck_command:declare"),
    Command(
        "install-tools",
        "put the original's commands, run by obdlab, into a directory",
        ".host.install_tools:declare",
    ),
    Command("completion", "print a shell's completion script", ".completion:declare"),
)
