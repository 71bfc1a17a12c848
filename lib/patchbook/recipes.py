"""Which autoencoders the repository ships, and what each is trained from; the numbers are the scale's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchbook.chapters.ablation import ALL_TOKENS, DESIGNS, Budget, Design, Sweep
from patchbook.scales import Scale, Sets, Task, scale
from patchsae.adaptation.prompt_files import find_prompts
from patchsae.clip.backbone import Backbone, zero_shot_weights
from patchsae.images.sets import ImageSet
from patchsae.masking.through import reconstruction, through_sae, zero_shot
from patchsae.runs.stage import project_root, versions
from patchsae.sae.model import SAE
from patchsae.training.activations import Tokens, token_columns
from patchsae.training.starts import set_start
from patchsae.training.stream import TokenStream
from patchsae.training.token_cache import from_cache
from patchsae.training.trainer import Trained

IMAGES_LICENCE = "OpenMoji CC BY-SA 4.0, Twemoji CC BY 4.0"
TWIN = "all, other seed"
"""The row that the paper's table does not have: all tokens from another seed."""
PROMPT_SEED = 1  # of the adapted CLIP that one autoencoder is trained on, as in chapter 5
PCA_IMAGES = 256  # training images whose tokens give the principal components: 50,000 tokens


@dataclass(frozen=True)
class Plan:
    """The size of what is shipped; the defaults are the book's."""

    scale: Scale
    """Scale whose recipe it is."""
    budget: Budget = Budget()
    """Images of the rows of Table 2."""
    test_images: int = 1000
    """Test images that each autoencoder is measured on for its card."""


class Recipe(NamedTuple):
    """One autoencoder of the repository."""

    about: str
    """What it is, in words."""
    backbone: Backbone
    """Cut at the block whose output is decomposed."""
    task: Task
    """Images and settings, as the chapters ask for them."""


def book_plan() -> Plan:
    """Return the plan of `make saes`."""
    return Plan(scale("embedded"))


def tiny_plan() -> Plan:
    """Return a plan of a few images, by which no number means anything: to see that every recipe runs."""
    setup = scale("embedded")
    train = replace(setup.train, images=48, token_batch=512, warmup_steps=2, log_every=4)
    budget = Budget(row_images=16, cls_images=64, different_images=16, cls_different_images=24)
    return Plan(replace(setup, expansion=1, different_images=24, train=train), budget, test_images=16)


def recipes(plan: Plan, work: str | Path) -> dict[str, Callable[[], Recipe]]:
    """Return every shipped autoencoder by name, as a function that opens its recipe.

    Parameters
    ----------
    work : folder of the cached tokens
    """
    setup, found = plan.scale, {}
    first = setup.ships[0]
    for block, seed in setup.ships:
        name = "main" if (block, seed) == first else f"seed{seed}" if block == first[0] else f"block{block}"
        about = f"all tokens, block {block}, seed {seed}"
        found[name] = lambda block=block, seed=seed, about=about: _of_scale(
            plan, work, about, block, {}, {"seed": seed}
        )
    if setup.topk_sae:
        found["topk"] = lambda: _of_scale(
            plan, work, "TopK beside the ReLU of the paper", setup.block, setup.topk_sae, setup.topk_train
        )
    found["maple"] = lambda: _of_adapted(plan, work)
    # Rows on all tokens by the scale's own run are those above. "CLS, B/16" is "CLS, default" where one
    # backbone plays both.
    designs = {n: d for n, d in DESIGNS.items() if d.tokens is Tokens.CLS and n != "CLS, B/16"}
    if plan.budget.row_images:
        alike = {n: d for n, d in DESIGNS.items() if d.tokens is Tokens.ALL}
        designs |= alike | {TWIN: replace(ALL_TOKENS, replicate=1)}
    for name, design in designs.items():
        found[f"table2-{_slug(name)}"] = lambda name=name, design=design: _row(plan, work, name, design)
    return found


def measure(recipe: Recipe, trained: Trained, sets: Sets, setup: Scale, plan: Plan, work: str) -> dict:
    """Measure an autoencoder for its card, on test images and the tokens it is trained on.

    Returns
    -------
    {"fvu", "l0", "dead_share", "mse", "cosine", "cosine_with_start", "fvu_pca", "accuracy",
    "accuracy_through_sae", "images"}; `fvu_pca` is that of as many principal components of training tokens
    as latents are active, `cosine_with_start` the mean over latents of a decoder row with its own start
    """
    sae, tokens = trained.sae, recipe.task.train.tokens
    test = sets.test.sample(plan.test_images)
    prompted = "prompt" in recipe.backbone.token_kind  # tokens of prompts are not cached
    images, past = from_cache(test, recipe.backbone, "" if prompted else work)
    rebuilt = reconstruction(sae, past, images, tokens)
    stream = TokenStream(recipe.task.images, recipe.backbone, recipe.task.train)
    start = SAE(sae.config, recipe.task.train.seed)
    set_start(start, stream, recipe.task.train)
    moved = F.cosine_similarity(start.W_dec, sae.W_dec, dim=1)
    enough = PCA_IMAGES * recipe.backbone.n_tokens // stream.activations.tokens
    basis = stream.first(enough).flatten(0, 1)
    text = zero_shot_weights(recipe.backbone, test.classnames, setup.prompts(sets.benchmarks[0]))
    edits = (None, through_sae(sae, past, tokens))
    right = zero_shot(past, images, text, edits, progress=None).predictions == test.labels
    accuracy = right.mean(1).tolist()
    return {
        **{name: getattr(rebuilt, name) for name in ("fvu", "l0", "dead_share", "mse", "cosine")},
        "cosine_with_start": moved.mean().item(),
        "fvu_pca": fvu_of_pca(basis, _tokens_of(images, past, tokens), round(rebuilt.l0)),
        "accuracy": accuracy[0],
        "accuracy_through_sae": accuracy[1],
        "images": len(test),
    }


def card_of(recipe: Recipe, trained: Trained, measured: dict, seconds: float) -> dict[str, object]:
    """Return what an artefact's card says, but for what `shipped.put` adds."""
    task = recipe.task
    return {
        "about": recipe.about,
        "train": task.train.inputs(),
        "block": recipe.backbone.block,
        "backbone": {"name": recipe.backbone.name, "fingerprint": recipe.backbone.fingerprint()},
        "images": {
            "name": f"{task.images.name}/{task.images.split}",
            "fingerprint": task.images.fingerprint(),
            "different": len(task.images),
            "seen": task.train.images,
        },
        "tokens": int(trained.metrics[-1]["tokens"]),
        "seed": task.train.seed,
        "seconds": round(seconds, 1),
        "measured": measured,
        "licence": {"weights": "MIT", "images": IMAGES_LICENCE},
        "torch": versions()["torch"],
    }


def fvu_of_pca(basis: Tensor, x: Tensor, components: int) -> float:
    """Compute the FVU of tokens x [N, d] rebuilt from that many principal components of basis [M, d]."""
    centre = basis.double().mean(0)
    axes = torch.linalg.eigh(torch.cov((basis.double() - centre).T)).eigenvectors  # ascending
    kept = axes[:, axes.shape[1] - min(components, axes.shape[1]) :]
    gap = x.double() - centre
    left = gap - gap @ kept @ kept.T
    return (left.square().sum() / (x.double() - x.double().mean(0)).square().sum()).item()


def _of_scale(plan: Plan, work, about: str, block: int, sae: dict, train: dict) -> Recipe:
    backbone = plan.scale.backbone(block=block)
    images = plan.scale.sets(backbone, "").train
    return Recipe(about, backbone, plan.scale.task(images, backbone, Path(work), sae, train))


def _of_adapted(plan: Plan, work) -> Recipe:
    setup = plan.scale
    plain = setup.backbone()
    general = setup.sets(plain, "").benchmarks[0]
    backbone = find_prompts(project_root() / "artefacts" / "prompts", general.name, plain, PROMPT_SEED)
    images = setup.sets(backbone, "").train
    about = f"all tokens of MaPLe for {general.title}, block {backbone.block}, seed 0"
    return Recipe(about, backbone, setup.task(images, backbone, Path(work)))


def _row(plan: Plan, work, name: str, design: Design) -> Recipe:
    setup = plan.scale
    sweep = Sweep(
        setup.name, expansion=setup.expansion, l1=setup.l1, **plan.budget.runs(setup, work, seed=0)
    )
    backbone = sweep.backbone(design)
    images = plan.budget.sets(setup, setup.sets(backbone, "").train, seed=0)[design.tokens]
    return Recipe(f"Table 2, {name}", backbone, Task(images, *sweep.configs(design)))


def _tokens_of(images: ImageSet, backbone: Backbone, tokens: Tokens) -> Tensor:
    columns = torch.from_numpy(token_columns(backbone, tokens))
    with torch.no_grad():
        parts = [backbone.residual(backbone.normalize(b.images))[:, columns] for b in images.batches(64)]
    return torch.cat(parts).flatten(0, 1).float()


def _slug(name: str) -> str:
    """Turn a row's title into a folder's name: 'λ × 10' is 'l1-times-10'."""
    for sign, word in (
        ("λ", "l1"),
        ("×", "times"),
        ("/", "over"),
        ("=", "is"),
        ("(", ""),
        (")", ""),
        (",", ""),
    ):
        name = name.replace(sign, word)
    return "-".join(name.lower().replace("_", "-").split())
