"""Shared by all tests."""

import patchsae.compat  # noqa: F401  (declares torchvision's operators before any test imports open_clip)
