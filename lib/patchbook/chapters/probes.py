"""What `learned` measures SAEs on: embedded scenes, and one pass over each kind for all SAEs together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchbook.scenes.catalogue import concepts
from patchbook.scenes.embedded import CLUTTERED, SceneSet, domain_sets, embedded_dataset, scene_set
from patchbook.scenes.pictograms import SLOTS, Scenes
from patchsae.clip.backbone import Backbone, zero_shot_logits, zero_shot_weights
from patchsae.clip.tail import Tail
from patchsae.images.sets import Subset
from patchsae.latents.accumulator import Accumulator
from patchsae.latents.maps import Fired, patch_cover
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.progress import progress_bar
from patchsae.sae.model import SAE
from patchsae.sae.step import latent_lists
from patchsae.training.activations import Tokens, token_columns

BATCH, CLASSES = 16, 64
RIDGE = 0.1  # of the mean variance, added to every dimension's: a concept has few training scenes


class Probes(NamedTuple):
    """What SAEs are measured on."""

    described: SceneSet | SceneSubset  # training scenes: references, principal and supervised directions
    scored: SceneSet  # scenes that error, sparsity and answers are measured on
    masked: Mapping[str, SceneSet]  # scenes of the same classes in each style: pointing and AP
    text: Tensor  # [C, e] a vector for each class of `scored`


class Described(NamedTuple):
    """What training scenes say."""

    top: dict[str, np.ndarray]  # int64 [k, S] by SAE: the scenes of each latent's references, or -1
    concepts: np.ndarray  # int64 [N, SLOTS]
    mean: Tensor  # [d] of all tokens
    basis: Tensor  # [d, d] principal directions in columns, the largest first
    directions: Tensor  # [concepts, d] Fisher's, of each concept's object patches against all patches


class Answers(NamedTuple):
    """What scored scenes say: sums over the tokens of each of N scenes."""

    spread: np.ndarray  # [N] ‖x - x̄‖²
    energy: np.ndarray  # [N, d] squared coordinates along each principal direction
    error: dict[str, np.ndarray]  # [N] ‖x - x̂‖²
    active: dict[str, np.ndarray]  # [N] active latents, mean over tokens
    fires: dict[str, np.ndarray]  # int64 [S] tokens that a latent fires on, over all scenes
    right: dict[str, np.ndarray]  # [N] 1 where the answer through the SAE is the label
    right_without: np.ndarray  # [N] the same without an SAE


def open_probes(
    backbone: Backbone, images: int = 1500, references: int = 8000, split: str = "test", seed: int = 0
) -> Probes:
    """Open the embedded scenes to measure on.

    `images` scenes are scored, and about as many with masks; `references` training scenes describe latents,
    the same ones that chapter 2 draws of as many with this seed.
    split='train' gives scored scenes of the training split's photos and textures that no SAE is trained on:
    for choosing recipes, so that test scenes are seen once.
    """
    device = backbone.device
    every = scene_set("train", device=device)
    scored = SceneSet(
        "scenes" if split == "test" else "validation", split, every.concept_of_label,
        every.styles, -(-images // len(every.classnames)), CLUTTERED, device,
    )  # fmt: skip
    classes = min(CLASSES, max(2, images // 12))  # at least four scenes of each class and style
    masked = domain_sets(split, classes, max(2, round(images / classes / 3)), device)
    masked.pop("silhouette")  # a style that nothing here was trained on
    text = zero_shot_weights(backbone, scored.classnames, embedded_dataset("concepts").template)
    drawn = every.sample(references, seed).indices
    return Probes(SceneSubset(every, drawn), first(scored, images), masked, text)


class SceneSubset(Subset):
    """Some scenes of a set, with their masks."""

    def scenes(self, indices: np.ndarray) -> Scenes:
        """Draw images together with their object masks."""
        return self.parent.scenes(self.indices[indices])


def first(images: SceneSet, n: int) -> SceneSet:
    """Keep the first n scenes of a set; classes are interleaved, so they stay balanced."""
    part = copy.copy(images)
    part.labels = images.labels[:n]
    return part


@torch.no_grad()
def read(
    backbone: Backbone, images: SceneSet | SceneSubset, title: str, shown: bool
) -> Iterator[tuple[np.ndarray, Scenes, Tensor]]:
    """Yield indices, scenes and all tokens [B, T, d] of a set, batch by batch; NaN is refused by name."""
    for start in progress_bar(range(0, len(images), BATCH), desc=title, unit="batch", shown=shown):
        rows = np.arange(start, min(start + BATCH, len(images)))
        scenes = images.scenes(rows)
        x = backbone.residual(backbone.normalize(scenes.images)).float()
        if not torch.isfinite(x).all():
            raise PatchSAEError(
                f"{backbone.name} gives tokens that are not finite on '{images.name}'; check its weights."
            )
        yield rows, scenes, x


class Moments:
    """Sums of tokens and of their products, in float64."""

    def __init__(self, d: int, device: torch.device | str = "cpu"):
        self.n, self.total = 0, torch.zeros(d, dtype=torch.float64, device=device)
        self.products = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        x = x.double()
        self.n += len(x)
        self.total += x.sum(0)
        self.products += x.T @ x

    @property
    def mean(self) -> Tensor:
        return self.total / self.n

    @property
    def covariance(self) -> Tensor:
        return self.products / self.n - torch.outer(self.mean, self.mean)


def describe(
    saes: Mapping[str, SAE],
    backbone: Backbone,
    images: SceneSet | SceneSubset,
    k: int = 10,
    progress: bool = True,
) -> Described:
    """Find every latent's references as the atlas does, and the directions that training scenes give."""
    columns = token_columns(backbone, Tokens.ALL)
    patches = np.flatnonzero(backbone.token_kind == "patch")
    kind, classes = np.zeros(len(columns), np.int8), len(images.classnames)
    sums = {name: Accumulator(s.d_sae, classes, len(images), kind, 0.0, k, 1) for name, s in saes.items()}
    everything, on_patches = (Moments(backbone.d_model, backbone.device) for _ in range(2))
    shown, many = [], Fisher(backbone.d_model, backbone.device)
    for rows, scenes, tokens in read(backbone, images, "describing latents", progress):
        x, on = tokens[:, columns].flatten(0, 1), tokens[:, patches].flatten(0, 1)
        for name, sae in saes.items():
            sums[name].update(latent_lists(sae, x), images.labels[rows], rows)
        everything.add(x)
        on_patches.add(on)
        many.add(scenes, on, backbone.grid)
        shown.append(scenes.concepts)
    basis = torch.linalg.eigh(everything.covariance).eigenvectors.flip(1)
    top = {name: s.top_index.T for name, s in sums.items()}
    directions = many.directions(on_patches)
    return Described(top, np.concatenate(shown), everything.mean.float(), basis.float(), directions)


class Fisher:
    """Object patches of each concept, for its linear discriminant against all patches."""

    def __init__(self, d: int, device: torch.device):
        n = len(concepts())  # few training scenes do not show every one
        self.total = torch.zeros(n, d, dtype=torch.float64, device=device)
        self.count = torch.zeros(n, dtype=torch.float64, device=device)

    def add(self, scenes: Scenes, x: Tensor, grid: tuple[int, int]) -> None:
        """Add patch tokens x [B · P, d]; a patch is an object's if it covers half of it."""
        for slot in range(SLOTS):
            inside = (patch_cover(scenes.masks == slot + 1, grid) >= 0.5).to(x.device)  # [B, P]
            image, concept = inside.nonzero()[:, 0].cpu().numpy(), scenes.concepts[:, slot]
            where = torch.from_numpy(concept[image]).to(x.device)
            if len(where):
                self.total.index_add_(0, where, x[inside.flatten()].double())
                self.count.index_add_(0, where, torch.ones_like(where, dtype=torch.float64))

    def directions(self, patches: Moments) -> Tensor:
        """Return Σ⁻¹ (mean of a concept - mean of all) [concepts, d], 0 for a concept never seen.

        With Σ of all patches the direction is that of the covariance within classes.
        """
        gap = self.total / self.count.clamp(min=1)[:, None] - patches.mean
        spread = patches.covariance
        spread = spread + RIDGE * spread.diagonal().mean() * torch.eye(len(spread), device=spread.device)
        found = torch.linalg.solve(spread, gap.T).T
        return (found * (self.count > 0)[:, None]).float()


class Directions:
    """Maps of given directions [C, d], for `score_latents`: what each patch's token has of them."""

    def __init__(self, rows: Tensor):
        self.rows, self.d_sae = rows, len(rows)

    def __call__(self, x: Tensor) -> Fired:
        value = (x.float() @ self.rows.T).permute(2, 0, 1)  # [C, B, P]
        c, b, p = value.shape
        latent, image = np.repeat(np.arange(c), b), np.tile(np.arange(b), c)
        flat = value.flatten().cpu().numpy()
        return Fired(image, latent, np.arange(c * b + 1) * p, np.tile(np.arange(p), c * b), flat)


@torch.no_grad()
def answer(
    saes: Mapping[str, SAE],
    counted: Mapping[str, SAE],
    backbone: Backbone,
    images: SceneSet,
    text: Tensor,
    described: Described,
    progress: bool = True,
) -> Answers:
    """Rebuild the tokens of scored scenes by `saes`; of those `counted` only what fires is noted."""
    columns, finish = token_columns(backbone, Tokens.ALL), Tail(backbone)
    labels, both = torch.from_numpy(images.labels).to(backbone.device), {**saes, **counted}
    first_, second, energy = [], [], []
    error, right = ({name: [] for name in (*saes, None)} for _ in range(2))
    active = {name: [] for name in both}
    fires = {name: torch.zeros(sae.d_sae, dtype=torch.int64) for name, sae in both.items()}

    def says(tokens: Tensor, rows: np.ndarray) -> Tensor:
        return (zero_shot_logits(backbone, finish(tokens), text).argmax(-1) == labels[rows]).float()

    for rows, _, tokens in read(backbone, images, "scoring SAEs", progress):
        x = tokens[:, columns]
        first_.append(x.double().sum(1))
        second.append(x.double().square().sum((1, 2)))
        energy.append(((x - described.mean) @ described.basis).double().square().sum(1))
        right[None].append(says(tokens, rows))
        for name, sae in both.items():
            f = sae.encode(x)
            active[name].append((f > 0).sum(2).double().mean(1))
            fires[name] += (f > 0).sum((0, 1)).cpu()
            if name in saes:
                x_hat = sae.decode(f, x)
                error[name].append((x - x_hat).double().square().sum((1, 2)))
                edited = tokens.clone()
                edited[:, columns] = x_hat
                right[name].append(says(edited, rows))
    first_, per = torch.cat(first_), len(columns)
    mean = first_.mean(0) / per
    spread = torch.cat(second) - 2 * first_ @ mean + per * mean @ mean

    def of(parts: Mapping) -> dict:
        return {name: torch.cat(rows).cpu().numpy() for name, rows in parts.items() if rows}

    answers = of(right)
    without = answers.pop(None)
    fired = {name: count.numpy() for name, count in fires.items()}
    energies = torch.cat(energy).cpu().numpy()
    return Answers(spread.cpu().numpy(), energies, of(error), of(active), fired, answers, without)
