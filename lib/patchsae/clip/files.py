"""Where a CLIP comes from: find it, build it, fetch and read its weights.

Everything that can be refused is refused before anything is downloaded, and nothing is unpickled
that could run code.
"""

import difflib
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from patchsae.runs import compat  # noqa: F401  (must come before open_clip)

# isort: split
import open_clip
from open_clip import pretrained as published
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict

from patchsae.clip.timm_models import PREFIX, TimmSource, find_timm, is_timm, open_timm
from patchsae.clip.weights import read_weights, warn_of_random_weights
from patchsae.runs.artefacts import artefact_of
from patchsae.runs.checks import check_weights
from patchsae.runs.errors import PatchSAEError, brief
from patchsae.runs.hub import fetch, hub_name

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
VOCABULARY = "bpe_simple_vocab.txt.gz"  # optional third file of a model folder: a shortened one


@dataclass(frozen=True)
class ClipSource:
    """Say which CLIP is meant: an open_clip model with a tag, a file or nothing, or a folder."""

    name: str
    identifier: str
    """What open_clip calls it: a model name or `local-dir:<folder>`."""
    tag: str | None = None
    weights: Path | None = None
    vocabulary: Path | None = None

    def build(self) -> tuple[nn.Module, dict]:
        """Return the model with random weights, and open_clip's configuration of it."""
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)  # open_clip warns of random weights; they come later
        try:
            config = open_clip.get_model_config(self.identifier)
            model = open_clip.create_model(
                self.identifier,
                load_weights=False,
                pretrained_text=False,
                force_preprocess_cfg=_published_preprocess(self.name, self.tag),
            )
            return model, config
        except Exception as error:  # configurations fail in as many ways as they have fields
            what = f"{self.weights.parent / CONFIG}" if self.in_folder else self.name
            raise PatchSAEError(f"{what} cannot be built ({brief(error)}): correct it.") from error
        finally:
            logging.disable(level)

    def load(self, model: nn.Module, config: dict) -> None:
        """Fetch the weights where they are published, and put them into the model."""
        path = self.weights
        if self.tag:
            entry = published.get_pretrained_cfg(self.name, self.tag)
            quick_gelu = bool(entry.get("quick_gelu"))
            self._check_activation(config, quick_gelu, f"the weights {self.tag!r}")
            try:
                path = Path(published.download_pretrained(entry))
            except Exception as error:  # no network, no space, a moved file: the remedy is one
                raise PatchSAEError(
                    f"The weights {self.tag!r} of {self.name} could not be fetched "
                    f"({brief(error)}): fetch the file where there is a network and pass "
                    "pretrained=<file>."
                ) from error
        if path is None:
            warn_of_random_weights(self.name)
            return
        state = read_weights(path)
        numbers = [state.pop(k, None) for k in ("input_resolution", "context_length", "vocab_size")]
        if all(number is not None for number in numbers):  # only OpenAI's archives carry these
            self._check_activation(config, True, str(path))
        elif not self.tag:
            self._ask_activation(config, path)
        if {"vision_model", "text_model"} <= {key.partition(".")[0] for key in state}:
            raise PatchSAEError(
                f"{path} has the layout of transformers, not open_clip's: fetch "
                "open_clip_model.safetensors of the same model, or convert the file."
            )
        state = convert_state_dict(model, state)
        if not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        own = model.state_dict()
        for key in {"logit_scale", "logit_bias"} & own.keys() & state.keys():
            state[key] = state[key].reshape(own[key].shape)  # a number, or a vector of one
        for key in [*own, *state]:
            file, here = (list(s[key].shape) if key in s else "absent" for s in (state, own))
            if file != here:
                raise PatchSAEError(
                    f"{path} does not fit {self.name}: {key} is {file} in the file and {here} in "
                    "the model; name the model that the file was made for."
                )
        check_weights(path, {key: state[key] for key, _ in model.named_parameters()})
        model.load_state_dict(state)

    def tokenizer(self, vocab_size: int | None):
        """Return open_clip's tokenizer for this model, with the folder's own vocabulary if any."""
        options = {"bpe_path": str(self.vocabulary)} if self.vocabulary else {}
        try:
            tokenizer = open_clip.get_tokenizer(self.identifier, **options)
        except Exception as error:  # a damaged vocabulary, or one to be fetched without a network
            raise PatchSAEError(
                f"The tokenizer of {self.vocabulary or self.name} cannot be loaded "
                f"({brief(error)}): restore its file, or connect to the network once."
            ) from error
        if self.vocabulary and tokenizer.vocab_size != vocab_size:  # every text would read wrong
            raise PatchSAEError(
                f"{self.vocabulary} has {tokenizer.vocab_size} entries, the model {vocab_size}: "
                "restore the vocabulary that the model was trained with."
            )
        return tokenizer

    @property
    def has_weights(self) -> bool:
        """Tell whether there are weights, rather than random ones."""
        return bool(self.tag or self.weights)

    @property
    def in_folder(self) -> bool:
        """Tell whether the model is a folder rather than an open_clip name."""
        return self.identifier.startswith("local-dir:")

    def _check_activation(self, config: dict, quick_gelu: bool, weights: str) -> None:
        # open_clip only warns, and runs on with the exact GELU (facts.md §3).
        right = self.name.removesuffix("-quickgelu") + "-quickgelu" * quick_gelu
        # A model with one spelling only (roberta-ViT-B-32) is right as it is.
        if bool(config.get("quick_gelu")) != quick_gelu and right in open_clip.list_models():
            wrong = f"{self.name} would run {weights} with the wrong GELU"
            raise PatchSAEError(f"{wrong}: use the model {right}.")

    def _ask_activation(self, config: dict, weights: Path) -> None:
        # a state dict does not tell; those tuned from OpenAI's came with the other GELU (facts.md §3)
        quick = f"{self.name}-quickgelu"
        if not self.in_folder and not config.get("quick_gelu") and quick in open_clip.list_models():
            warnings.warn(
                f"{weights} does not say which GELU it was trained with, and {self.name} computes the "
                f"exact one: if it was tuned from OpenAI's weights, use the model {quick}.",
                stacklevel=4,
            )


def find_clip(name, pretrained=None) -> ClipSource | TimmSource:
    """Find the model that `name` and `pretrained` mean (as in `load_backbone`), or refuse."""
    name = str(name)
    if name.startswith(PREFIX):
        return find_timm(name, pretrained)
    if shipped := artefact_of(name):
        return find_clip(shipped, pretrained)
    if hub := hub_name(name):
        own = "model.safetensors" if hub.startswith("timm/") else WEIGHTS  # some repositories have both
        folder = fetch(hub, ("open_clip_config.json", own, "*.json", "*.txt", "*.model"))
        return replace(find_clip(folder, pretrained), name=hub)
    folder = Path(name.removeprefix("local-dir:"))
    models = {model.lower(): model for model in open_clip.list_models()}
    wanted = name.replace("/", "-").replace("@336px", "-336")  # OpenAI's own: ViT-B/32, ViT-L/14@336px
    if (folder / CONFIG).is_file():
        weights, vocabulary = folder / WEIGHTS, folder / VOCABULARY
        if pretrained is not None:
            raise PatchSAEError(f"{folder} has its own weights: drop pretrained={pretrained!r}.")
        if not weights.is_file():
            raise PatchSAEError(f"{folder} has no {WEIGHTS}: {_remedy(folder)}.")
        vocabulary = vocabulary if vocabulary.is_file() else None
        label, identifier = folder.resolve().name, f"local-dir:{folder}"
        return ClipSource(label, identifier, weights=weights, vocabulary=vocabulary)
    if is_timm(folder):
        if pretrained is not None:
            raise PatchSAEError(f"{folder} has its own weights: drop pretrained={pretrained!r}.")
        return open_timm(folder)
    if wanted in models.values():
        tag, weights = _tag_or_file(wanted, pretrained)
        return ClipSource(wanted, wanted, tag, weights)
    if folder.is_dir():
        raise PatchSAEError(f"{folder} has no {CONFIG}: {_remedy(folder)}.")
    if "/" in name or "\\" in name:
        missing = folder.absolute()
        hub = f", or write hf:{name} for a model of the Hugging Face hub" if name.count("/") == 1 else ""
        raise PatchSAEError(f"There is no folder {missing}: {_remedy(folder)}{hub}.")
    close = difflib.get_close_matches(wanted.lower(), models, n=3, cutoff=0.5)
    hint = " or ".join(models[key] for key in close) or "a name from open_clip.list_models()"
    raise PatchSAEError(f"{name!r} is neither an open_clip model nor a folder: is it {hint}?")


def _remedy(folder: Path) -> str:
    # of the book's own model alone
    return "run `make clip`" if folder.name == "small_clip" else "correct the path, or copy a model there"


def _tag_or_file(model: str, pretrained) -> tuple[str | None, Path | None]:
    if pretrained is None:
        return None, None
    text, path = str(pretrained), Path(pretrained)
    if published.is_pretrained_cfg(model, text):
        return text, None
    if path.is_file():
        return None, path
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") or "/" in text or "\\" in text:
        raise PatchSAEError(f"There is no weights file {path.absolute()}: correct the path.")
    tags = ", ".join(published.list_pretrained_tags_by_model(model)) or "none"
    raise PatchSAEError(f"{model} has no weights {text!r}: give a file or one of the tags {tags}.")


def _published_preprocess(model: str, tag: str | None) -> dict:
    """Return the preprocessing of a tag; without one, what all tags of the model agree on."""
    tags = [tag] if tag else published.list_pretrained_tags_by_model(model)
    configs = [published.get_pretrained_cfg(model, t) for t in tags]
    keys = ("mean", "std", "interpolation", "resize_mode") if configs else ()
    return {key: configs[0].get(key) for key in keys if len({c.get(key) for c in configs}) == 1}
