"""Sparse autoencoders on every patch of CLIP: the engine behind the book.

The names below are the short way; the rooms (`runs`, `images`, `clip`, `sae`, `training`, `latents`,
`masking`, `adaptation`, `explorer`) have the rest. They are looked up when first used: importing this loads
no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "load_clip": "patchsae.clip.backbone:load_backbone",
    "open_images": "patchsae.lens:open_images",
    "train": "patchsae.lens:train",
    "load_sae": "patchsae.lens:load_sae",
    "describe": "patchsae.lens:describe",
    "show": "patchsae.lens:show",
    "explore": "patchsae.lens:explore",
    "Lens": "patchsae.lens:Lens",
    "SAE": "patchsae.sae.model:SAE",
    "SAEConfig": "patchsae.sae.model:SAEConfig",
    "TrainConfig": "patchsae.training.trainer:TrainConfig",
    "PatchSAEError": "patchsae.runs.errors:PatchSAEError",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'patchsae' has no attribute '{name}'")
    module, _, what = _PUBLIC[name].partition(":")
    return getattr(import_module(module), what)


def __dir__() -> list[str]:
    return sorted(__all__)
