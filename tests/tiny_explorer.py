"""A small explorer of real parts: a tiny CLIP, two other models, an SAE, two image sets."""

from pathlib import Path
from typing import NamedTuple

import torch
import xarray as xr
from tiny import tiny_backbone, tiny_images

from patchbook.scenes.embedded import SINGLE, SceneSet
from patchsae.adaptation.prompts import PromptConfig, adapt
from patchsae.clip.backbone import Backbone
from patchsae.explorer import Explorer, ReferenceSet, Shown, write_blocks
from patchsae.images.sets import ImageSet
from patchsae.latents.atlas import AtlasConfig, make_atlas
from patchsae.sae.model import SAE, SAEConfig

HASH = "sae-of-a-test"


class Parts(NamedTuple):
    sae: SAE
    models: tuple[Shown, ...]
    gallery: ImageSet
    sets: tuple[ReferenceSet, ...]
    folder: Path

    def explorer(self) -> Explorer:
        return Explorer(self.folder, self.sae, HASH, self.models)


def sparse_sae(d_in: int) -> SAE:
    """Return an SAE of which a few latents fire per token, and one on every token."""
    sae = SAE(SAEConfig(d_in=d_in, expansion=4), seed=0)
    with torch.no_grad():
        sae.b_enc -= 2.0
        sae.b_enc[7] = 40.0
    return sae


def tiny_atlas(sae: SAE, backbone, images: ImageSet, root: Path, sae_hash: str = HASH) -> xr.Dataset:
    config = AtlasConfig(k=4, top=3, empty_classes=True)
    return make_atlas(sae, backbone, images, config, root, sae_hash, progress=False)


def tuned(seed: int) -> Backbone:
    """Return the tiny CLIP with its image tower changed, as fine-tuning would."""
    clip, drawn = tiny_backbone(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in clip.model.visual.transformer.parameters():
            weight += 0.5 * weight.std().nan_to_num() * torch.randn(weight.shape, generator=drawn)
    return clip


def make_parts(root: Path) -> Parts:
    clip, images = tiny_backbone(), tiny_images()
    maple = adapt(clip, PromptConfig(depth=1), seed=1)
    models = Shown("CLIP", clip), Shown("MaPLe", maple), Shown("Fine-tuned", tuned(1))
    sae = sparse_sae(clip.d_model)
    other = SceneSet("other", "test", range(1, 21, 2), (2,), 2, SINGLE)
    sets = tuple(
        ReferenceSet(title, tiny_atlas(sae, clip, chosen, root), chosen)
        for title, chosen in (("General", images), ("Sketches", other))
    )
    gallery = images.subset(range(6))
    folder = write_blocks(sae, HASH, models, [("General", gallery)], sets, root, progress=False)
    return Parts(sae, models, gallery, sets, folder)
