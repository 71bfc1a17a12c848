"""Shared by all tests."""

import patchsae.compat  # noqa: F401  (declares torchvision's operators before any test imports open_clip)

# isort: split
import pytest
from tiny import tiny_backbone, tiny_images


@pytest.fixture(scope="module")
def backbone():
    """Return a small CLIP of real architecture."""
    return tiny_backbone()


@pytest.fixture(scope="module")
def images():
    """Return 40 real scenes of 10 classes."""
    return tiny_images()
