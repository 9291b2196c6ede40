"""The images of an experiment, pinned by digest, so that a stopped run goes on with the same images.

A results directory keeps the pins in ``spec.json``: the digest of each image, and the fingerprint of its recipe. A
cell's key holds the digest, so that rows of different images are never one cell.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from obdlab.formats.oci import short_digest
from obdlab.lab.images.recipe import find_recipe, image_label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from obdlab.lab.images.builder import BuiltImage
    from obdlab.lab.paths import LabPaths

#: "digest" and "recipe" by the image's name in the declaration.
Pins = dict[str, dict[str, str]]

_KEY = "pins"


def read_pins(directory: Path) -> Pins:
    """Return the pins of the last run in a results directory; {} without any."""
    try:
        pins = json.loads((directory / "spec.json").read_text()).get(_KEY, {})
    except (OSError, ValueError, AttributeError):
        return {}
    return pins if isinstance(pins, dict) else {}


def valid_pins(pins: Pins, names: Iterable[str], paths: LabPaths) -> Pins:
    """Return the pins of the named images with an unchanged recipe. Raises RecipeError for a missing recipe."""
    found = {name: find_recipe(name, paths.datasets).fingerprint() for name in names}
    return {name: pin for name, pin in pins.items() if pin.get("recipe") == found.get(name)}


def digests_of(pins: Pins) -> dict[str, str]:
    """Return the digests by image name."""
    return {name: pin["digest"] for name, pin in pins.items()}


def make_pins(facts: Mapping[str, Mapping[str, Any]]) -> Pins:
    """Return the pins of images from their ``BuiltImage.facts``."""
    return {name: {"digest": str(about["digest"]), "recipe": str(about["recipe"])} for name, about in facts.items()}


def obtain(names: Iterable[str], paths: LabPaths, pins: Pins, say: Callable[[str], None]) -> dict[str, BuiltImage]:
    """Return the pinned images, or others if there is no pin or the pinned image is gone (``say`` reports this).

    Raises the errors of ``build_image``.
    """
    images = {}
    for name in names:
        pin = pins.get(name, {}).get("digest", "")
        images[name] = image = paths.image(name, say, pin=pin)
        if pin and image.digest != pin:
            say(
                f"{image_label(name)}: the rows so far are of {short_digest(pin)}, which is not kept here any more; "
                f"the rows of {short_digest(image.digest)} are cells of their own"
            )
    return images


def image_notes(environments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each image in the environments of rows."""
    notes = []
    for environment in environments:
        for name, about in environment.get("built", {}).items():
            told = f": {about['lock']}" if about["lock"] else ""
            notes.append(f"Image {image_label(name)} is {short_digest(about['digest'])}{told}.")
    return list(dict.fromkeys(notes))
