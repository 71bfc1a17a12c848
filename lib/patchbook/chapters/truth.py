"""What latents stand for, by known truth: the level of a factor that each tells best, on other scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchbook.chapters.factors import Factor, Levels, differ, levels, pair_base, plan_scenes, shown
from patchbook.scenes.pictograms import Layout, paint
from patchsae.clip.backbone import Backbone
from patchsae.latents.best_latents import random_sae
from patchsae.latents.maps import patch_tokens
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval, bootstrap, group_auroc
from patchsae.runs.progress import progress_bar
from patchsae.sae.model import SAE

Units = Callable[[Tensor], Tensor]  # tokens [N, d] to activations [N, U]


class Dictionary(StrEnum):
    """Directions that are asked what they stand for."""

    TRAINED = "trained SAE"
    UNTRAINED = "untrained SAE"  # random directions, as many active on a token as in the trained one
    PCA = "PCA directions"  # of training tokens; either sign is a unit
    RAW = "raw dimensions"  # of the residual stream; either sign is a unit


@dataclass(frozen=True)
class TruthConfig:
    """How many scenes are asked, and what counts."""

    images: int = 4000
    """Scenes with known levels; one half chooses a unit's level, the other half judges it."""
    pairs: int = 200
    """Scenes of which one factor is changed, for each factor."""
    fit_images: int = 64
    """Training scenes whose tokens PCA is fitted to and the untrained SAE is set by."""
    least: int = 6
    """Scenes of each half that must show a level, and of the first that a living unit must fire on."""
    auroc: float = 0.9
    """Held-out AUROC from which on a level explains a unit."""
    shrinkage: float = 0.3
    """Weight of the round covariance in the supervised directions."""
    seed: int = 0
    """Decides which scenes are drawn, and the untrained SAE."""

    def __post_init__(self):
        for name, least in (("images", 2), ("pairs", 1), ("fit_images", 1), ("least", 1)):
            if getattr(self, name) < least:
                raise PatchSAEError(f"{name}={getattr(self, name)} must be at least {least}.")


class Explained(NamedTuple):
    """What the U units of a dictionary tell of the L levels; -1 and NaN where one is not asked."""

    living: np.ndarray  # bool [U], fires on enough scenes to be asked
    level: np.ndarray  # int64 [U], the level it tells best on the first half
    auroc: np.ndarray  # float64 [U], of that level on the other half
    hit: np.ndarray  # bool [U], explained by that level
    share: Interval  # explained share of the living units, resampled by unit
    unit: np.ndarray  # int64 [L], the unit that tells a level best on the first half
    unit_auroc: np.ndarray  # float64 [L], of that unit on the other half


class Truth(NamedTuple):
    """What is known of every dictionary."""

    levels: Levels
    explained: dict[Dictionary, Explained]
    effects: dict[Dictionary, np.ndarray]
    """How far each factor moves each unit, in standard deviations over scenes: float64 [F, U]."""
    ceiling: np.ndarray
    """Held-out AUROC of each level's supervised direction: float64 [L], NaN where a level is not asked."""
    ahead: Interval
    """Explained share of the trained SAE minus that of the untrained one."""


def asked(in_a: np.ndarray, in_b: np.ndarray, least: int) -> np.ndarray:
    """Tell which levels [N, L] at least `least` scenes of each half have, and as many lack: bool [L]."""
    return np.all([(m.sum(0) >= least) & ((~m).sum(0) >= least) for m in (in_a, in_b)], axis=0)


def explain(
    a: np.ndarray, b: np.ndarray, in_a: np.ndarray, in_b: np.ndarray, config: TruthConfig | None = None
) -> Explained:
    """Choose what each unit stands for on half a and judge it on half b.

    Parameters
    ----------
    a, b : [N, U], the units' activations on the scenes of each half
    in_a, in_b : bool [N, L], the levels that these scenes show

    Raises
    ------
    PatchSAEError : too few scenes for any level, or an activation is not finite.
    """
    config = config or TruthConfig()
    usable = np.flatnonzero(asked(in_a, in_b, config.least))
    if not len(usable):
        raise PatchSAEError(f"no level has {config.least} scenes in either half; take more images.")
    chosen, judged = group_auroc(a, in_a[:, usable]), group_auroc(b, in_b[:, usable])  # [levels asked, U]
    living = (a > 0).sum(0) >= config.least
    best = chosen.argmax(0)
    score = np.where(living, judged[best, np.arange(len(best))], np.nan)
    hit = score >= config.auroc
    unit, unit_auroc = np.full(in_a.shape[1], -1), np.full(in_a.shape[1], np.nan)
    if living.any():
        unit[usable] = np.where(living, chosen, -1).argmax(1)
        unit_auroc[usable] = judged[np.arange(len(usable)), unit[usable]]
    share = bootstrap(hit[living], config.seed) if living.any() else Interval(np.nan, np.nan, np.nan)
    return Explained(living, np.where(living, usable[best], -1), score, hit, share, unit, unit_auroc)


def supervised(
    a: np.ndarray, b: np.ndarray, in_a: np.ndarray, in_b: np.ndarray, shrinkage: float
) -> np.ndarray:
    """Return the AUROC on half b of linear discriminants fitted to half a: [N, d], bool [N, L] to [L].

    Each is the difference of class means through the common covariance, which is drawn towards a round one.
    NaN for a level that a half lacks.
    """
    a, b = (half.astype(np.float64) - a.mean(0, dtype=np.float64) for half in (a, b))
    covariance = a.T @ a / len(a)
    round_ = np.eye(len(covariance)) * covariance.trace() / len(covariance)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = in_a.T.astype(np.float64) @ a / in_a.sum(0)[:, None]
    means[~np.isfinite(means)] = 0
    directions = np.linalg.solve((1 - shrinkage) * covariance + shrinkage * round_, means.T)  # [d, L]
    both = zip((b @ directions).T, in_b.T, strict=True)
    return np.array([group_auroc(s[:, None], m[:, None])[0, 0] for s, m in both])


def selectivity(effect: np.ndarray) -> np.ndarray:
    """Return the strongest factor's share of what moves each unit: [F, U] to [U], NaN for a still one."""
    with np.errstate(invalid="ignore"):
        return effect.max(0) / effect.sum(0)


def explained_by(truth: Truth, name: Dictionary) -> np.ndarray:
    """Count a dictionary's explained units by the factor of their level: int64 [F]."""
    found = truth.explained[name]
    return np.bincount(truth.levels.factor[found.level[found.hit]], minlength=len(Factor))


def clearest(truth: Truth, name: Dictionary, per_factor: int) -> np.ndarray:
    """List the units with the highest held-out AUROC of each factor, explained or not, factor by factor."""
    found = truth.explained[name]
    units = np.flatnonzero(found.living)
    units = units[np.lexsort((-found.auroc[units], truth.levels.factor[found.level[units]]))]
    factor = truth.levels.factor[found.level[units]]
    return np.concatenate([units[factor == f][:per_factor] for f in range(len(Factor))])


def coverage(truth: Truth, factor: Factor | None = None) -> dict[str, np.ndarray]:
    """Return the held-out AUROC of each level's best unit, and of the ceiling: float64 [levels] by name."""
    own = truth.levels.factor == tuple(Factor).index(factor) if factor else np.s_[:]
    best = {str(name): found.unit_auroc[own] for name, found in truth.explained.items()}
    return best | {"supervised directions": truth.ceiling[own]}


def dictionaries(sae: SAE, x: Tensor, seed: int = 0) -> dict[Dictionary, Units]:
    """Return the SAE and what it is compared with, fitted to training tokens x [N, d]."""
    mean = x.mean(0)
    axes = torch.linalg.eigh((x - mean).T.double() @ (x - mean).double()).eigenvectors.flip(1).to(x)

    def both(z: Tensor) -> Tensor:
        return torch.cat([z, -z], -1)

    return {
        Dictionary.TRAINED: sae.encode,
        Dictionary.UNTRAINED: random_sae(sae, x, seed).encode,
        Dictionary.PCA: lambda tokens: both((tokens - mean) @ axes),
        Dictionary.RAW: both,
    }


@torch.no_grad()
def strongest(
    units: Mapping[Dictionary, Units], backbone: Backbone, plan: Layout, split: str, batch_size: int = 16
) -> tuple[dict[Dictionary, np.ndarray], np.ndarray]:
    """Return each unit's highest activation over the patches of each scene, and the mean patch token.

    Float32 [N, U] by dictionary, and [N, d]; the tower sees a scene once.
    """
    scenes, done, highest = len(plan.concepts), 0, {}
    means = np.empty((scenes, backbone.d_model), np.float32)
    for x in progress_bar(
        _tokens(backbone, plan, split, batch_size), desc="scenes of known truth", leave=False,
        total=-(-scenes // batch_size),
    ):  # fmt: skip
        rows, done = slice(done, done + len(x)), done + len(x)
        means[rows] = x.mean(1).cpu().numpy()
        for name, unit in units.items():
            found = unit(x.flatten(0, 1)).unflatten(0, x.shape[:2]).amax(1).cpu().numpy()
            # a small array of each batch would part what the large ones leave, and keep it from being used
            if name not in highest:
                highest[name] = np.empty((scenes, found.shape[1]), np.float32)
            highest[name][rows] = found
    return highest, means


def _tokens(backbone: Backbone, plan: Layout, split: str, batch_size: int = 16) -> Iterator[Tensor]:
    """Draw the scenes of a plan a few at a time, and yield their patch tokens [B, P, d]."""
    for first in range(0, len(plan.concepts), batch_size):
        part = Layout(*(field[first : first + batch_size] for field in plan))
        yield patch_tokens(backbone, paint(part, split, backbone.image_size, backbone.device).images)


@torch.no_grad()
def known_truth(sae: SAE, backbone: Backbone, config: TruthConfig | None = None) -> Truth:
    """Ask an SAE and what it is compared with what their units stand for, and which factor moves them.

    The activation of a scene is the highest over its patches, for an object covers few of them; CLS has no
    part. Scenes are of the test split; what is fitted without levels sees training scenes alone. The
    supervised directions read the mean patch token, never a mask.
    """
    config = config or TruthConfig()
    key = f"truth/{config.seed}"
    fit = plan_scenes(config.fit_images, f"{key}/fit")
    x = torch.cat(list(_tokens(backbone, fit, "train"))).flatten(0, 1)
    units = dictionaries(sae, x, config.seed)
    half = config.images // 2
    plans = [plan_scenes(n, f"{key}/{part}") for part, n in (("a", half), ("b", config.images - half))]
    (a, mean_a), (b, mean_b) = (strongest(units, backbone, plan, "test") for plan in plans)
    in_a, in_b = map(shown, plans)
    explained = {name: explain(a[name], b[name], in_a, in_b, config) for name in units}
    base = pair_base(config.pairs, f"{key}/pairs")
    before, moved = strongest(units, backbone, base, "test")[0], {name: [] for name in units}
    for factor in Factor:
        after = strongest(units, backbone, differ(base, factor, f"{key}/pairs").b, "test")[0]
        for name in units:
            moved[name].append(abs(after[name] - before[name]).mean(0, dtype=np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        effects = {
            name: np.where(e.living, np.stack(moved[name]) / a[name].std(0, dtype=np.float64), np.nan)
            for name, e in explained.items()
        }
    ceiling = np.where(
        asked(in_a, in_b, config.least), supervised(mean_a, mean_b, in_a, in_b, config.shrinkage), np.nan
    )
    first, other = (explained[name] for name in (Dictionary.TRAINED, Dictionary.UNTRAINED))
    return Truth(levels(), explained, effects, ceiling, _difference(first, other, config.seed))


def _difference(one: Explained, other: Explained, seed: int, draws: int = 2000) -> Interval:
    """Subtract two shares, the units of each resampled on their own: a resampled count is binomial."""
    rng, shares = np.random.default_rng(seed), []
    for found in (one, other):
        n, p = int(found.living.sum()), float(found.share.value)
        if not n:
            return Interval(np.nan, np.nan, np.nan)
        shares.append(rng.binomial(n, p, draws) / n)
    low, high = np.quantile(shares[0] - shares[1], (0.025, 0.975))
    return Interval(one.share.value - other.share.value, float(low), float(high))
