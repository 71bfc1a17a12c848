"""Vision transformers of timm: DINOv2, DINOv3, SigLIP and others, which have an image tower and no text.

A folder as timm keeps one on the Hugging Face hub: `config.json`, which names the architecture and how
pictures are prepared, and `model.safetensors`.
"""

import difflib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchsae.runs import compat  # noqa: F401  (must come before timm)

# isort: split
import timm
from timm.data import resolve_data_config
from timm.models import load_pretrained

from patchsae.clip.weights import read_weights, warn_of_random_weights
from patchsae.runs.checks import check_weights
from patchsae.runs.errors import PatchSAEError, brief
from patchsae.runs.hub import fetch

PREFIX = "timm:"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Vision(nn.Module):
    """An image tower alone, in the place that a CLIP has its own."""

    logit_scale = logit_bias = None

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.visual = nn.Module()
        self.visual.trunk, self.visual.head = trunk, nn.Identity()
        data = resolve_data_config(pretrained_cfg=trunk.pretrained_cfg)
        patches = getattr(trunk, "patch_embed", None)
        size = getattr(patches, "img_size", None) or data["input_size"][1:]
        self.visual.image_size = tuple(size)
        self.visual.image_mean, self.visual.image_std = data["mean"], data["std"]
        self.visual.preprocess_cfg = {
            "resize_mode": {"center": "shortest"}.get(data["crop_mode"], data["crop_mode"]),
            "interpolation": data["interpolation"],
            "kept": data["crop_pct"],
        }

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Return what timm's model answers, [B, e]."""
        found = self.visual.trunk(images)
        return nn.functional.normalize(found, dim=-1) if normalize else found


@dataclass(frozen=True)
class TimmSource:
    """Say which model of timm is meant: an architecture with its arguments, and where its weights are."""

    name: str
    architecture: str
    weights: Path | None = None
    hub: str | None = None
    """Where the weights are fetched from, if they are not a file yet."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preparation: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[nn.Module, dict]:
        """Return the model with random weights, and what hashes need to know of it."""
        known = {key: value for key, value in self.preparation.items() if value is not None}
        try:
            trunk = timm.create_model(
                self.architecture,
                pretrained_cfg_overlay=known,
                **{**self.arguments, "num_classes": 0},
            )
        except Exception as error:  # arguments fail in as many ways as there are models
            raise PatchSAEError(f"{self.name} cannot be built ({brief(error)}): correct it.") from error
        return Vision(trunk), {"timm": self.architecture, "arguments": dict(self.arguments)}

    def load(self, model: nn.Module, config: dict) -> None:
        """Fetch the weights where they are published, and put them into the model."""
        path = self.weights
        if self.hub:
            path = fetch(self.hub, (CONFIG, WEIGHTS)) / WEIGHTS
        if path is None:
            warn_of_random_weights(self.name)
            return
        trunk, missing, unknown = model.visual.trunk, [], []

        def note(_: nn.Module, keys: Any) -> None:
            missing.extend(keys.missing_keys)
            unknown.extend(keys.unexpected_keys)

        hook = trunk.register_load_state_dict_post_hook(note)
        given = dict(trunk.pretrained_cfg) | {"state_dict": read_weights(path)}
        renaming = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
        try:
            # timm's own: it knows the old names of its models, and other sizes of image. It is lax as the
            # head of a classifier has no place here; what else does not fit is refused below.
            load_pretrained(trunk, given, num_classes=0, filter_fn=renaming, strict=False)
        except Exception as error:  # what does not fit, in the words of torch
            raise PatchSAEError(
                f"{path} does not fit {self.name} ({brief(error)}); name the model that it was made for."
            ) from error
        finally:
            hook.remove()
        if missing:
            raise PatchSAEError(
                f"{path} does not fit {self.name}: it lacks {missing[0]} and {len(missing) - 1} others; "
                "name the model that it was made for."
            )
        if left := [name for name in unknown if name.startswith("blocks.")]:
            raise PatchSAEError(
                f"{path} does not fit {self.name}: it has {left[0]} and {len(left) - 1} others that the "
                "model has no place for; name the model that it was made for."
            )
        check_weights(path, dict(trunk.named_parameters()))

    tokenizer = None  # there is no text

    @property
    def has_weights(self) -> bool:
        """Tell whether there are weights, rather than random ones."""
        return bool(self.hub or self.weights)


def find_timm(name: str, pretrained=None) -> TimmSource:
    """Find the model that `timm:name` or `timm:name.tag` means, or refuse."""
    name = name.removeprefix(PREFIX).removeprefix("timm/")
    architecture, _, tag = name.partition(".")
    known = timm.list_models(module=["vision_transformer", "eva", "deit"])
    if architecture not in timm.list_models():
        close = difflib.get_close_matches(architecture, known, n=3, cutoff=0.5)
        hint = " or ".join(f"'{PREFIX}{one}'" for one in close) or "a name from timm.list_models()"
        raise PatchSAEError(f"'{PREFIX}{name}' is no model of timm: is it {hint}?")
    if pretrained is not None and tag:
        raise PatchSAEError(f"'{PREFIX}{name}' names its weights: drop pretrained={str(pretrained)!r}.")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    if pretrained is not None and str(pretrained) not in tags:
        path = Path(pretrained).expanduser()
        if not path.is_file():
            raise PatchSAEError(
                f"{architecture} has no weights {str(pretrained)!r}: give a file or one of the tags "
                f"{', '.join(tags) or 'none'}."
            )
        return TimmSource(architecture, architecture, path)
    tag = tag or (str(pretrained) if pretrained is not None else "")
    if not tag:
        return TimmSource(architecture, architecture)
    if tag not in tags:
        raise PatchSAEError(f"{architecture} has no weights {tag!r}, only {', '.join(tags) or 'none'}.")
    full = f"{architecture}.{tag}"
    published = timm.get_pretrained_cfg(full)
    return TimmSource(
        full, full, hub=published.hf_hub_id if "/" in (published.hf_hub_id or "") else f"timm/{full}"
    )


def is_timm(folder: Path) -> bool:
    """Tell whether a folder holds a model as timm keeps one."""
    try:
        return "architecture" in json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def open_timm(folder: Path) -> TimmSource:
    """Read which model a folder holds."""
    content = json.loads((folder / CONFIG).read_text("utf-8"))
    if not (folder / WEIGHTS).is_file():
        raise PatchSAEError(f"{folder} has no {WEIGHTS}: copy it there.")
    arguments = content.get("model_args") or {}
    if content.get("global_pool"):
        arguments = {"global_pool": content["global_pool"]} | arguments
    keys = ("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    known = content.get("pretrained_cfg") or {}
    preparation = {key: known[key] for key in keys if key in known}
    if not math.isfinite(preparation.get("crop_pct", 1.0)):
        raise PatchSAEError(f"{folder / CONFIG} has crop_pct={preparation['crop_pct']}: correct it.")
    return TimmSource(
        folder.resolve().name,
        content["architecture"],
        folder / WEIGHTS,
        arguments=arguments,
        preparation=preparation,
    )
