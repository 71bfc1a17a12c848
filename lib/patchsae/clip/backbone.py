"""CLIP cut in two at a block.

    images ──residual──▶ tokens [B, T, d] ──finish──▶ embeddings [B, e]

Both halves call the model's own modules in the model's own order, so `finish(residual(x))` equals
`encode_image(x)` to the last bit where both make their products alike (`runs.products`), and an
autoencoder placed between them is the only thing that can change an answer. Blocks count from 1 as in the
paper ("block 11 of 12", App. A); block 0 is the input of the first block.

What differs between image towers is in a tower class (`towers`). A prompt-adapted CLIP
(facts.md §1.1) is another tower: it appends its prompts in `embed`, replaces them in `run`, and
says so in `token_kind`.
"""

import contextlib
import copy
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsae.runs import compat  # noqa: F401  (must come before open_clip and timm)

# isort: split
import open_clip

from patchsae.clip.files import find_clip
from patchsae.clip.remembered import Remembered
from patchsae.clip.token_store import TokenStore
from patchsae.clip.towers import tower_of
from patchsae.images.files import Frame, as_frame
from patchsae.runs.checks import check_counts, check_finite
from patchsae.runs.errors import PatchSAEError, brief
from patchsae.runs.products import fast_float32
from patchsae.runs.progress import progress_bar

CACHE = 800_000  # bytes of tokens per thread; a block's hidden layer is four times that


class Backbone(nn.Module):
    """Hold a frozen CLIP cut in two after `block`.

    model: an open_clip model; it is frozen in place and kept in eval mode.
    block: 1 … n_blocks, or 0 for the input of the first block.
    tokenizer: function without arguments that returns the tokenizer; called at the first text.
    config: open_clip's `model_cfg`; it holds the activation, so it is part of the fingerprint.
    tower: by default chosen by the class of `model.visual`.
    Raises PatchSAEError for a block out of range, and for a tower without tokens or not square.
    """

    def __init__(self, model, block, *, name="clip", tokenizer=None, config=None, tower=None):
        super().__init__()
        self.model, self.name = model.requires_grad_(False), name
        self.tower = tower or tower_of(model, name)
        height, width = self.tower.image_size
        if height != width:
            raise PatchSAEError(f"{name} takes {height}×{width} images: choose a square model.")
        self.block = self._checked(block)
        self._config, self._make_tokenizer = config or {}, tokenizer
        self._shared = {}  # computed once for all `at_block` copies: tokenizer, weights' digest
        self.eval()

    @fast_float32()
    def residual(self, images: Tensor) -> Tensor:
        """Return the residual stream after `block`, tokens [B, T, d].

        images: [B, 3, H, W], float, normalised by `normalize`. Raises PatchSAEError for others.
        """
        self._checked_images(images)

        def run(batch: Tensor) -> Tensor:
            return self.in_parts(lambda part: self.tower.run(self._embed(part), 0, self.block), batch)

        memory = self._shared.get("memory")
        kept = memory and images.device.type == "cpu" and not torch.is_grad_enabled()
        return memory.tokens(self.tokens_of, images, run) if kept else run(images)

    def remember(self, memory: Remembered | TokenStore | None) -> None:
        """Ask `memory` for tokens first, in all `at_block` copies, but on a GPU and where gradients are."""
        self._shared["memory"] = memory

    @contextlib.contextmanager
    def remembering(self, memory: Remembered | TokenStore | None) -> Iterator[None]:
        """Use another memory while the block lasts."""
        before, self._shared["memory"] = self._shared.get("memory"), memory
        try:
            yield
        finally:
            self.remember(before)

    @fast_float32()
    def finish(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [B, e] that the rest of the tower makes of tokens [B, T, d].

        Not normalised; a model that pools nothing keeps [B, T, e]. Raises PatchSAEError for other tokens.
        """
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != (self.n_tokens, self.d_model):
            raise PatchSAEError(
                f"tokens have shape {list(tokens.shape)}, but {self.name} takes "
                f"[B, {self.n_tokens}, {self.d_model}]: pass every token that `residual` returned."
            )
        tokens = tokens.to(self.device, self.dtype)
        tokens = self.in_parts(lambda part: self.tower.run(part, self.block, self.n_blocks), tokens)
        return self.tower.pool(tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings [B, e] of normalised images [B, 3, H, W]: finish ∘ residual."""
        return self.finish(self.residual(images))

    @fast_float32()
    def residuals(self, images: Tensor, blocks: Iterable[int]) -> dict[int, Tensor]:
        """Return {block: tokens [B, T, d]} for several blocks in one pass."""
        self._checked_images(images)
        wanted = sorted({self._checked(block) for block in blocks})

        def streams(part: Tensor) -> Tensor:
            tokens, done, found = self._embed(part), 0, []
            for block in wanted:
                tokens, done = self.tower.run(tokens, done, block), block
                found.append(tokens)
            return torch.stack(found, 1)

        return dict(zip(wanted, self.in_parts(streams, images).unbind(1), strict=True))

    def in_parts(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Return `run` of a batch, on a processor a few images at a time.

        The tokens of a large batch leave the processor's cache at every step of a block: 64 images at a
        time take 1.5 times as long as 8, with the same bits (`benchmarks/`).
        """
        if self.device.type != "cpu" or torch.is_grad_enabled() or not len(batch):
            return run(batch)
        size = self.n_tokens * self.d_model * self.dtype.itemsize
        few = max(1, CACHE * torch.get_num_threads() // size)
        return torch.cat([run(part) for part in batch.split(few)]) if len(batch) > few else run(batch)

    def at_block(self, block: int) -> "Backbone":
        """Return a backbone that shares these weights but is cut after another block."""
        other = copy.copy(self)
        other.block = self._checked(block)
        return other

    def normalize(self, images: Tensor) -> Tensor:
        """Move uint8 images [B, 3, H, W] to the device and apply the model's own mean and std."""
        if images.dtype != torch.uint8:
            raise PatchSAEError(f"images are {images.dtype}: normalize takes uint8 pixels, 0…255.")
        pixels = self._checked_size(images).to(self.device).float() / 255
        mean, std = (pixels.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return ((pixels - mean) / std).to(self.dtype)

    tokens_of = property(lambda self: self.fingerprint(), doc="Whose tokens `residual` returns.")
    n_blocks = property(lambda self: len(self.tower.blocks))
    d_model = property(lambda self: self.tower.d_model)
    token_kind = property(lambda self: self.tower.token_kind, doc="[T]: cls, register, patch, prompt")
    n_tokens = property(lambda self: len(self.token_kind))
    grid = property(lambda self: self.tower.grid, doc="(rows, columns) of patches.")
    image_size = property(lambda self: self.tower.image_size[0], doc="Side in pixels.")
    frame = property(lambda self: self._frame(), doc="How the model's own transform frames a picture.")
    mean = property(lambda self: self._pixels("image_mean", open_clip.OPENAI_DATASET_MEAN))
    std = property(lambda self: self._pixels("image_std", open_clip.OPENAI_DATASET_STD))
    device = property(lambda self: next(self.model.visual.parameters()).device)
    dtype = property(lambda self: next(self.model.visual.parameters()).dtype)
    has_text = property(lambda self: self.model.logit_scale is not None, doc="Can be asked about words.")

    @property
    def logit_scale(self) -> float:
        """Return what cosines are multiplied by; PatchSAEError for a model without text."""
        self._need_text()
        return self.model.logit_scale.float().exp().item()

    @property
    def logit_bias(self) -> float:
        """Return the bias of the logits; 0 for models without one."""
        return 0.0 if self.model.logit_bias is None else self.model.logit_bias.float().item()

    @property
    def embed_dim(self) -> int:
        """Return the width e of the embeddings, asked of the head itself."""
        zeros = torch.zeros(1, self.n_tokens, self.d_model, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            return self.tower.pool(zeros).shape[-1]

    def fingerprint(self) -> str:
        """Return a sha256 over weights, configuration, name and block, for stage manifests.

        Independent of device, machine and path. The weights are read again only after a change.
        """
        state = self.state_dict()
        version = (self.dtype, sum(value._version for value in state.values()))
        if self._shared.get("version") != version:
            digest = hashlib.sha256(json.dumps(self._config, sort_keys=True).encode())
            for key, value in sorted(state.items()):
                digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
                raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(raw.numpy())
            self._shared.update(version=version, weights=digest.hexdigest())
        parts = [self._shared["weights"], self.name, self.block, self.mean, self.std]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Return token ids [N, context] of texts, truncated to the model's context length."""
        self._need_text()
        if "tokenizer" not in self._shared:
            if self._make_tokenizer is None:
                raise PatchSAEError(f"{self.name} has no tokenizer: pass tokenizer=… to Backbone.")
            self._shared["tokenizer"] = self._make_tokenizer()
        return self._shared["tokenizer"]([texts] if isinstance(texts, str) else list(texts))

    @fast_float32()
    def encode_text(self, texts: str | Sequence[str] | Tensor, normalize: bool = True) -> Tensor:
        """Return embeddings [N, e] of texts, or of token ids [N, context]."""
        self._need_text()
        tokens = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        return self.model.encode_text(tokens.to(self.device), normalize=normalize)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode: patch dropout would change the number of tokens."""
        return super().train(False)

    def __repr__(self) -> str:
        cut = f"{self.name} after block {self.block} of {self.n_blocks}"
        return f"Backbone({cut}: {self.n_tokens} tokens × {self.d_model}, {self.dtype})"

    def _embed(self, images: Tensor) -> Tensor:
        return self.tower.embed(images.to(self.device, self.dtype))

    def _checked_images(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise PatchSAEError(f"images are {images.dtype}: pass them through `normalize` first.")
        self._checked_size(images)

    def _checked_size(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.tower.image_size):
            raise PatchSAEError(
                f"images have shape {list(images.shape)}, but {self.name} takes "
                f"[B, 3, {self.image_size}, {self.image_size}]: resize or crop them first."
            )
        return images

    def _need_text(self) -> None:
        if not self.has_text:
            raise PatchSAEError(
                f"{self.name} has no text, so it cannot be asked for classes: choose a CLIP or SigLIP of "
                "open_clip, or leave zero-shot answers out."
            )

    def _frame(self) -> Frame:
        known = getattr(self.model.visual, "preprocess_cfg", None) or {}
        resize, fill = known.get("resize_mode") or "shortest", known.get("fill_color") or 0
        interpolation = known.get("interpolation")
        if "kept" in known:  # timm's own names
            return as_frame(Frame(self.image_size, resize, interpolation, fill, known["kept"]))
        # open_clip's own rule: whatever is not bilinear is bicubic
        interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"
        return as_frame(Frame(self.image_size, resize, interpolation, fill))

    def _pixels(self, statistic: str, default: Sequence[float]) -> tuple[float, ...]:
        return tuple(map(float, getattr(self.model.visual, statistic, None) or default))

    def _checked(self, block: int) -> int:
        if isinstance(block, bool) or not isinstance(block, int | np.integer):
            raise PatchSAEError(f"block is {block!r}: give a whole number in 0..{self.n_blocks}.")
        if not 0 <= block <= self.n_blocks:
            raise PatchSAEError(
                f"block {block} is outside 0..{self.n_blocks} of {self.name}: "
                "count blocks from 1; 0 is the input of the first."
            )
        return int(block)


def load_backbone(name, pretrained=None, *, block, device="cpu", dtype=torch.float32) -> Backbone:
    """Load a CLIP, or another vision transformer, and cut it after `block`.

    Parameters
    ----------
    name : an open_clip model name (`ViT-B-16-quickgelu`); `timm:` and a model name of timm
        (`timm:vit_small_patch14_dinov2.lvd142m`), which has no text; a folder laid out as either
        keeps one on the Hugging Face hub (open_clip_config.json and open_clip_model.safetensors,
        with bpe_simple_vocab.txt.gz where the vocabulary is a shortened one; or config.json and
        model.safetensors); `hf:organisation/name`, which is fetched once; or `patchsae:small_clip`,
        the small CLIP of this project, on drawings only.
    pretrained : for a model name, a tag (`openai`, fetched by open_clip), a file
        (safetensors, state dict, OpenAI's TorchScript archive ViT-B-16.pt), or None for random
        weights, which follow torch.manual_seed. Nothing is unpickled that could run code.
    dtype : what the weights are converted to, whatever they are stored in

    Raises
    ------
    PatchSAEError : an unknown name, tag or block; a missing, damaged or misfitting file; the wrong GELU for
        the weights (facts.md §3).
    """
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise PatchSAEError(f"dtype {dtype!r} is unknown: use float32, float16 or bfloat16.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = f"device {str(device)!r} is not available ({brief(error)})"
        raise PatchSAEError(f"{reason}: use 'cpu'.") from None
    source = find_clip(name, pretrained)
    model, config = source.build()
    tokenizer = source.tokenizer and functools.partial(source.tokenizer, getattr(model, "vocab_size", None))
    backbone = Backbone(model, block, name=source.name, tokenizer=tokenizer, config=config)
    source.load(model, config)  # last, so that a wrong block is refused before any download
    scales = [p for p in (model.logit_scale, model.logit_bias) if p is not None]
    exact = [p.data for p in scales]  # in half precision log(100) is off by 0.04 %
    model.to(device, dtype)
    for parameter, value in zip(scales, exact, strict=True):
        parameter.data = value.to(device)
    return backbone


def zero_shot_weights(
    backbone: Backbone,
    classnames: Sequence[str],
    templates: str | Sequence[str],
    renormalize: bool = True,
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Return one text vector per class, [n_classes, e] float32: the mean of its prompts.

    Each prompt's embedding is normalised first. Equal class names stay separate rows. Underscores in names
    become spaces.

    Templates are strings with `{}` where the class name goes; `batch_size` counts prompts per forward pass.
    With `renormalize` the mean is normalised again, as open_clip does; without, as in the released patchsae
    code, classes with dispersed prompts get shorter vectors (facts.md §3).

    Raises
    ------
    PatchSAEError : an empty list; a template without `{}`.
    """
    templates = [templates] if isinstance(templates, str) else list(templates)
    check_counts(batch_size=batch_size)
    if isinstance(classnames, str) or not len(classnames):
        raise PatchSAEError(f"classnames is {classnames!r}: give a list of at least one name.")
    if not templates:
        raise PatchSAEError("templates is empty: give at least one, such as 'a photo of a {}.'")
    if bad := [t for t in templates if not isinstance(t, str) or "{}" not in t]:
        raise PatchSAEError(f"template {bad[0]!r} has no place for the class name: add a {{}}.")
    step = max(1, batch_size // len(templates))
    starts, rows = range(0, len(classnames), step), []
    starts = progress_bar(starts, desc=f"text vectors of {len(classnames)} classes", shown=progress)
    with torch.no_grad():
        for start in starts:
            # replace, not format: names and templates may hold other braces; CoOp's names hold underscores
            names = [name.replace("_", " ") for name in classnames[start : start + step]]
            prompts = [template.replace("{}", name) for name in names for template in templates]
            unit = F.normalize(backbone.encode_text(prompts, normalize=False).float(), dim=-1)
            rows.append(unit.unflatten(0, (len(names), len(templates))).mean(1))
    weights = torch.cat(rows)
    _warn_of_twins(F.normalize(weights, dim=-1), classnames)
    return F.normalize(weights, dim=-1) if renormalize else weights


def _warn_of_twins(weights: Tensor, classnames: Sequence[str]) -> None:
    """Warn of different class names with one vector: what is beyond the model's context is not read."""
    plain = [" ".join(name.replace("_", " ").casefold().split()) for name in classnames]
    # a block of rows at a time: 20,000 classes are 1.6 GB of cosines
    for start in range(0, len(plain), 1024):
        near = (weights[start : start + 1024] @ weights.T > 1 - 1e-6).nonzero().tolist()
        for i, j in near:
            if start + i < j and plain[start + i] != plain[j]:
                warnings.warn(
                    f"class names '{classnames[start + i]:.80}' and '{classnames[j]:.80}' are one to the "
                    "model, which reads no more words than its context has: shorten what they share.",
                    stacklevel=3,
                )
                return


def zero_shot_logits(
    backbone: Backbone, embeddings: Tensor, weights: Tensor, checked: bool = True
) -> Tensor:
    """Return logit_scale · cos(image, class) + logit_bias, [B, n_classes] float32.

    embeddings [B, e] may have any length; weights [n_classes, e] count by the length they have,
    so that `renormalize=False` ranks classes as the released code does.
    Raises PatchSAEError for logits that are not finite, unless the caller looks at them itself.
    """
    cosine = F.normalize(embeddings.float(), dim=-1) @ weights.float().T
    logits = backbone.logit_scale * cosine + backbone.logit_bias
    remedy = "use dtype float32, or check the weights of the model, of its texts and of the SAE"
    return check_finite(f"what {backbone.name} answers", logits, remedy) if checked else logits


def __getattr__(name: str):
    if name != "OPENAI_IMAGENET_TEMPLATES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # 80 functions in open_clip; the same 80 as strings here
    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
