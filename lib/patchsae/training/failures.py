"""What to say when a loss is not finite: on which images, and which parameter is likely to be at fault."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from patchsae.runs.errors import PatchSAEError
from patchsae.sae.step import Step

OUTLYING = 1e3  # times the median length, from which tokens rather than settings are to blame
HEAVY = 1e3  # times the reconstruction, from which the penalty is
NAMED = 5


def not_finite(
    step: Step,
    number: int,
    x: Tensor,
    images: Sequence[str | int],
    settings: dict[str, object],
    folder: Path,
) -> PatchSAEError:
    """Return the error for a step whose loss is not finite.

    Parameters
    ----------
    x : the batch's tokens [n, d]
    images : what the image of every token is called, n of them
    settings : 'lr', 'l1' and 'ghost' of the run
    folder : where the last checkpoint is
    """
    length = x.norm(dim=-1).double().cpu().numpy()
    order = np.argsort(-length, kind="stable") if len(length) else []
    names = list(dict.fromkeys(str(images[i]) for i in order))
    seen = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    parts = f"reconstruction {step.reconstruction:.3g}, L1 {step.l1_loss:.3g}, ghost {step.ghost:.3g}"
    return PatchSAEError(
        f"the loss is not finite at step {number} ({parts}), on tokens of the images {seen or '(none)'}, "
        f"longest first: {_likely(step, length, names, settings)}; nothing of that step is kept, and an "
        f"earlier checkpoint stays in '{folder}'."
    )


def _likely(step: Step, length: np.ndarray, names: list[str], settings: dict[str, object]) -> str:
    middle = float(np.median(length)) if len(length) else 0.0
    if middle and length.max() > OUTLYING * middle:
        return f"a token of {names[0]} is {length.max() / middle:.3g} times the median, so look there"
    if math.isfinite(step.reconstruction + step.l1_loss):
        return f"use ghost=False rather than {settings['ghost']}, as the ghost term alone is not"
    heavy = math.isfinite(step.reconstruction) and not step.l1_loss <= HEAVY * abs(step.reconstruction)
    name = "l1" if heavy else "lr"
    return f"use a smaller {name} than {settings[name]}"
