"""Which images an experiment is measured with: pinned by digest, so that a stopped run goes on with the same ones.

A results directory keeps the pins in ``spec.json``: of each image the digest, and the fingerprint of the recipe that
it was built from. A cell's key holds the digest, so that rows of different images are never one cell.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from obdlab.formats.oci import short_digest
from obdlab.lab.recipe import find_recipe, image_label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from obdlab.lab.bench import LabPaths
    from obdlab.lab.build import BuiltImage

#: By the image's name in the declaration: "digest" and "recipe".
Pins = dict[str, dict[str, str]]

_KEY = "pins"


def read_pins(directory: Path) -> Pins:
    """Return the pins of the last run in a results directory; {} if it has none."""
    try:
        pins = json.loads((directory / "spec.json").read_text()).get(_KEY, {})
    except (OSError, ValueError, AttributeError):
        return {}
    return pins if isinstance(pins, dict) else {}


def valid_pins(pins: Pins, names: Iterable[str], paths: LabPaths) -> Pins:
    """Return the pins of these images whose recipes still ask for the same. Raises RecipeError for one not found."""
    found = {name: find_recipe(name, paths.datasets).fingerprint() for name in names}
    return {name: pin for name, pin in pins.items() if pin.get("recipe") == found.get(name)}


def digests_of(pins: Pins) -> dict[str, str]:
    """Return the digests alone."""
    return {name: pin["digest"] for name, pin in pins.items()}


def make_pins(facts: Mapping[str, Mapping[str, Any]]) -> Pins:
    """Return the pins of images by what is known of them (``BuiltImage.facts``)."""
    return {name: {"digest": str(about["digest"]), "recipe": str(about["recipe"])} for name, about in facts.items()}


def obtain(names: Iterable[str], paths: LabPaths, pins: Pins, say: Callable[[str], None]) -> dict[str, BuiltImage]:
    """Return the pinned images, or others where there is no pin or its image is gone. ``say`` reports the latter.

    Raises what ``build_image`` does.
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
    """Return a sentence for each image that rows were measured with, by their environments."""
    notes = []
    for environment in environments:
        for name, about in environment.get("built", {}).items():
            told = f": {about['lock']}" if about["lock"] else ""
            notes.append(f"Image {image_label(name)} is {short_digest(about['digest'])}{told}.")
    return list(dict.fromkeys(notes))
