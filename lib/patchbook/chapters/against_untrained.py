"""One SAE against an untrained one of the same L0, by every measure that training should move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchbook.chapters.probes import Directions, Probes, answer, describe, first, read
from patchsae.clip.backbone import Backbone
from patchsae.latents.best_latents import alternate, choose, random_sae, score_of
from patchsae.latents.scores import Metric, Scores, score_latents
from patchsae.latents.stability import Against, matched_cosines, pairs
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval, bootstrap, bootstrap_ratio
from patchsae.sae.model import SAE
from patchsae.training.activations import Tokens, token_columns

K = 10  # references of a latent
LIVING = 10  # tokens that a living latent fires on, at least
SAMPLE = 768  # scored scenes that an untrained SAE is made as sparse on as the trained one
STRIDE = 11  # one token in so many of them; prime, so that all places of a scene take part


class Purity(NamedTuple):
    """Which share of a latent's references have its commonest concept, over living latents."""

    mean: Interval
    null: float  # the same concepts dealt out at random
    half: Interval  # share of latents above .5
    untrained: Interval
    ahead: Interval  # trained - untrained
    half_ahead: Interval


class Lead(NamedTuple):
    """The best latent of each class, chosen on half of the scenes and scored on the other."""

    best: Interval
    untrained: Interval
    ceiling: Interval  # a supervised direction of each class: it knows the training scenes' masks
    ahead: Interval  # trained - untrained, scene by scene
    way: Interval  # (trained - untrained) / (ceiling - untrained)


class Learned(NamedTuple):
    """What one SAE has learned; None where there is nothing to compare with."""

    decoder: Interval | None  # cosine of a row with its own start
    encoder: Interval | None
    matched: Interval | None  # cosine of latents matched one to one with other seeds'
    chance: Interval | None  # the same with the other's dimensions permuted
    matched_living: Interval | None
    living: float  # share of latents that fire on at least LIVING tokens
    l0: float
    untrained_l0: float
    fvu: Interval
    pca: Interval  # FVU of round(L0) principal components of training tokens
    fvu_over_pca: Interval  # fvu - pca, image by image
    purity: Purity  # by the scene's label
    any_purity: Purity  # by any object of the scene
    pointing: Lead
    pointing_several: Lead  # scenes of two or more objects
    precision: Lead
    kept: Interval  # accuracy through the SAE / accuracy


def measure(
    saes: Mapping[str, SAE],
    backbone: Backbone,
    probes: Probes,
    starts: Mapping[str, SAE | None],
    others: Sequence[SAE] | None = (),
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Learned]:
    """Measure SAEs by name, each against an untrained SAE of its own L0, the tower run once per image.

    Parameters
    ----------
    starts : each SAE before training: `SAE(config, seed)`, or another where rows began as data; None where
        it is not known
    others : SAEs of the same recipe from other seeds; those of `saes` are matched with one another too.
        None matches nothing: for `saes` of different recipes
    seed : of untrained SAEs, of nulls and of intervals

    Raises
    ------
    PatchSAEError : weights or tokens that are not finite; no latent with a full set of references.
    """
    extra = {f"other {n}": sae for n, sae in enumerate(others or ())}
    for name, sae in {**saes, **extra}.items():
        if not all(bool(torch.isfinite(w).all()) for w in sae.state_dict().values()):
            raise PatchSAEError(f"SAE '{name}' has numbers that are not finite; remake it (make saes).")
    tokens = sample(backbone, probes)
    control = {f"untrained {name}": random_sae(sae, tokens, seed) for name, sae in saes.items()}
    seen = describe({**saes, **control}, backbone, probes.described, K, progress)
    said = answer(saes, {**control, **extra}, backbone, probes.scored, probes.text, seen, progress)
    concept = next(iter(probes.masked.values())).concept_of_label
    maps = {**saes, **control, "ceiling": Directions(seen.directions[concept])}
    scored = score_latents(maps, backbone, probes.masked, progress=progress).scores
    labels = probes.described.labels[:, None]  # one concept a scene
    living = {name: count >= LIVING for name, count in said.fires.items()}
    found = {}
    for name, sae in saes.items():
        own, plain = seen.top[name], seen.top[f"untrained {name}"]
        tables = scored[name], scored[f"untrained {name}"], scored["ceiling"]
        same = {} if others is None else {**saes, **extra}
        rest = {key: other for key, other in same.items() if key != name}
        l0 = float(said.active[name].mean())
        error, pca = said.error[name], said.energy[:, round(l0) :].sum(1)
        found[name] = Learned(
            *(from_start(sae, starts[name], rows, seed) for rows in ("W_dec", "W_enc")),
            *match(sae, rest, living | {None: living[name]}, seed),
            float(living[name].mean()), l0,
            float(said.active[f"untrained {name}"].mean()),
            *(bootstrap_ratio(v, said.spread, seed) for v in (error, pca, error - pca)),
            purity(own, plain, labels, seed), purity(own, plain, seen.concepts, seed),
            lead(tables, Metric.POINTING, 1, seed), lead(tables, Metric.POINTING, 2, seed),
            lead(tables, Metric.PRECISION, 1, seed),
            bootstrap_ratio(said.right[name], said.right_without, seed),
        )  # fmt: skip
    return found


def sample(backbone: Backbone, probes: Probes) -> Tensor:
    """Return tokens [N, d] of scored scenes, on which untrained SAEs are made as sparse as trained ones.

    Of scored scenes, because sparsity differs between the photos and textures of two splits.
    """
    columns, few = token_columns(backbone, Tokens.ALL), first(probes.scored, SAMPLE)
    parts = [x[:, columns].flatten(0, 1)[::STRIDE] for _, _, x in read(backbone, few, "tokens", False)]
    return torch.cat(parts)


@torch.no_grad()
def from_start(sae: SAE, start: SAE | None, rows: str, seed: int = 0) -> Interval | None:
    """Return the mean cosine of each row of `rows` ('W_dec' or 'W_enc') with what it began as."""
    if start is None:
        return None
    now, then = getattr(sae, rows), getattr(start, rows).to(getattr(sae, rows))
    if now.shape != then.shape:
        raise PatchSAEError(
            f"the SAE has rows {list(now.shape)} and its start {list(then.shape)}; give its own start."
        )
    return bootstrap(F.cosine_similarity(now, then, dim=1).cpu().numpy(), seed)


class Matched(NamedTuple):
    """Latents matched one to one with those of other seeds, over latents of all pairs."""

    matched: Interval | None
    chance: Interval | None
    living: Interval | None


@torch.no_grad()
def match(
    sae: SAE, others: Mapping[str, SAE], living: Mapping[str | None, np.ndarray], seed: int
) -> Matched:
    """Match a dictionary with every other one, and with its dimensions permuted, which is chance.

    `living` marks each other's living latents, bool [S], and by None those of `sae`.
    """
    same, chance, alive = [], [], []
    for name, other in others.items():
        found = pairs(sae, other, (seed, seed), draw=seed)
        same.append(matched_cosines(*found[Against.SEED]))
        chance.append(matched_cosines(*found[Against.PERMUTED]))
        if living[None].any() and living[name].any():
            a, b = (s.W_dec[torch.from_numpy(living[key])] for key, s in ((None, sae), (name, other)))
            alive.append(matched_cosines(a, b))
    return Matched(*(bootstrap(np.concatenate(v), seed) if v else None for v in (same, chance, alive)))


def dominant(concepts: np.ndarray) -> np.ndarray:
    """Return the share of a latent's references that show its commonest concept.

    concepts [k, n, slots], -1 for none, to float64 [n]; a scene that shows a concept twice counts once.
    """
    k, n, _ = concepts.shape
    held = np.sort(concepts, -1)
    held[..., 1:][held[..., 1:] == held[..., :-1]] = -1
    here, most = held >= 0, int(held.max()) + 1
    latent = np.broadcast_to(np.arange(n)[:, None], held.shape)
    counts = np.bincount(latent[here] * most + held[here], minlength=n * most)
    return counts.reshape(n, most).max(1) / k


def purity(
    top: np.ndarray, untrained: np.ndarray, concepts: np.ndarray, seed: int = 0, draws: int = 100
) -> Purity:
    """Compare how alike references are in a trained and in an untrained SAE.

    Parameters
    ----------
    top, untrained : int64 [k, S], the scenes of each latent's references; a latent with -1 is left out
    concepts : int64 [N, slots] of each scene

    Raises
    ------
    PatchSAEError : no latent has all its references.
    """
    full = [t[:, (t >= 0).all(0)] for t in (top, untrained)]
    if not all(t.shape[1] for t in full):
        raise PatchSAEError(f"no latent has {len(top)} reference images; take more training scenes.")
    own, plain = (dominant(concepts[t]) for t in full)
    rng, k, n = np.random.default_rng(seed), *full[0].shape
    dealt = concepts[full[0].ravel()]
    null = [dominant(rng.permutation(dealt).reshape(k, n, -1)).mean() for _ in range(draws)]
    above = [(v > 0.5).astype(float) for v in (own, plain)]
    return Purity(
        bootstrap(own, seed), float(np.mean(null)), bootstrap(above[0], seed),
        bootstrap(plain, seed), gap(own, plain, seed), gap(*above, seed),
    )  # fmt: skip


def gap(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 2000) -> Interval:
    """Return mean(a) - mean(b) of two unpaired samples with a percentile interval over both."""
    rng = np.random.default_rng(seed)
    drawn = [np.array([v[rng.integers(len(v), size=len(v))].mean() for _ in range(draws)]) for v in (a, b)]
    low, high = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
    return Interval(float(a.mean() - b.mean()), float(low), float(high))


def lead(tables: tuple[Scores, Scores, Scores], metric: Metric, objects: int = 1, seed: int = 0) -> Lead:
    """Score the best latent of each class, an untrained SAE's, and the supervised direction of the class.

    tables: scores of trained, untrained and of a direction for each label; scenes of at least so many
    objects are reported, others help to choose. Intervals are over scenes, choices held fixed.
    """
    labels = tables[0].labels
    on = alternate(labels, tables[0].group)
    report = ~on & (tables[0].objects >= objects)
    if not report.any():
        raise PatchSAEError(f"no scene of {objects} or more objects is scored; take more test scenes.")
    best, plain = (score_of(t, metric, choose(t, metric, on)[labels])[report] for t in tables[:2])
    most = score_of(tables[2], metric, labels)[report]
    means = (bootstrap(v, seed) for v in (best, plain, most, best - plain))
    return Lead(*means, bootstrap_ratio(best - plain, most - plain, seed))
