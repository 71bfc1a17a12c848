"""Learned prompts on disk: ours, and those that MaPLe's authors published.

Ours is `prompts.safetensors` (the learned tensors alone, changes of weights where the method learns these)
beside `prompts.json`, which says what they are and which backbone they belong to. Theirs is Dassl's
`model.pth.tar-N`: everything of the trainer, a whole CLIP among it (facts.md §1.3). It is read without
running anything in it, and taken only if every key is the one expected and its CLIP is the backbone's own:
loading what fits and ignoring the rest is how the paper's demo came to run six untrained prompts (facts.md
§1.4).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchsae.adaptation.adapted import Adapted
from patchsae.adaptation.prompts import (
    AdaptedBackbone,
    Method,
    PromptConfig,
    blank_prompts,
    fitting_text_tower,
)
from patchsae.adaptation.weights import Change, TunedBackbone, WeightConfig
from patchsae.clip.backbone import Backbone
from patchsae.images.benchmark_table import RECIPES
from patchsae.runs.checks import check_weights
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.restricted_pickle import read_pickle
from patchsae.runs.stage import write_atomic, write_json

WEIGHTS, CARD = "prompts.safetensors", "prompts.json"
LEARNED = "prompt_learner."  # Dassl's prefix
BUFFERS = ("token_prefix", "token_suffix")  # embeddings of the training set's own prompts


class MissingPrompts(PatchSAEError):
    """Tell that a folder holds no prompts for a data set, rather than damaged or foreign ones."""


class PromptCard(NamedTuple):
    """What `prompts.json` says."""

    config: PromptConfig | WeightConfig
    classnames: tuple[str, ...]
    """Classes that the prompts were trained on; they serve any others as well."""
    seed: int | None
    source: str
    """What they come from: sha256 of a file, or of the inputs of a training run."""
    backbone: str
    """Fingerprint of the plain backbone, cut at block 0."""


def save_prompts(
    folder: str | Path,
    adapted: Adapted,
    classnames: Sequence[str],
    seed: int | None,
    source: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write prompts.safetensors and prompts.json (the fields of `PromptCard`), each whole or not at all."""
    folder = Path(folder)
    tensors = {
        key: value.detach().to(dtype).cpu().contiguous()
        for key, value in adapted.learned.state_dict().items()
    }
    write_atomic(folder / WEIGHTS, lambda path: save_file(tensors, path))
    card = {
        "classnames": list(classnames),
        "seed": seed,
        "source": source,
        "backbone": adapted.plain.at_block(0).fingerprint(),
        "backbone_name": adapted.plain.name,
    }
    write_json(folder / CARD, asdict(adapted.what) | card)


def read_card(folder: str | Path) -> PromptCard:
    """Read prompts.json. Raises PatchSAEError if it is missing or damaged."""
    path = Path(folder) / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8-sig"))
        kind = WeightConfig if card["method"] in list(Change) else PromptConfig
        config = kind(**{field.name: card[field.name] for field in fields(kind)})
        return PromptCard(
            config, tuple(card["classnames"]), card["seed"], str(card["source"]), str(card["backbone"])
        )
    except PatchSAEError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchSAEError(
            f"{path} is no card of prompts ({type(error).__name__}: {error}): give a folder that "
            "train_prompts or save_prompts wrote."
        ) from error


def load_prompts(folder: str | Path, backbone: Backbone) -> Adapted:
    """Return `backbone` adapted by the prompts, or the changed weights, of a folder.

    Raises PatchSAEError for a missing or damaged file, tensors that are not those that the card
    describes, and another backbone than the prompts were learned on.
    """
    folder, card = Path(folder), read_card(folder)
    if card.backbone != backbone.at_block(0).fingerprint():
        raise PatchSAEError(
            f"The prompts in {folder} were not learned on this {backbone.name} in {backbone.dtype}: load "
            "the model, weights and dtype that they were learned on."
        )
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PatchSAEError(f"{path} cannot be read ({error}): restore it, or train again.") from error
    return _adapted(path, backbone, card.config, tensors)


def find_prompts(
    folder: str | Path, dataset: str, backbone: Backbone, seed: int = 1,
    method: Method | Change = Method.MAPLE,
) -> Adapted:  # fmt: skip
    """Return `backbone` adapted to a data set by what a folder holds for it.

    Ours lie in `prompts_folder`; MaPLe's as published, `<dataset>/base/seed<n>/MultiModalPromptLearner/
    model.pth.tar-5` (tar-2 of a cross-data-set run; facts.md §1.3), where a data set may have Dassl's name
    for it. Raises MissingPrompts if there is neither, PatchSAEError as `load_prompts` and `load_official`.
    """
    own = prompts_folder(folder, dataset, seed, method)
    if any((own / file).is_file() for file in (CARD, WEIGHTS)):
        return load_prompts(own, backbone)
    learner = f"seed{seed}/MultiModalPromptLearner"
    names = dict.fromkeys((dataset, dataset in RECIPES and RECIPES[dataset].config or dataset))
    ends = (f"base/{learner}/model.pth.tar-5", f"{learner}/model.pth.tar-2")
    places = [Path(folder) / name / end for name in names for end in ends] if method is Method.MAPLE else []
    for place in places:
        if place.is_file():
            return load_official(place, backbone)
    looked = " nor ".join([str(own / CARD), *map(str, places[::2])])
    raise MissingPrompts(
        f"there are no prompts of {method} for '{dataset}' with seed {seed}, no {looked}; learn them "
        f"(`patchsae prompts --help`; `make prompts` for those of the book)"
        + (", or put MaPLe's published file there." if places else ".")
    )


def prompts_folder(
    folder: str | Path, dataset: str, seed: int, method: Method | Change = Method.MAPLE
) -> Path:
    """Return where prompts of ours lie in a folder: `<method>/<dataset>/seed<n>`."""
    return Path(folder) / method / dataset / f"seed{seed}"


def load_official(
    path: str | Path, backbone: Backbone, depth: int | None = None, context: str = PromptConfig.context
) -> AdaptedBackbone:
    """Return `backbone` adapted by a `model.pth.tar-N` that MaPLe's code wrote.

    Parameters
    ----------
    depth : what the file must have, where that is known (9 base-to-novel, 3 cross-dataset); by default
        whatever it has, read from the highest index of compound_prompts_text
    context : the words that its training configuration calls CTX_INIT

    Raises
    ------
    PatchSAEError : the file is missing, damaged, or would run code; a key is missing, unknown or of
        another shape; it has another depth than asked for; its CLIP is not this backbone's.
    """
    path = Path(path)
    if not path.is_file():
        raise PatchSAEError(f"There is no file {path.absolute()}: correct the path.")
    state = _state_dict(path)
    deep = re.compile(rf"{re.escape(LEARNED)}compound_prompts_text\.(\d+)")
    found = [int(match[1]) for match in map(deep.fullmatch, state) if match]
    in_file = max(found, default=-1) + 2
    if depth not in (None, in_file):
        last = f"{LEARNED}compound_prompts_text.{in_file - 2}" if found else "no compound_prompts_text"
        raise PatchSAEError(f"{path} has depth {in_file} ({last}), not {depth}: ask for depth={in_file}.")
    if f"{LEARNED}ctx" not in state:
        raise PatchSAEError(f"{path} lacks {LEARNED}ctx: give a model.pth.tar-N of MaPLe.")
    config = PromptConfig(depth=in_file, n_ctx=_rows(state[f"{LEARNED}ctx"]), context=context)
    text, frozen = fitting_text_tower(backbone, config), _frozen(backbone)
    expected = {LEARNED + k: list(v.shape) for k, v in blank_prompts(backbone, config).state_dict().items()}
    n, width = config.n_ctx, text.width
    classes = _rows(state.get(f"{LEARNED}{BUFFERS[0]}", torch.empty(0)))
    rows = dict(zip(BUFFERS, (1, text.context - 1 - n), strict=True))
    expected |= {LEARNED + key: [classes, count, width] for key, count in rows.items()}
    expected |= {key: list(value.shape) for key, value in frozen.items()}
    _compare(path, {key: list(value.shape) for key, value in state.items()}, expected)
    # the token embeddings are not in the file, but the first of them is in the prefix of every class
    start = text.embed(text.tokenize("a"))[0, :1]
    frozen[LEARNED + BUFFERS[0]] = start.expand(classes, 1, width)
    for key, own in frozen.items():
        if not _equal(state[key], own):
            raise PatchSAEError(
                f"{path} was trained on another CLIP than {backbone.name}: {key} differs; load the weights "
                "that the file was trained on (MaPLe's: ViT-B-16-quickgelu, openai)."
            )
    learned = {
        key.removeprefix(LEARNED): value
        for key, value in state.items()
        if key.startswith(LEARNED) and key.removeprefix(LEARNED) not in BUFFERS
    }
    return _adapted(path, backbone, config, learned)


def _rows(value: Tensor) -> int:
    # at least one, so that a tensor of any shape gets as far as the comparison that names it
    return max((1, *value.shape[:1]))


def _state_dict(path: Path) -> dict[str, Tensor]:
    content = read_pickle(path)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise PatchSAEError(f"{path} has no 'state_dict': give a model.pth.tar-N of MaPLe.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise PatchSAEError(f"{path} holds no weights at {key!r}: give a model.pth.tar-N of MaPLe.")
    return dict(state)


def _frozen(backbone: Backbone) -> dict[str, Tensor]:
    """Return the weights of the plain CLIP under the names that Dassl gives them."""
    own, found = backbone.model.state_dict(), {}
    for key, value in own.items():
        name = key.removeprefix("text.")
        if name.startswith("visual."):
            found["image_encoder." + name.removeprefix("visual.")] = value
        elif name == "logit_scale":
            found[name] = value.reshape([])
        elif name != "token_embedding.weight":  # not stored
            found["text_encoder." + name] = value
    return found


def _equal(theirs: Tensor, own: Tensor) -> bool:
    own = own.cpu()
    # OpenAI's weights are half precision, whatever either side has made of them since
    eps = max(torch.finfo(kind).eps for kind in (torch.float16, own.dtype))
    return torch.allclose(
        theirs.float(), own.float(), rtol=eps, atol=torch.finfo(torch.float16).smallest_normal
    )


def _compare(path: Path, found: Mapping[str, list[int]], expected: Mapping[str, list[int]]) -> None:
    for key in [*expected, *found]:
        there, here = (shapes.get(key, "absent") for shapes in (found, expected))
        if there != here:
            raise PatchSAEError(
                f"{path} does not fit: {key} is {there} in the file and should be {here}; give the file "
                "and the backbone that belong together."
            )


def _adapted(
    path: Path, backbone: Backbone, config: PromptConfig | WeightConfig, tensors: dict[str, Tensor]
) -> Adapted:
    if isinstance(config, WeightConfig):
        adapted = TunedBackbone(backbone, config)
    else:
        adapted = AdaptedBackbone(backbone, blank_prompts(backbone, config))
    own = adapted.learned.state_dict()
    _compare(
        path, {k: list(v.shape) for k, v in tensors.items()}, {k: list(v.shape) for k, v in own.items()}
    )
    check_weights(path, tensors)
    adapted.learned.load_state_dict({key: value.float() for key, value in tensors.items()})
    adapted.settle()
    return adapted
