"""Options of the commands that read and write images: their places, and registries over TLS."""

from __future__ import annotations

import argparse
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_registry_options, settings_from

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.registry.client import RegistryClient

#: Part of the descriptions of commands that take names of images.
NAMES = """\
Images are named as skopeo names them:
  docker://HOST/NAME:TAG         in a registry; the prefix may be left out
  oci:DIR[:TAG]                  in an OCI layout directory
  oci-archive:FILE[:TAG]         the same as a tar
  docker-archive:FILE[:NAME:TAG] in the output of docker save (only to read)
  containerd:[NAMESPACE:]NAME    in containerd's stores (default namespace: default)"""


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for access to images."""
    from obdlab.cli.sources import add_containerd_option  # brings temporary files, which a pull does without

    add_registry_options(parser)
    add_containerd_option(add_tls_options(parser, "TLS and containerd (wins over the settings file)"))


def add_tls_options(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Add the options for registries over TLS as a group, and return it."""
    group = parser.add_argument_group(title)
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="trust these CAs (PEM) as well")
    group.add_argument(
        "--tls-client", metavar="CERT[:KEY]", help="client certificate and key (PEM) for registries that ask for one"
    )
    group.add_argument(
        "--certs-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="look for HOST[:PORT]/*.crt, *.cert and *.key here as well, as docker does; repeatable",
    )
    group.add_argument(
        "--insecure",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="do not look at this registry's certificate; repeatable",
    )
    return group


@contextmanager
def image_client(args: argparse.Namespace) -> Iterator[RegistryClient]:
    """Give a registry client for these arguments, for the block. Raises SettingsError."""
    from obdlab.image.registryaccess import open_client
    from obdlab.registry.credentials import Credentials

    if args.credentials is not None:
        Credentials.load(args.credentials)  # an unusable file fails now, not at the first request
    settings = settings_from(args)
    changes: dict[str, Any] = {
        "tls_certs_dirs": (*args.certs_dir, *settings.tls_certs_dirs),
        "tls_insecure_hosts": (*settings.tls_insecure_hosts, *args.insecure),
    }
    if args.tls_ca is not None:
        changes["tls_ca_path"] = args.tls_ca
    if args.tls_client:
        cert, _, key = args.tls_client.partition(":")
        changes |= {"tls_client_cert": Path(cert), "tls_client_key": Path(key or cert)}
    with closing(open_client(replace(settings, **changes), plain_http_hosts=frozenset(args.plain_http))) as client:
        yield client


@contextmanager
def opened_source(text: str, client: RegistryClient, args: argparse.Namespace) -> Iterator[ImageSource]:
    """Give the image that ``text`` names, for the block."""
    from obdlab.convert.endpoints.names import open_source

    with closing(open_source(text, client, containerd=args.containerd)) as source:
        yield source


@contextmanager
def opened_destination(text: str, client: RegistryClient, args: argparse.Namespace) -> Iterator[ImageDestination]:
    """Give the place that ``text`` names, for the block."""
    from obdlab.convert.endpoints.names import open_destination

    with closing(open_destination(text, client, containerd=args.containerd)) as destination:
        yield destination
