"""``obdlab serve peer``: the agent that passes blocks of images on to this host's devices and to other hosts."""

from __future__ import annotations

import argparse
import logging
import threading
from dataclasses import replace
from pathlib import Path

from obdlab.cli import notify
from obdlab.cli.common import add_cache_options, add_registry_options, settings_from
from obdlab.cli.logoptions import add_log_options, set_up_logs
from obdlab.cli.numbers import whole
from obdlab.cli.packing import size_argument
from obdlab.cli.serve.exporter_command import address
from obdlab.cli.signals import catch_signals
from obdlab.observe import logs

DEFAULT_LISTEN = "127.0.0.1:9731"
DEFAULT_PREFIX = "peer"


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Serve blobs at /<prefix>/<URL> to this host's devices (setting p2p_address) and to the agents of other "
        "hosts, each of which gets most blocks from another one (docs/how-to/peers.md). Ends at SIGINT and SIGTERM."
    )
    parser.add_argument(
        "--listen",
        type=address,
        default=DEFAULT_LISTEN,
        metavar="ADDRESS:PORT",
        help="where to answer (default: %(default)s, which other hosts cannot reach; port 0: any that is free)",
    )
    parser.add_argument(
        "--registry",
        action="append",
        required=True,
        metavar="HOST[:PORT]",
        help="a registry to read blobs from; requests for others are refused (repeatable)",
    )
    parser.add_argument(
        "--members",
        default="",
        metavar="LIST",
        help="the agents: static:HOST:PORT,... or file:PATH, which is read again when it changes, or dns:NAME:PORT "
        "(default: no others)",
    )
    parser.add_argument(
        "--id",
        help="this agent's name in the list (default: the address of --listen, with the port in use)",
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="the key that all agents share, at least 16 bytes: without it only public blobs go from host to host",
    )
    parser.add_argument(
        "--topology",
        choices=("rendezvous", "rooted", "redirect", "balanced", "none"),
        default="rendezvous",
        help="the tree in which blocks are passed on (default: %(default)s; none: read from the registry alone)",
    )
    parser.add_argument(
        "--manager",
        default="",
        metavar="ID",
        help="the agent that keeps the trees of the topologies rooted, redirect and balanced",
    )
    parser.add_argument(
        "--arity", type=whole(1, 64), default=2, metavar="N", help="most children in a tree (default: %(default)s)"
    )
    parser.add_argument(
        "--unchecked",
        action="store_true",
        help="take blobs without a hash tree from other agents too, though nothing checks their bytes",
    )
    parser.add_argument(
        "--upload-limit",
        type=size_argument,
        default=0,
        metavar="SIZE",
        help="most bytes per second to other hosts (default: no limit)",
    )
    parser.add_argument(
        "--prefix", default=DEFAULT_PREFIX, help="first part of the paths, of all agents (default: %(default)s)"
    )
    add_cache_options(parser)
    add_registry_options(parser)
    add_log_options(parser, default_level="info")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from obdlab.peers.agent.starting import start

    settings = settings_from(args)
    set_up_logs(args, logging.INFO, settings=replace(settings, log_path=None))
    service = start(
        settings,
        listen=args.listen,
        own_id=args.id or "",
        prefix=args.prefix,
        registries=args.registry,
        plain_http=args.plain_http,
        members=args.members,
        key_path=args.key,
        topology=args.topology,
        manager=args.manager,
        arity=args.arity,
        unchecked=args.unchecked,
        upload_limit=args.upload_limit,
    )
    wait_for_signal = catch_signals()
    serving = threading.Thread(target=service.run, name="http", daemon=True)
    serving.start()
    logs.announce(f"obdlab peer: ready on http://{service.address}/{args.prefix} as {service.own_id}")
    notify.ready(serving.is_alive)
    wait_for_signal()
    notify.stopping()
    service.stop()
    return 0
