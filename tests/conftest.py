"""Shared by all tests."""

import os

import torch

# Triton reads this on import, which other tests cause before test_sparse_gpu is collected.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import patchsae.compat  # noqa: E402, F401  (declares torchvision's operators before open_clip is imported)

# isort: split
import pytest  # noqa: E402
from tiny import tiny_backbone, tiny_images  # noqa: E402


@pytest.fixture(scope="module")
def backbone():
    """Return a small CLIP of real architecture."""
    return tiny_backbone()


@pytest.fixture(scope="module")
def images():
    """Return 40 real scenes of 10 classes."""
    return tiny_images()
