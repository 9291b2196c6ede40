"""The part of ``obdlab image inspect`` that is about images: in registries, layouts, archives and containerd."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from obdlab.cli.packing import size_text
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    import argparse

    from obdlab.cache.admin import CacheEntry
    from obdlab.convert.endpoints.endpoint import ImageSource
    from obdlab.convert.inspection import ImageFacts
    from obdlab.formats.oci import Manifest
    from obdlab.registry.client import RegistryClient

_ANNOTATION_MOST = 200


def inspect_image(name: str, client: RegistryClient, args: argparse.Namespace) -> ImageFacts:
    """Return the facts about an image; ``--verify`` reads its layers whole. Raises ObdlabError."""
    from obdlab.cli.imageoptions import opened_source
    from obdlab.cli.progressbar import Bars
    from obdlab.convert.inspection import describe_image, verify_image
    from obdlab.registry.platform import host_platform

    platform = args.platform or host_platform()
    with opened_source(name, client, args) as source:
        _, manifest = source.find(platform, overlaybd=True)
        cached = _cached(source, args, manifest)
        facts = describe_image(source, platform, cached)
        return verify_image(source, facts, platform, Bars()) if args.verify else facts


# Checked units are cached apart from others.
def _cached(source: ImageSource, args: argparse.Namespace, manifest: Manifest) -> dict[str, CacheEntry] | None:
    from obdlab.cache.admin import entries
    from obdlab.cache.space import CacheSpace
    from obdlab.cli.common import settings_from
    from obdlab.errors import FormatError
    from obdlab.formats.hashtree import TreeReference
    from obdlab.formats.oci import HASH_TREE
    from obdlab.settings.settings import VERIFY_OFF

    if not source.cache_name:
        return None
    settings = settings_from(args)
    directory = settings.cache_dir
    names = {layer.digest: source.cache_name for layer in manifest.layers}
    for layer in manifest.layers:
        text = layer.annotations.get(HASH_TREE)
        if text and settings.verify != VERIFY_OFF:
            with suppress(FormatError):  # opening the image reports it
                names[layer.digest] = TreeReference.parse(text).cache_name
    try:
        found = entries(CacheSpace(directory), names)
    except OSError as error:
        print(f"{args.prog}: {directory}: cannot see what is cached ({error.strerror})", file=sys.stderr)
        return None
    return {entry.digest: entry for entry in found if entry.registry == names[entry.digest]}


def print_image(facts: ImageFacts) -> None:
    """Print an image for people."""
    print(f"{printable(facts.name)}: {facts.kind} image for {facts.platform or 'no platform'}")
    rows = {
        "manifest": f"{facts.digest} ({facts.media_type})",
        "config": facts.config,
        "made from": facts.subject,
        "platforms": ", ".join(facts.platforms),
        "file system": facts.filesystem,
        "layers": f"{len(facts.layers)}, {size_text(facts.size)}",
        "cached here": "" if facts.cached_size is None else size_text(facts.cached_size),
        "hot layer": _hot(facts),
        "integrity": facts.verified,
    }
    for title, text in rows.items():
        if text:
            print(f"  {title:12} {printable(text)}")
    for key, value in sorted(facts.annotations.items()):
        print(f"  annotation   {_annotation(key, value)}")
    for number, layer in enumerate(facts.layers):
        packed = (
            f"{layer.compression}, {layer.block_size >> 10} KiB blocks" if layer.block_size else layer.compression
        )
        here = "" if layer.cached_size is None else f", {size_text(layer.cached_size)} of it cached"
        hot = (", hot layer" if layer.hot else "") + (", hash tree" if layer.hash_tree else "")
        hot += ", sums" if layer.tar_sums else ""
        kind = "" if layer.kind == facts.kind else f", {layer.kind}"
        print(f"  {number:3}  {layer.digest}  {size_text(layer.size)}, {packed}{kind}{hot}{here}")
        if layer.target:
            size = size_text(layer.target_size) if layer.target_size else "not there"
            print(f"       files in {layer.target}  {size}{', WRONG' if layer.target_fault else ''}")
        for key, value in sorted(layer.annotations.items()):
            print(f"       {_annotation(key, value)}")


def faults_of(facts: ImageFacts) -> list[str]:
    """Return a sentence for each wrong target: the layer, the place, the found and the wanted value."""
    return [
        f"{facts.name}: the files of layer {number} cannot be read: {layer.target_fault}"
        for number, layer in enumerate(facts.layers)
        if layer.target_fault
    ]


def _hot(facts: ImageFacts) -> str:
    if facts.kind == "plain":
        return ""
    if facts.hot_layer:
        return "yes, the top layer"
    if facts.trace:
        return f"{'yes' if facts.trace_is_hot else 'no, but a trace'}, {facts.trace} refers to the image"
    return "no"


def _annotation(key: str, value: str) -> str:
    text = f"{key}={value}"
    return printable(text if len(text) <= _ANNOTATION_MOST else f"{text[:_ANNOTATION_MOST]}...")
