"""``obdlab serve nbd``: an image for virtual machines and tools, without a kernel device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from obdlab.cli import notify
from obdlab.cli.common import add_runtime_options, settings_from
from obdlab.cli.serve.exporter_command import address
from obdlab.cli.signals import catch_signals
from obdlab.cli.sources import SOURCE_HELP, add_source_options, image_config
from obdlab.errors import DeviceError
from obdlab.observe import stacks

if TYPE_CHECKING:
    import argparse

_GRACE_S = 10.0


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Serve an image over NBD until SIGINT or SIGTERM: no root, no kernel device. What is read is fetched at "
        "that moment and cached, as with attach. An image with a writable layer can be written by its clients."
    )
    parser.add_argument("source", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--socket", type=Path, metavar="PATH", help="unix socket to listen on (made with mode 0600)")
    place.add_argument(
        "--listen",
        type=address,
        metavar="ADDRESS:PORT",
        help="where to listen (port 0: any); whoever reaches it gets the image: NBD asks for no password",
    )
    parser.add_argument("--name", default="", help="the export's name (default: empty; clients may always say none)")
    parser.add_argument("--read-only", action="store_true", help="refuse writes to an image that is writable")
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from obdlab.blob import WritableBlob
    from obdlab.contrib.nbd.export import NbdExport
    from obdlab.contrib.nbd.protocol import MAX_STRING
    from obdlab.contrib.nbd.server import NbdServer
    from obdlab.image.open import open_image
    from obdlab.layerfiles.extents import extents
    from obdlab.system import abi

    if len(args.name.encode()) > MAX_STRING:
        raise DeviceError(f"the export's name is too long (wanted at most {MAX_STRING} bytes)")
    stacks.dump_on_signal()
    with image_config(args.source, args) as config, open_image(config, settings_from(args)) as image:
        export = NbdExport(
            image,
            args.name,
            read_only=args.read_only,
            extents=lambda offset, length: extents(image, offset, length),
        )
        abi.keep_freed_memory()
        server = NbdServer(export, args.socket or args.listen)
        wait_for_signal = catch_signals()
        server.start()
        print(f"obdlab nbd: ready on {_uri(args, server)}", flush=True)
        notify.ready()
        wait_for_signal()
        notify.stopping()
        done = server.stop(_GRACE_S)
        if isinstance(image, WritableBlob):
            image.flush()
        if not done:
            raise DeviceError(f"ended with requests under way that were not answered in {_GRACE_S:g} s")
    return 0


def _uri(args: argparse.Namespace, server: Any) -> str:
    name = quote(args.name, safe="")
    if args.socket is not None:
        return f"nbd+unix:///{name}?socket={quote(str(args.socket.absolute()))}"
    host = f"[{args.listen[0]}]" if ":" in args.listen[0] else args.listen[0]
    return f"nbd://{host}:{server.port}/{name}"
