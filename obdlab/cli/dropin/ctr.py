"""``ctr`` with the original's commands ``obdconv``, ``rpull`` and ``record-trace``; all others are containerd's."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from contextlib import ExitStack, redirect_stdout
from typing import TYPE_CHECKING

from obdlab.cli.dropin.grammar import Operand, Style, Tool, ToolError, option, switch
from obdlab.cli.dropin.registryflags import certificates_file, credentials_file, database_url, host_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_ADDRESS = "/run/containerd/containerd.sock"
_NOT_LOGGED = "requests are not logged; -v and the audit log show them"
_REGISTRY = (
    switch("--skip-verify", "-k", help="do not look at the registry's certificate"),
    switch("--plain-http", help="plain HTTP"),
    option("--user", "-u", help="user:password at the registry"),
    option("--refresh", help="refresh token", refused="tokens are fetched with user and password"),
    option("--hosts-dir", help="containerd's certs.d", refused="name it in obdlab's settings (hosts_dir)"),
    option("--tlscacert", help="trust these CAs (PEM)"),
    option("--tlscert", help="client certificate"),
    option("--tlskey", help="its key"),
    switch("--http-dump", help="log requests", refused=_NOT_LOGGED),
    switch("--http-trace", help="trace requests", refused=_NOT_LOGGED),
)


def _access(values: argparse.Namespace, reference: str, stack: ExitStack) -> list[str]:
    words = registry_words(values, reference)
    words += stack.enter_context(credentials_file(values.user, host_of(reference)))
    words += stack.enter_context(certificates_file([values.tlscacert] if values.tlscacert else []))
    return words


def registry_words(values: argparse.Namespace, reference: str) -> list[str]:
    """Return obdlab's options for access to a registry, but for those that name files made for the purpose."""
    host = host_of(reference)
    words = ["--plain-http", host] if values.plain_http else []
    words += ["--insecure", host] if values.skip_verify else []
    if values.tlscert:
        words += ["--tls-client", f"{values.tlscert}:{values.tlskey}" if values.tlskey else values.tlscert]
    return words


def _rpull(values: argparse.Namespace) -> int:
    from obdlab.cli.main import main

    with ExitStack() as stack:
        status = main([*rpull_command(values), *_access(values, values.ref, stack)])
    if not status:
        print("done")
    return status


def rpull_command(values: argparse.Namespace) -> list[str]:
    """Return obdlab's command, without the options for the registry."""
    words = ["image", "pull", values.ref, "--snapshotter", values.snapshotter, "--quiet"]
    words += ["--address", values.address, "--namespace", values.namespace]
    return [*words, "--download-blobs"] if values.download_blobs else words


def _obdconv(values: argparse.Namespace) -> int:
    from obdlab.cli.main import main

    words = obdconv_command(values)
    print(f"filesystem type: {values.fstype}", flush=True)
    digest = io.StringIO()
    with ExitStack() as stack, redirect_stdout(digest):
        status = main([*words, *_access(values, values.src, stack)])
    if not status:
        print(f"new image digest: {digest.getvalue().strip()}")
    return status


def obdconv_command(values: argparse.Namespace) -> list[str]:
    """Return obdlab's command, without the options for the registry. Raises ToolError."""
    kind, _, options = values.fstype.partition(";")
    mount_options, _, mkfs = options.partition(";")
    if mkfs:
        raise ToolError("--fstype: options of mkfs are not possible here: the file system is written in user space")
    words = ["image", "convert", _stored(values, values.src), _stored(values, values.dst), "--quiet", "--docker"]
    words += ["--fs", kind, *(["--mount-options", mount_options] if mount_options else [])]
    words += ["--algorithm", values.algorithm, "--block-size-kib", str(values.bs)]
    words += ["--vsize-gib", str(values.vsize), "--no-hash-trees", "--containerd", values.address]
    return [*words, "--database", database_url(values.dbstr) if values.dbstr else "none"]


def _record_trace(values: argparse.Namespace) -> int:
    from obdlab.cli.main import main

    if not values.time:
        raise ToolError("time can't be 0")
    if values.priority_list and values.rest:
        raise ToolError("a command and --priority_list exclude each other")
    _refuse_existing(values)
    os.makedirs(values.working_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="record-trace-", dir=values.working_dir) as place:
        trace = values.priority_list or os.path.join(place, "trace")
        for words in record_commands(values, trace):
            status = main(words)
            if status:
                return status
    print(f"New image {values.new} is created")
    return 0


def _refuse_existing(values: argparse.Namespace) -> None:
    from obdlab.containerd.client import Containerd
    from obdlab.containerd.errors import NotFoundError

    with Containerd(values.address.removeprefix("unix://"), values.namespace) as containerd:
        try:
            containerd.images.get(values.new)
        except NotFoundError:
            return
    raise ToolError(f"image {values.new} exists")


def record_commands(values: argparse.Namespace, trace: str) -> list[list[str]]:
    """Return obdlab's commands: to record a start, unless there is a list of files, and to make the new image."""
    publish = ["image", "publish", _stored(values, values.old), _stored(values, values.new), "--trace", trace]
    publish += ["--as", "acceleration-layer", "--quiet", "--containerd", values.address]
    if values.priority_list:
        return [publish]
    record = ["trace", "record", _stored(values, values.old), "-o", trace, "--seconds", str(values.time), "--quiet"]
    record += ["--containerd", values.address]
    record += ["--host-network"] if values.disable_network_isolation else []
    record += ["--run", *values.rest] if values.rest else []
    return [record, publish]


def _stored(values: argparse.Namespace, name: str) -> str:
    return f"containerd:{values.namespace}:{name}"


_SNAPSHOTTER = os.environ.get("CONTAINERD_SNAPSHOTTER", "overlaybd")
VERBS = {
    "rpull": Tool(
        "ctr rpull",
        "Pull an image, lazily where it is an overlaybd image.",
        Style.URFAVE,
        _rpull,
        (
            *_REGISTRY,
            option("--label", help="labels of the image", default=[], refused="images get containerd's labels alone"),
            option("--snapshotter", help="snapshotter's name in containerd", default=_SNAPSHOTTER),
            switch("--download-blobs", help="fetch the layers, too"),
        ),
        (Operand("ref", "image to pull"),),
    ),
    "obdconv": Tool(
        "ctr obdconv",
        "Convert an image in containerd to an overlaybd image.",
        Style.URFAVE,
        _obdconv,
        (
            *_REGISTRY,
            option("--fstype", help="file system, TYPE[;MOUNT OPTIONS]", default="ext4"),
            option("--dbstr", help="database for deduplication, user:password@tcp(host:port)/name"),
            option("--algorithm", help="lz4 or zstd", default="lz4"),
            option("--bs", help="compressed blocks in KB", default=4),
            option("--vsize", help="size of the disk in GB", default=64),
        ),
        (Operand("src", "image in containerd"), Operand("dst", "image to make there")),
    ),
    "record-trace": Tool(
        "ctr record-trace",
        "Record a start of an image, and make an image with its trace.",
        Style.URFAVE,
        _record_trace,
        (
            option("--time", help="seconds to record", default=60),
            option("--priority_list", help="a list of files, in place of a recorded start"),
            option("--working-dir", help="for the trace in the making", default="/tmp/ctr-record-trace/"),
            option("--snapshotter", help="no effect: a device of its own is recorded", default="overlaybd"),
            option(
                "--runtime",
                help="containerd's runtime",
                default="io.containerd.runtime.v2",
                refused="the start is run by runc itself",
            ),
            option("--max-concurrent-downloads", help="accepted: no effect, as in the original", default=8),
            switch("--disable-network-isolation", help="share the host's network"),
            option(
                "--cni-plugin-dir",
                help="CNI plugins",
                default="/opt/cni/bin/",
                refused="the container has a loopback network, or the host's",
            ),
        ),
        (Operand("old", "image to record"), Operand("new", "image to make")),
        rest=True,
    ),
}


def _ctr(values: argparse.Namespace) -> int:
    verb = VERBS.get(values.command)
    if verb is None:
        return _containerds_ctr(values.words)
    own = verb.parse(values.rest)
    own.address, own.namespace = values.address, values.namespace
    return verb.run(own)


# containerd's own client. Another one by this name comes first in the PATH if this one was installed before it.
def _containerds_ctr(words: Sequence[str]) -> int:
    here = os.path.realpath(sys.argv[0])
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(directory, "ctr")
        if os.access(path, os.X_OK) and os.path.realpath(path) != here:
            os.execv(path, ["ctr", *words])
    raise ToolError("containerd's ctr is not in the PATH (only rpull, obdconv and record-trace are built in)")


CTR = Tool(
    "ctr",
    "containerd's client with the commands rpull, obdconv and record-trace; all others are passed on to it.",
    Style.URFAVE,
    _ctr,
    (
        switch("--debug", help="log more"),
        option("--address", "-a", help="containerd's socket", default=os.environ.get("CONTAINERD_ADDRESS", _ADDRESS)),
        option("--timeout", help="of containerd's own commands"),
        option("--connect-timeout", help="of containerd's own commands"),
        option("--namespace", "-n", help="namespace", default=os.environ.get("CONTAINERD_NAMESPACE", "default")),
        switch("--version", "-v", help="containerd's"),
    ),
    (Operand("command", "rpull, obdconv, record-trace, or another of ctr's", required=False),),
    rest=True,
)
