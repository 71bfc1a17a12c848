"""A CLIP and the autoencoder that reads it, as one object: the library in a few lines.

    import patchsae as ps
    clip = ps.load_clip("ViT-B-16-quickgelu", "openai", block=11)
    photos = ps.open_images("photos/", clip)
    lens = ps.train(clip, photos, expansion=16)
    found = ps.describe(lens, photos)
    ps.show(found, latent=412)
    ps.explore(lens, photos).save("explorer.html")

Everything here is a short way to a room, which does the work and has more options.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch.nn.functional as F
import xarray as xr

from patchsae.clip.backbone import Backbone
from patchsae.images.files import (
    FileImages,
    FolderImages,
    Frame,
    class_folders,
    files_by_class,
    files_in,
)
from patchsae.images.sets import ImageSet
from patchsae.images.sources import is_source, open_source
from patchsae.latents.atlas import AtlasConfig, make_atlas
from patchsae.latents.maps import masked_images
from patchsae.runs.artefacts import artefact_of
from patchsae.runs.errors import PatchSAEError, printable
from patchsae.runs.hub import fetch, hub_name
from patchsae.runs.verify import read_manifest
from patchsae.sae.importers import import_sae
from patchsae.sae.model import CONFIG, SAE, SAEConfig
from patchsae.sae.sharing import CARD
from patchsae.training.starts import Start
from patchsae.training.trainer import TrainConfig, train_sae

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from patchsae.explorer import Explorer

RESULTS = "results"
ENOUGH, SMALL_BATCH = 3000, 128  # steps after which rows have moved, and tokens of a step with few pictures
UNMOVED = 0.9  # mean cosine of decoder rows with their random start, above which nothing was learned


@dataclass(frozen=True)
class Lens:
    """A CLIP cut after a block, and a sparse autoencoder of the tokens there.

    Raises
    ------
    PatchSAEError : the SAE is of another width than the tokens.
    """

    clip: Backbone
    """The model that the tokens come from."""
    sae: SAE
    """What decomposes them."""
    name: str
    """What it is called in messages and manifests: the folder, file or hub name that it came from."""

    def __post_init__(self):
        if self.sae.d_in != self.clip.d_model:
            raise PatchSAEError(
                f"the SAE '{self.name}' is of width {self.sae.d_in}, the tokens of {self.clip.name} of "
                f"{self.clip.d_model}; give the model that it was trained on."
            )


class Found(NamedTuple):
    """What each latent of a lens stands for on an image set."""

    atlas: xr.Dataset
    """Statistics and references by latent."""
    lens: Lens
    images: ImageSet


def open_images(source: str | Path, clip: Backbone) -> ImageSet:
    """Open a person's own pictures, framed as the model's own transform frames them.

    A folder of folders has a class for each; one of pictures is one class by its own name. Also shards
    (`photos-{000..012}.tar`), `torchvision:SET:FOLDER`, `datasets:FOLDER` or `datasets:ORGANISATION/NAME`
    (`images.sources`).

    Raises
    ------
    PatchSAEError : the folder is missing, or holds no picture; as `open_source`.
    """
    return _pictures(source, clip.frame)


def look_for_images(source: str | Path) -> None:
    """Refuse a folder that `open_images` would refuse, before a model is fetched for it."""
    if not is_source(str(source)):
        _pictures(source, 1)


def _pictures(source: str | Path, frame: int | Frame) -> ImageSet:
    if is_source(str(source)):
        return open_source(str(source), frame)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise PatchSAEError(f"there is no folder '{folder}'; give one that holds pictures.")
    if names := files_in(folder):
        inside, _ = files_by_class(folder, class_folders(folder))
        if inside:
            raise PatchSAEError(
                f"'{folder}' holds pictures and folders of pictures; put the former into a folder, too."
            )
        one = printable(folder.resolve().name)
        return FileImages(folder, names, np.zeros(len(names), np.int64), (one,), frame, one, "all")
    return FolderImages(folder, frame, split="all")


def train(
    clip: Backbone, images: ImageSet, /, root: str | Path = RESULTS, progress: bool = True, **fields: Any
) -> Lens:
    """Train an autoencoder on a set's images, or find it in `root`; return it with its model.

    Parameters
    ----------
    fields : of SAEConfig and TrainConfig, such as expansion=16, l1=8e-5, images=100_000; `images` that are
        seen, in the latter sense, is by default every image once. Without `cache` tokens are computed anew.

    Raises
    ------
    PatchSAEError : a field that neither has, or a value that it refuses; one image; as `train_sae`.
    """
    of_sae, of_run = _dealt("train", fields, SAEConfig, TrainConfig)
    if len(images) < 2:
        raise PatchSAEError(
            f"'{images.name}' has {len(images)} picture, of which nothing can be learned: give at least 2, "
            "better thousands, or an autoencoder that is trained (`load_sae`, --sae)."
        )
    sae = SAEConfig(**{"d_in": clip.d_model} | of_sae)
    config = TrainConfig(**{"images": len(images)} | of_run)
    trained = train_sae(images, clip, sae, config, root, progress)
    if config.start is Start.RANDOM:
        still = (
            F.cosine_similarity(SAE(sae, config.seed).W_dec, trained.sae.W_dec.cpu(), dim=1).mean().item()
        )
        if still > UNMOVED:
            steps, batch = int(trained.metrics[-1]["step"]), min(config.token_batch, SMALL_BATCH)
            tokens = trained.metrics[-1]["tokens"] / trained.metrics[-1]["images"]
            images = max(config.images, math.ceil(ENOUGH * batch / tokens))
            warnings.warn(
                f"After {steps:,} steps the decoder's rows are still at a cosine of {still:.2f} with "
                f"their random start: hardly anything was learned. About {ENOUGH:,} steps are needed, for "
                f"example images={images}, counted with repetition, and token_batch={batch} (for the "
                f"command: --seen {images} --token-batch {batch}).",
                stacklevel=2,
            )
    return Lens(clip, trained.sae, str(trained.folder))


def _check_origin(folder: Path, clip: Backbone) -> None:
    """Refuse an autoencoder of this project whose card names another block; warn of another model."""
    inputs = (read_manifest(folder) or {}).get("inputs")
    said = dict(inputs) if isinstance(inputs, dict) else {}
    with suppress(OSError, ValueError, TypeError):  # a card need not be there, or of our form
        said = dict(json.loads((folder / CARD).read_text("utf-8")))
    block, backbone = said.get("block"), said.get("backbone")
    if isinstance(block, int) and block != clip.block:
        raise PatchSAEError(
            f"'{folder}' was trained on the tokens of block {block}, and the model is cut after "
            f"{clip.block}: give block={block}."
        )
    known = backbone.get("fingerprint") if isinstance(backbone, dict) else backbone
    if isinstance(known, str) and known != clip.fingerprint():
        warnings.warn(
            f"'{folder}' was trained on the tokens of another model, or of another block: what it shows of "
            f"{clip} means little unless the two are alike.",
            stacklevel=3,
        )


def load_sae(source: str | Path, clip: Backbone) -> Lens:
    """Read an autoencoder for this model: saved here, by another project, or on the Hugging Face hub.

    source: a folder that `SAE.save` wrote; a file or folder of PatchSAE's released code, SAELens, saev,
    sparsify, Prisma or dictionary_learning; `hf:organisation/name`, which is fetched once; or
    `patchsae:sae/main`, this project's for block 11 of its small CLIP.

    Raises
    ------
    PatchSAEError : it is missing or damaged, cannot be fetched, or is of another width than the tokens.
    """
    name = str(source)
    hub = hub_name(name)
    if hub:
        path = fetch(hub, ("*.safetensors", "*.json", "*.yaml"))
    else:
        path = artefact_of(name) or Path(name).expanduser()
    if not path.exists():
        raise PatchSAEError(f"there is no file or folder '{path}'; give one that holds an autoencoder.")
    own = path.is_dir() and (path / CONFIG).is_file()
    if own:
        _check_origin(path, clip)
    sae = SAE.load(path, clip.device) if own else import_sae(path).to(clip.device)
    return Lens(clip, sae, name)


def describe(
    lens: Lens, images: ImageSet, root: str | Path = RESULTS, progress: bool = True, **fields: Any
) -> Found:
    """Describe every latent on an image set: how often and on what it fires, and its reference images.

    fields: of AtlasConfig, such as k=10 reference images and tau=0.2. What `root` holds is read.

    Raises
    ------
    PatchSAEError : a field that AtlasConfig lacks; fewer images than k; as `make_atlas`.
    """
    _dealt("describe", fields, AtlasConfig)
    config = AtlasConfig(**{"k": min(AtlasConfig.k, len(images)), "empty_classes": True} | fields)
    atlas = make_atlas(lens.sae, lens.clip, images, config, root, lens.name, progress=progress)
    return Found(atlas, lens, images)


def _dealt(call: str, fields: dict[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """Deal a call's fields to the configurations that have them; refuse what none has."""
    names = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
    if unknown := sorted(set(fields).difference(*names)):
        known = ", ".join(sorted(set().union(*names) - {"d_in"}))
        raise PatchSAEError(f"{call} has no parameter '{unknown[0]}'; there are {known}.")
    return [{name: value for name, value in fields.items() if name in own} for own in names]


def show(found: Found, latent: int, images: int = 5) -> Figure:
    """Draw a latent's strongest reference images, each above the part of it where the latent fires.

    Raises
    ------
    PatchSAEError : there is no such latent, or it fires on no image.
    """
    from matplotlib.figure import Figure

    (atlas, lens, pictures), count = found, found.lens.sae.d_sae
    if not isinstance(latent, int | np.integer) or not 0 <= latent < count:
        raise PatchSAEError(f"latent={latent!r} is none of the {count}; give a number in 0..{count - 1}.")
    one = atlas.sel(latent=int(latent))
    index = [int(i) for i in one.top_index.values[:images] if i >= 0]
    if not index:
        raise PatchSAEError(f"latent {latent} fires on no image of '{pictures.name}'; give another.")
    pixels = pictures.load(index).images
    masked = masked_images(lens.sae, lens.clip, pixels, int(latent))
    figure = Figure(figsize=(1.9 * len(index), 4.4), layout="constrained")
    axes = figure.subplots(2, len(index), squeeze=False)
    for column, (image, part) in enumerate(
        zip(pixels.permute(0, 2, 3, 1).cpu().numpy(), masked, strict=True)
    ):
        label = pictures.classnames[int(pictures.labels[index[column]])]
        axes[0, column].imshow(image)
        axes[0, column].set_title(
            f"{label}\nactivation {float(one.top_value.values[column]):.2g}", fontsize=9
        )
        axes[1, column].imshow(part)
    for axis in axes.flat:
        axis.set_axis_off()
    share = float(one.image_frequency)
    figure.suptitle(f"latent {latent} of {lens.name}: fires on {share:.1%} of images", fontsize=10)
    return figure


def explore(
    lens: Lens,
    images: ImageSet,
    root: str | Path = RESULTS,
    gallery: int = 12,
    progress: bool = True,
    classes: Sequence[str] = (),
) -> Explorer:
    """Open the explorer on a set: which latents fire where on its pictures, and what else they fire on.

    It is live in JupyterLab, where it also takes other pictures; `Explorer.save` writes it as a page. What
    `root` holds is read.

    gallery : pictures to choose from, taken at even steps through the set (all, if there are fewer)
    classes : names that the model is asked to choose from; none takes the set's

    Raises
    ------
    PatchSAEError : gallery is not a number above 0; as `describe` and `write_blocks`.
    """
    from patchsae.explorer import Explorer, Pictures, ReferenceSet, Shown, write_blocks

    if isinstance(gallery, bool) or not isinstance(gallery, int | np.integer) or gallery < 1:
        raise PatchSAEError(f"gallery={gallery!r} must be a whole number above 0.")
    found = describe(lens, images, root, progress)
    steps = np.linspace(0, len(images) - 1, min(gallery, len(images))).round().astype(int)
    models, title = [Shown(lens.clip.name, lens.clip)], images.name
    sets = [ReferenceSet(title, found.atlas, images)]
    shown = [Pictures(title, images.subset(steps), classes=tuple(classes))]
    folder = write_blocks(lens.sae, lens.name, models, shown, sets, root, progress=progress)
    return Explorer(folder, lens.sae, lens.name, models)
