"""What is asked of numbers before anything is computed with them: finite weights, whole counts."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from patchsae.runs.errors import PatchSAEError


def check_weights(source: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights of which one is NaN or infinite.

    One such number can spread to every answer, and comparisons with NaN are false, so that a rank that
    counts what is greater takes it for a right answer.

    Raises
    ------
    PatchSAEError : names the source and the first such tensor.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise PatchSAEError(
                f"{source} has NaN or infinite values in {name}: fetch it again, or train it again."
            )


def check_finite(what: str, values: Tensor, remedy: str) -> Tensor:
    """Return values that are all finite.

    Raises
    ------
    PatchSAEError : one is NaN or infinite; `what` names the values, `remedy` is a clause.
    """
    if not torch.isfinite(values).all():
        raise PatchSAEError(f"{what} has NaN or infinite values; {remedy}.")
    return values


def check_counts(least: int = 1, **counts: object) -> None:
    """Refuse an argument that is no whole number, or below `least`.

    A batch of -1 images makes a loop of no steps, which ends without an error.

    Raises
    ------
    PatchSAEError : names the argument and its value.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise PatchSAEError(f"{name}={value!r} must be a whole number, {least} or more.")
