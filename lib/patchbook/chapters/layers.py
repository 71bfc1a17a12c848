"""Chapter 3, Fig. 9: what autoencoders of earlier blocks see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from patchbook.chapters.localization import Described, Scene, strongest
from patchbook.chapters.mask_scores import TITLES
from patchbook.chapters.opening import Run
from patchbook.chapters.verdicts_of_latents import NO_MASKS, lacking, richer_deeper
from patchbook.figures import Layer, Shown
from patchbook.report import Finding, finding
from patchbook.scenes.embedded import domain_sets
from patchbook.tables import Table, estimate, fixed
from patchsae.clip.backbone import Backbone
from patchsae.images.sets import ImageSet
from patchsae.latents.atlas import AtlasConfig
from patchsae.latents.best_latents import alternate, choose, random_sae, score_of
from patchsae.latents.maps import masked_images, patch_tokens
from patchsae.latents.scores import Metric, Pass, Scores, score_latents
from patchsae.masking.through import reconstruction
from patchsae.runs.intervals import bootstrap
from patchsae.sae.model import SAE

SHORT = {"token_batch": 256, "warmup_steps": 50}  # or few images make too few steps
FIT_IMAGES, TEST_IMAGES, SHOWN = 32, 64, 3


@dataclass(frozen=True)
class Blocks:
    """An autoencoder for each of some blocks, all trained alike."""

    run: Run
    saes: Mapping[int, SAE]
    cuts: Mapping[int, Backbone]
    atlases: Mapping[int, xr.Dataset]
    images: ImageSet
    """What they are described on."""
    config: AtlasConfig

    @cached_property
    def streams(self) -> dict[int, Tensor]:
        """Return training tokens [N, d] of each block."""
        sample = self.run.sets.train.sample(FIT_IMAGES, self.run.seed)
        images = self.run.backbone.normalize(sample.load(range(len(sample))).images)
        with torch.no_grad():
            found = self.run.backbone.residuals(images, list(self.saes))
        return {block: found[block].flatten(0, 1).float() for block in self.saes}

    def strength(self, block: int) -> tuple[float, float]:
        """Return the mean activation of active tokens, and the same over the mean norm of a token."""
        x = self.streams[block]
        with torch.no_grad():
            f = self.saes[block].encode(x)
        mean = (f.sum() / (f > 0).sum()).item()
        return mean, mean / x.norm(dim=1).mean().item()


def open_blocks(
    run: Run, blocks: Sequence[int], images: int | None, atlas_images: int, config: AtlasConfig
) -> Blocks:
    """Train an autoencoder on each block, on so many images (None: the scale's); describe its latents."""
    less = run.changes.train | ({"images": images} | SHORT if images else {})
    drawn = run.sets.train.sample(atlas_images, run.seed)
    saes, cuts, atlases = {}, {}, {}
    for block in blocks:
        cut = run.backbone.at_block(block)
        trained = run.setup.trained_sae(
            run.sets.train, cut, run.root, run.changes.sae, less, progress=False
        )
        saes[block], cuts[block] = trained.sae, cut
        atlases[block] = run.atlas(drawn, config, cut, trained)
    return Blocks(run, saes, cuts, atlases, drawn, config)


def panels(found: Blocks, scene: Scene) -> list[Layer]:
    """Return Fig. 9: the strongest latents of each block at the first marked patch, and statistics."""
    layers = []
    for block, sae in found.saes.items():
        cut, about = found.cuts[block], Described(found.atlases[block], found.images, found.config)
        with torch.no_grad():
            at_patch = sae.encode(patch_tokens(cut, scene.images))[0, scene.marked[0]].cpu().numpy()
        rows = {}
        for latent in strongest(at_patch, about.usual, SHOWN):
            index = about.atlas.top_index.values[:4, latent]
            batch = found.images.load(index[index >= 0])
            inside = masked_images(sae, cut, scene.images, latent)
            masks = masked_images(sae, cut, batch.images, latent, common_peak=False)
            names = [found.images.classnames[label] for label in batch.labels]
            rows[int(latent)] = Shown(
                f"latent {latent}: activation {at_patch[latent]:.2f}", inside, masks, names
            )
        layers.append(Layer(f"block {block}", at_patch, rows, about.atlas))
    return layers


def score_blocks(found: Blocks, classes: int, class_images: int, tau: float) -> dict[str, Scores] | None:
    """Score the masks of each block's SAE, and of a random one as sparse; None without object masks."""
    run = found.run
    if not run.has_masks:
        return None
    maps, where = {}, {}
    for block, sae in found.saes.items():
        random = random_sae(sae, found.streams[block], run.seed)
        for kind, one in (("trained", sae), ("random", random)):
            maps[f"{kind} {block}"], where[f"{kind} {block}"] = one, block
    drawn = domain_sets("test", classes, class_images, run.backbone.device)
    one_style = {"openmoji": drawn["openmoji"]}
    return run.keep(
        "block-scores", Pass, lambda: score_latents(maps, run.backbone, one_style, tau, where),
        one_style.values(), saes={block: sae.fingerprint() for block, sae in found.saes.items()}, tau=tau,
    ).scores  # fmt: skip


def best_scores(scores: Mapping, block: int, kind: str, metric: Metric) -> np.ndarray:
    """Return the score of each class's best latent on the scenes that did not choose it: [N]."""
    part = scores[f"{kind} {block}"]
    half = alternate(part.labels)
    return score_of(part, metric, choose(part, metric, half)[part.labels])[~half]


def block_table(found: Blocks, scores: Mapping | None) -> Table:
    """Return what each block's autoencoder rebuilds, how active it is, and what its masks are worth."""
    run, rows = found.run, {}
    test = run.sets.test.sample(TEST_IMAGES, run.seed)
    for block, sae in found.saes.items():
        rebuilt, (mean, relative) = (
            reconstruction(sae, found.cuts[block], test),
            found.strength(block),
        )
        line = {
            "FVU": fixed(rebuilt.fvu, 3),
            "L0": fixed(rebuilt.l0, 1),
            "activation": fixed(mean, 2),
            "activation / norm": fixed(relative, 3),
        }
        for metric in (Metric.POINTING, Metric.PRECISION) if scores else ():
            ours, random = (best_scores(scores, block, kind, metric) for kind in ("trained", "random"))
            line[TITLES[metric]] = fixed(ours.mean(), 2)
            line[f"{TITLES[metric]}, random SAE"] = fixed(random.mean(), 2)
            line[f"{TITLES[metric]}, difference"] = estimate(bootstrap(ours - random, run.seed))
        rows[f"block {block}"] = line
    return Table("Autoencoders of four blocks, trained alike.", rows, ("",), folded=True)


def fig_9(found: Blocks, scores: Mapping | None) -> Finding:
    """Judge Fig. 9."""
    told = lacking(NO_MASKS)
    if scores:
        ahead = [
            best_scores(scores, block, "trained", Metric.PRECISION)
            - best_scores(scores, block, "random", Metric.PRECISION)
            for block in found.saes
        ]
        strength = [found.strength(block) for block in found.saes]
        told = richer_deeper(ahead, *zip(*strength, strict=True), seed=found.run.seed)
    return finding(
        "Fig. 9",
        claim="Latents of deeper blocks are semantically richer and have higher activations.",
        quantity="AP of the best latent per class minus that of a random SAE, last block minus first",
        rule="the interval lies above 0 and the mean activation rises from the first block to the last",
        **told.told(),
        effect_name="Cohen's d, paired over scenes",
    )
