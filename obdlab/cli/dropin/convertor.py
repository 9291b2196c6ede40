"""``convertor``: the original's conversion without containerd, as ``obdlab image convert``."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from obdlab.cli.dropin.grammar import Style, Tool, ToolError, option, switch
from obdlab.cli.dropin.registryflags import certificates_file, credentials_file, database_url, host_of

if TYPE_CHECKING:
    import argparse
# The original's value for "no limit" is 0.
_NO_LIMIT = 16


def _convertor(values: argparse.Namespace) -> int:
    from obdlab.cli.main import main

    source = source_of(values)
    os.makedirs(values.dir, exist_ok=True)
    with ExitStack() as stack:
        access = [
            *stack.enter_context(credentials_file(values.username, host_of(source))),
            *stack.enter_context(certificates_file(values.root_ca)),
        ]
        for words in commands(values, source):
            status = main([*words, *access])
            if status:
                return status
    return 0


def source_of(values: argparse.Namespace) -> str:
    """Return the name of the image to convert. Raises ToolError."""
    if values.input_tag:
        return f"{values.repository}:{values.input_tag}"
    if values.input_digest:
        return f"{values.repository}@{values.input_digest}"
    raise ToolError("one of input-tag [-i] or input-digest [-g] is required")


def commands(values: argparse.Namespace, source: str) -> list[list[str]]:
    """Return the commands of obdlab that do what the options ask for. Raises ToolError."""
    native, turbo = values.overlaybd, values.turboOCI or values.fastoci
    if not native and not turbo:
        native = values.output_tag
    if not native and not turbo:
        raise ToolError("output-tag is required, you can specify it by [-o|--overlaybd|--turboOCI]")
    if values.reserve and not values.no_upload:
        raise ToolError("--reserve: not possible here without --no-upload: intermediate files are not kept")
    common = _common(values, host_of(source))
    forms = (("overlaybd", native), ("turbo-oci", turbo))
    return [[*_conversion(values, source, form, tag), *common] for form, tag in forms if tag]


def _common(values: argparse.Namespace, host: str) -> list[str]:
    words = ["--platform", "all", "--work-dir", values.dir, "--vsize-gib", str(values.vsize), "--quiet"]
    words += ["--algorithm", "lz4", "--block-size-kib", "4", "--no-hash-trees"]  # as the original makes images
    words += ["--platforms-at-once", str(min(values.concurrency_limit or _NO_LIMIT, _NO_LIMIT))]
    words += [] if values.oci or values.referrer else ["--docker"]
    words += ["--referrer"] if values.referrer else []
    words += ["--plain-http", host] if values.plain else []
    words += ["--insecure", host] if values.insecure else []
    for directory in values.cert_dir:
        words += ["--certs-dir", directory]
    if len(values.client_cert) > 1:
        raise ToolError("--client-cert: one client certificate is possible here")
    for pair in values.client_cert:
        words += ["--tls-client", pair]
    return words


def _conversion(values: argparse.Namespace, source: str, form: str, tag: str) -> list[str]:
    words = ["--verbose"] if values.verbose else []
    words += ["image", "convert", source, f"{values.repository}:{tag}", "--as", form]
    if values.no_upload:
        if form == "turbo-oci":  # as the original, which uploads these nevertheless
            print("convertor: --no-upload: turboOCI layers belong to the repository, and go there", file=sys.stderr)
        else:
            words[words.index("--as") - 1] = f"oci:{os.path.join(values.dir, 'image')}:{tag}"
    if form == "turbo-oci":
        words += ["--fs", values.fstype]
    if values.dump_manifest:
        words += ["--dump-manifest", os.path.join(values.dir, f"{tag}.manifest.json")]
    database = "none"
    if values.db_str and form == "overlaybd" and values.db_type:
        if values.db_type == "mysql":
            database = database_url(values.db_str)
        else:
            print(f"convertor: db-type {values.db_type!r} is not known: no deduplication", file=sys.stderr)
    return [*words, "--database", database]


CONVERTOR = Tool(
    "convertor",
    "Converts an image of a registry to an overlaybd or a turboOCI image in the same repository.",
    Style.COBRA,
    _convertor,
    (
        option("--repository", "-r", help="repository of the image, with its registry", required=True),
        option("--username", "-u", help="user:password at the registry"),
        switch("--plain", help="plain HTTP"),
        switch("--verbose", help="log more"),
        option("--input-tag", "-i", help="tag to convert"),
        option("--input-digest", "-g", help="digest to convert, in place of a tag"),
        option("--output-tag", "-o", help="tag of the overlaybd image"),
        option("--dir", "-d", help="work directory", default="tmp_conv"),
        switch("--oci", help="OCI's media types"),
        option("--fstype", help="ext4 or erofs, of turboOCI", default="ext4"),
        switch(
            "--mkfs",
            help="make the file system",
            default=True,
            refused="without it, images would need the original's base layer",
        ),
        option("--vsize", help="size of the disk in GB", default=64),
        option("--fastoci", help="tag of the turboOCI image, by its old name"),
        option("--turboOCI", help="tag of the turboOCI image"),
        option("--overlaybd", help="tag of the overlaybd image"),
        option("--db-str", help="database for deduplication, user:password@tcp(host:port)/name"),
        option("--db-type", help="mysql"),
        option("--concurrency-limit", help="images of an index at once, 0: no limit", default=4),
        switch("--disable-sparse", help="accepted: layers in the making are sparse files, which changes no image"),
        switch("--referrer", help="have the new manifest refer to the source"),
        option("--cert-dir", help="certificates by registry, as docker keeps them; repeatable", default=[]),
        option("--root-ca", help="trust these CAs (PEM); repeatable", default=[]),
        option("--client-cert", help="client certificate and key, CERT:KEY", default=[]),
        switch("--insecure", help="do not look at the registry's certificate"),
        switch("--reserve", help="keep the work directory's image (with --no-upload)"),
        switch("--no-upload", help="leave the image in the work directory, as an OCI layout image"),
        switch("--dump-manifest", help="write the manifest into the work directory, TAG.manifest.json"),
    ),
)
