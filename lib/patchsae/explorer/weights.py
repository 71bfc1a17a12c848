"""The model itself as blocks of a page: towers, autoencoder, learned prompts and class vectors.

The page computes what `answers` computes here, in a worker (static/worker.js and what stands before it).
The image tower and the autoencoder are kept in half precision, learned prompts in single; the text tower,
which a page loads when words are typed, in the finest of `PRECISIONS` that is within `LIMIT` bytes.

A file is an array of 16-bit units, its low and its high bytes deflated one after the other, cut into parts
that are scripts in UTF-16. A unit that a script's text cannot hold is turned by TURN, after an ESCAPE.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from patchsae.adaptation.prompt_text import TextTower
from patchsae.adaptation.prompts import AdaptedBackbone
from patchsae.clip.backbone import Backbone
from patchsae.explorer.gallery import Shown
from patchsae.explorer.packing import pack
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import write_atomic
from patchsae.sae.model import SAE

STATIC = Path(__file__).parent / "static"
WORKER = (
    "products.js", "unpacking.js", "transformer.js", "latentcode.js", "words.js", "framing.js", "worker.js",
)  # fmt: skip
LIMIT = 8_000_000  # bytes on disk of what a page loads at a time: image tower with autoencoder, text tower
PART = 900_000  # units of a part: 1.8 MB
PRECISIONS = (None, 8, 7, 6, 5.5, 5.25, 5, 4.75, 4.5, 4.25, 4)
ESCAPE, TURN = 1, 0x4000
CONTEXT_MOST, LATENTS_MOST = 80, 4096


class _Unfit(Exception):
    """Say in a few words why a model cannot run in a page."""


def write_model(
    folder: Path, sae: SAE, models: Sequence[Shown], texts: Sequence[Sequence[Tensor | None]]
) -> tuple[dict[str, Any] | None, str]:
    """Write a model for the page; return what the index says of it, or None and a sentence why not.

    Parameters
    ----------
    folder : the folder of blocks
    models : the first one is run, and those of the others that are it with learned tokens
    texts : class vectors [C, e] of each picture set under each model, as `texts_of` returns them

    Returns
    -------
    {"models": which can run, "text": for which of them class names can be typed, "groups": which picture
    sets have class vectors, "bytes": of each file on disk}, ""
    """
    try:
        clip = models[0].backbone
        image, facts = _image_side(sae, clip)
        facts["models"], prompts, words = _prompts(models)
        tower = _File("tower", {**image, **prompts})
    except _Unfit as error:
        return None, f"The model does not run in this page: {error}."
    if tower.bytes > LIMIT:
        return None, (
            f"The model does not run in this page: its image tower and autoencoder take "
            f"{tower.bytes / 1e6:,.0f} MB, more than {LIMIT / 1e6:.0f}."
        )
    files = [tower]
    try:
        text, facts["text"] = _text_side(clip)
        found = (_File("words", {**text, **words}, steps) for steps in PRECISIONS)
        files += [next((one for one in found if one.bytes <= LIMIT), None) or _too_large()]
    except _Unfit:
        facts["text"] = None
    facts["files"] = {file.kind: file.facts for file in files}
    for file in files:
        file.write(folder)
    _write(folder, "engine", json.dumps({"source": worker_source(), "facts": facts}), "utf-8")
    for group, row in enumerate(texts):
        for m, vectors in enumerate(row):
            if vectors is not None:
                packed = pack(vectors.float().cpu().numpy())
                _write(folder, f"vectors-{group}-{m}", json.dumps({"vectors": packed}), "utf-8")
    runs = [model is not None for model in facts["models"]]
    return {
        "models": runs,
        "text": [run and facts["text"] is not None for run in runs],
        "groups": [all(v is not None for v in row) for row in texts],
        "bytes": {file.kind: file.bytes for file in files},
    }, ""


def worker_source() -> str:
    """Return the script of the worker."""
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in WORKER)


def _too_large():
    raise _Unfit("the text tower is too large")


class _File:
    """Tensors as units, and where they are."""

    def __init__(self, kind: str, tensors: dict[str, Tensor | bytes], steps: float | None = None):
        self.kind, listed, units = kind, [], []
        for name, tensor in tensors.items():
            form, shape, found = _units(name, tensor, steps)
            listed.append([name, form, *shape])
            units.append(found)
        whole = np.concatenate(units)
        streams = [_deflated(whole & 255, zlib.Z_HUFFMAN_ONLY), _deflated(whole >> 8, zlib.Z_RLE)]
        content = b"".join(streams)
        content += b"\0" * (len(content) % 2)
        cuts = range(0, len(content), 2 * PART)
        parts = [content[at : at + 2 * PART] for at in cuts]
        self.texts = [_text(part) for part in parts]
        self.bytes = sum(2 * len(text) for text in self.texts)
        self.facts = {
            "tensors": listed,
            "streams": [len(stream) for stream in streams],
            "parts": [{"bytes": len(part), "crc": zlib.crc32(part)} for part in parts],
        }

    def write(self, folder: Path) -> None:
        for number, text in enumerate(self.texts):
            # nothing but the content differs from JSON: a script may hold control characters as they are
            _write(folder, f"{self.kind}-{number}", '{"text":"' + text + '"}', "utf-16")


def _write(folder: Path, name: str, content: str, encoding: str) -> None:
    text = f'patchsaeExplorer.receive("{folder.name}","{name}",{content});\n'
    raw = b"\xff\xfe" + text.encode("utf-16-le") if encoding == "utf-16" else text.encode(encoding)
    write_atomic(folder / f"{name}.js", lambda temporary: temporary.write_bytes(raw))


def _units(name: str, tensor: Tensor | bytes, steps: float | None) -> tuple[str, list[int], np.ndarray]:
    if isinstance(tensor, bytes):
        return "bytes", [len(tensor)], np.frombuffer(tensor, np.uint8).astype(np.uint16)
    values = tensor.detach().float().cpu().numpy()
    if not np.isfinite(values).all() or np.abs(values).max(initial=0) > 65504:
        raise _Unfit(f"{name} has weights that half precision cannot hold")
    if name.startswith(("prompts.", "words.")) or values.ndim == 0:
        return "single", list(values.shape), values.astype("<f4").ravel().view("<u2")
    if steps is None or values.ndim < 2 or name.endswith(".pos"):
        return "half", list(values.shape), values.astype("<f2").ravel().view("<u2")
    rows = values.reshape(len(values), -1)
    least = np.float16(2.0**-14)  # below it half precision has fewer digits
    step = np.maximum(np.sqrt(np.square(rows).mean(1)) * 2.0**-steps, least).astype("<f2")
    whole = np.rint(rows / step.astype(np.float32)[:, None]).astype(np.int64)
    zigzag = np.where(whole < 0, -2 * whole - 1, 2 * whole)
    if zigzag.max(initial=0) > 65535:
        raise _Unfit(f"{name} has a weight far larger than the others of its row")
    return "steps", list(values.shape), np.concatenate([step.view("<u2"), zigzag.ravel().astype(np.uint16)])


def _deflated(units: np.ndarray, strategy: int) -> bytes:
    # numbers do not repeat, but that their high bytes are 0 for long: looking for more only takes time
    coder = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
    return coder.compress(units.astype(np.uint8).tobytes()) + coder.flush()


def _text(content: bytes) -> str:
    units = np.frombuffer(content, "<u2")
    special = np.isin(units, [0, ESCAPE, *map(ord, '\n\r"\\'), 0x2028, 0x2029, 0xFEFF, 0xFFFE])
    special |= (units >= 0xD800) & (units < 0xE000)
    out = np.empty(len(units) + int(special.sum()), "<u2")
    place = np.arange(len(units)) + np.cumsum(special)
    out[place] = np.where(special, units ^ TURN, units)
    out[place[special] - 1] = ESCAPE
    return out.tobytes().decode("utf-16-le")


def _image_side(sae: SAE, clip: Backbone) -> tuple[dict[str, Tensor], dict[str, Any]]:
    visual = clip.model.visual
    if isinstance(clip, AdaptedBackbone) or type(visual) is not VisionTransformer:
        raise _Unfit(f"{clip.name} is not open_clip's own vision transformer without learned tokens")
    pooled = visual.attn_pool is None and visual.pool_type == "tok" and not visual.final_ln_after_pool
    patch = visual.patch_size[0]
    square = visual.patch_size == (patch, patch) and patch % 2 == 0
    if not pooled or not square or visual.conv1.bias is not None:
        raise _Unfit(f"{clip.name} reads its patches, or its answer, in another way than CLIP")
    blocks, shape = _blocks(clip, visual.transformer.resblocks, "image")
    _check_norms(clip, visual.ln_pre, visual.ln_post)
    found = {
        **blocks,
        "image.conv": visual.conv1.weight,
        "image.cls": visual.class_embedding,
        "image.pos": visual.positional_embedding,
        "image.post.w": visual.ln_post.weight,
        "image.post.b": visual.ln_post.bias,
    }
    if isinstance(visual.ln_pre, nn.LayerNorm):
        found |= {"image.pre.w": visual.ln_pre.weight, "image.pre.b": visual.ln_pre.bias}
    if visual.proj is not None:
        found["image.proj"] = visual.proj
    if sae.d_sae % 8 or sae.d_sae > LATENTS_MOST:
        raise _Unfit(f"its autoencoder has {sae.d_sae} latents, not a multiple of 8 up to {LATENTS_MOST}")
    found |= {"sae.enc": sae.W_enc, "sae.enc.b": sae.b_enc, "sae.dec": sae.W_dec, "sae.dec.b": sae.b_dec}
    if hasattr(sae, "threshold"):
        found["sae.threshold"] = sae.threshold
    facts = {
        "frame": clip.frame._asdict(),
        "logits": {"scale": clip.logit_scale, "bias": clip.logit_bias},
        "vision": {
            **shape,
            "size": clip.image_size,
            "patch": patch,
            "tokens": clip.n_tokens,
            "hook": clip.block,
            "mean": list(clip.mean),
            "std": list(clip.std),
        },
        "sae": {
            "width": sae.d_in,
            "latents": sae.d_sae,
            "kind": str(sae.config.activation),
            "k": sae.config.k,
            "norm": str(sae.config.input_norm),
            "centred": sae.config.subtract_b_dec,
        },
    }
    return found, facts


def _text_side(clip: Backbone) -> tuple[dict[str, Tensor | bytes], dict[str, Any]]:
    try:
        tower = TextTower(clip)
        clip.tokenize("a")
    except PatchSAEError as error:
        raise _Unfit(str(error)) from error
    text, tokenizer = tower.text, clip._shared["tokenizer"]
    if not isinstance(tokenizer, open_clip.SimpleTokenizer) or tower.context > CONTEXT_MOST:
        raise _Unfit("its tokenizer is not CLIP's")
    blocks, shape = _blocks(clip, tower.blocks, "text")
    _check_norms(clip, text.ln_final)
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    found = {
        **blocks,
        "text.words": text.token_embedding.weight,
        "text.pos": text.positional_embedding,
        "text.norm.w": text.ln_final.weight,
        "text.norm.b": text.ln_final.bias,
        "text.merges": "\n".join(" ".join(pair) for pair in merges).encode(),
    }
    head, embed = text.text_projection, tower.width
    if head is not None:
        if isinstance(head, nn.Linear):
            raise _Unfit("its text tower ends in a layer that is not CLIP's")
        found["text.proj"], embed = head, head.shape[1]
    return found, {**shape, "context": tower.context, "embed": embed}


def _prompts(models: Sequence[Shown]) -> tuple[list[dict[str, Any] | None], dict, dict]:
    """Return what each model adds to the first one, None where it is another model."""
    facts, images, words = [], {}, {}
    clip = models[0].backbone
    for m, (_, model) in enumerate(models):
        adapted = isinstance(model, AdaptedBackbone)
        if model is not clip and not (adapted and model.plain.fingerprint() == clip.fingerprint()):
            facts.append(None)
            continue
        one: dict[str, Any] = {"prompts": None, "words": None, "template": None}
        if adapted:
            config, prompts = model.prompts.config, model.prompts
            one["template"] = config.text("{}") if config.text_depth else config.template
            with torch.no_grad():
                sides = (
                    ("prompts", images, prompts.image_prompts()),
                    ("words", words, prompts.text_prompts()),
                )
            for side, tensors, found in sides:
                if found:
                    tensors[f"{side}.{m}"] = torch.stack(list(found))
                    one[side] = list(tensors[f"{side}.{m}"].shape[:2])
        facts.append(one)
    return facts, images, words


def _blocks(clip: Backbone, blocks: Sequence[nn.Module], prefix: str):
    found: dict[str, Tensor] = {}
    kinds = {nn.GELU: "gelu", QuickGELU: "quick"}
    for number, block in enumerate(blocks):
        plain = type(block) is ResidualAttentionBlock and isinstance(block.ls_1, nn.Identity)
        gelu = kinds.get(type(block.mlp.gelu)) if plain else None
        if gelu is None or getattr(block.mlp.gelu, "approximate", "none") != "none":
            raise _Unfit(f"the {prefix} tower of {clip.name} has blocks that are not CLIP's")
        _check_norms(clip, block.ln_1, block.ln_2)
        parts = {
            "n1.w": block.ln_1.weight, "n1.b": block.ln_1.bias,
            "qkv.w": block.attn.in_proj_weight, "qkv.b": block.attn.in_proj_bias,
            "out.w": block.attn.out_proj.weight, "out.b": block.attn.out_proj.bias,
            "n2.w": block.ln_2.weight, "n2.b": block.ln_2.bias,
            "fc.w": block.mlp.c_fc.weight, "fc.b": block.mlp.c_fc.bias,
            "proj.w": block.mlp.c_proj.weight, "proj.b": block.mlp.c_proj.bias,
        }  # fmt: skip
        found |= {f"{prefix}.{number}.{name}": tensor for name, tensor in parts.items()}
    width, heads = blocks[0].attn.embed_dim, blocks[0].attn.num_heads
    if (width // heads) % 8 or blocks[0].mlp.c_fc.out_features > LATENTS_MOST:
        raise _Unfit(f"the {prefix} tower of {clip.name} has {width} dimensions in {heads} heads")
    return found, {"layers": len(blocks), "width": width, "heads": heads, "activation": gelu}


def _check_norms(clip: Backbone, *norms: nn.Module) -> None:
    for norm in norms:
        if not isinstance(norm, nn.Identity) and (not isinstance(norm, nn.LayerNorm) or norm.eps != 1e-5):
            raise _Unfit(f"{clip.name} has norms that are not CLIP's")
