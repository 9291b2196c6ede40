"""The smallest real image, built once for all tests of the lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.lab.images.builder import build_image
from obdlab.lab.images.recipe import Recipe, find_recipe
from tests import capabilities

DATASETS = Path(__file__).parents[2] / "datasets"


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """The dataset "tiny"."""
    return find_recipe("tiny", [DATASETS])


@pytest.fixture(scope="session")
def tiny_layout(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its image as an OCI layout directory."""
    capabilities.require("kernel")
    return build_image(tiny_recipe, tmp_path_factory.mktemp("images")).layout
