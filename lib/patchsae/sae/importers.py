"""SAEs of other projects read as ours, and ours written as SAELens's.

An imported SAE computes exactly what its source computes, in float32. What this project's SAE cannot
express (gates, skip connections, transcoders, ...) is refused by name, never approximated. Layouts and
their traps: facts.md §6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from patchsae.runs.checks import check_weights
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import write_atomic, write_json
from patchsae.sae.foreign import (
    SAELENS_CONFIG,
    SAELENS_WEIGHTS,
    Checkpoint,
    Layout,
    Project,
    choose,
    inner,
    number,
    open_checkpoint,
    read_json,
    tensors,
)
from patchsae.sae.model import SAE, Activation, InputNorm, SAEConfig


class ImportCheck(NamedTuple):
    """How an imported SAE does on real tokens."""

    explained_variance: float  # 1 - Σ‖x - x̂‖² / Σ‖x - mean‖²
    l0: float  # active latents per token


SAELENS_SCALER = "activation_scaler.json"
SAELENS_LAYOUT = "6.54.12"  # the version whose layout is written; below 6 SAELens reads cfg.json otherwise

# Our tensor: its name in the source and its dimensions there.
NATIVE = {
    "W_enc": ("W_enc", ("d_in", "d_sae")),
    "b_enc": ("b_enc", ("d_sae",)),
    "W_dec": ("W_dec", ("d_sae", "d_in")),
    "b_dec": ("b_dec", ("d_in",)),
}
LINEAR_ENCODER = NATIVE | {
    "W_enc": ("encoder.weight", ("d_sae", "d_in")),
    "b_enc": ("encoder.bias", ("d_sae",)),
}
LINEAR = LINEAR_ENCODER | {"W_dec": ("decoder.weight", ("d_in", "d_sae"))}
PER_LATENT = {"threshold": ("threshold", ("d_sae",))}
ONE_FOR_ALL = {"threshold": ("threshold", ())}
YES_OR_NO = {True: True, False: False}
# The sources undo a norm without its epsilon: there x̂ differs by 1e-5 of a token's own scale.
NORMS = {
    "none": InputNorm.NONE,
    "layer_norm": InputNorm.LAYER_NORM,
    "constant_norm_rescale": InputNorm.UNIT_RMS,
    None: InputNorm.NONE,
    False: InputNorm.NONE,
}


def import_sae(path: str | Path, source: Project | str | None = None) -> SAE:
    """Read another project's SAE, a file or a folder as that project publishes it.

    `source` says whose it is; by default it is recognised. Weights become float32. Run `check_import` on
    real tokens afterwards: no file says which layer, which tokens or which scaling it is for.

    Raises
    ------
    PatchSAEError : the file is missing, damaged, of no known layout, at odds with its own configuration,
        would run code, has weights that are not finite, or describes an SAE that this project cannot
        express.
    """
    if source is not None and source not in list(Project):
        raise PatchSAEError(f"source='{source}' is unknown; choose one of {', '.join(Project)}.")
    try:
        checkpoint = open_checkpoint(Path(path), source)
        sae = READERS[checkpoint.source](checkpoint)
    except OSError as error:
        raise PatchSAEError(f"{path} cannot be read ({error.strerror}): correct the path.") from error
    check_weights(checkpoint.file, sae.state_dict())  # folding a constant may have made more of them
    return sae


@torch.no_grad()
def check_import(sae: SAE, tokens: Tensor) -> ImportCheck:
    """Measure an imported SAE on about 1,000 tokens [..., d_in] of the layer it was trained on.

    Accept it if the explained variance is above 0.5 and L0 within 10 % of the published one: a wrong
    layer, a lost TopK or a scaling that the file does not mention shows here (facts.md §6).
    """
    x = tokens.reshape(-1, tokens.shape[-1])
    f = sae.encode(x)
    unexplained = (x - sae.decode(f, x)).square().sum() / (x - x.mean(0)).square().sum()
    return ImportCheck(1 - unexplained.item(), (f > 0).sum(-1).float().mean().item())


@torch.no_grad()
def fold_input(sae: SAE, scale: float, mean: Tensor | float = 0.0) -> SAE:
    """Let `sae`, trained on (x - mean)·scale, take x and reconstruct x: in place, with the same latents.

    `mean` is [d_in] or a number. For constants that a project keeps outside its checkpoint.
    """
    if not 0 < scale < math.inf:
        raise PatchSAEError(f"scale={scale} must be above 0 and finite: give the constant of the run.")
    sae.b_dec.copy_(sae.b_dec / scale + mean)
    sae.W_dec /= scale
    sae.W_enc *= scale
    if not sae.config.subtract_b_dec:
        sae.b_enc -= (sae.W_enc * mean).sum(-1)
    return sae


def export_saelens(sae: SAE, folder: str | Path) -> Path:
    """Write `cfg.json` and `sae_weights.safetensors`, as `sae_lens.SAE.load_from_disk(folder)` reads them.

    BatchTopK becomes JumpReLU at its fixed threshold, which computes the same.
    """
    folder, config = Path(folder), sae.config
    kind = {
        Activation.RELU: "standard", Activation.TOPK: "topk",
        Activation.BATCHTOPK: "jumprelu", Activation.JUMPRELU: "jumprelu",
    }[config.activation]  # fmt: skip
    # Their layer norm divides by the sample's standard deviation, ours by the population's.
    scale = _std_ratio(sae.d_in) if config.input_norm is InputNorm.LAYER_NORM else 1.0
    weights = {"W_enc": sae.W_enc.T * scale, "b_enc": sae.b_enc}
    weights |= {"W_dec": sae.W_dec / scale, "b_dec": sae.b_dec / scale}
    if kind == "jumprelu":
        weights["threshold"] = sae.threshold.expand(sae.d_sae)
    weights = {name: w.detach().float().cpu().contiguous() for name, w in weights.items()}
    values = {
        "architecture": kind,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.subtract_b_dec,
        "normalize_activations": {v: k for k, v in NORMS.items() if isinstance(k, str)}[config.input_norm],
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_LAYOUT, "sae_lens_training_version": None},
    }
    if kind == "topk":
        values |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    write_atomic(folder / SAELENS_WEIGHTS, lambda temporary: save_file(weights, temporary))
    write_json(folder / SAELENS_CONFIG, values)
    return folder


def _patchsae(c: Checkpoint) -> SAE:
    choose(c, "gated_sae", {False: None}, False)
    cls_weight = number(c, "mse_cls_coefficient", default=SAEConfig.cls_weight)
    return _build(c, NATIVE, cls_weight=cls_weight, **_penalty(c))


def _penalty(c: Checkpoint) -> dict[str, Any]:
    l1 = number(c, "l1_coefficient", default=SAEConfig.l1)
    return {"l1": l1, "ghost": c.config.get("use_ghost_grads") is True}


def _prisma(c: Checkpoint) -> SAE:
    choose(c, "architecture", {"standard": None}, "standard")
    for feature in ("is_transcoder", "transcoder_with_skip_connection"):
        choose(c, feature, {False: None}, False)
    kind = choose(c, "activation_fn_str", {"relu": Activation.RELU, "topk": Activation.TOPK}, "relu")
    topk = kind is Activation.TOPK
    options = {"k": number(inner(c, "activation_fn_kwargs"), "k", int)} if topk else _penalty(c)
    norm = choose(c, "normalize_activations", NORMS, None)
    return _population_std(_build(c, NATIVE, activation=kind, input_norm=norm, **options))


def _saelens(c: Checkpoint) -> SAE:
    """Read SAELens's, of any version; its BatchTopK is published as JumpReLU."""
    choose(c, "reshape_activations", {"none": None}, "none")
    kinds = {"standard": Activation.RELU, "topk": Activation.TOPK, "jumprelu": Activation.JUMPRELU}
    kind, of_k = choose(c, "architecture", kinds, "standard"), c
    # Before version 6, TopK was an activation function of the standard architecture.
    old = "activation_fn_str" if "activation_fn_str" in c.config else "activation_fn"
    if choose(c, old, {"relu": False, "topk": True}, "relu"):
        kind, of_k = Activation.TOPK, inner(c, "activation_fn_kwargs")
    topk, jump = kind is Activation.TOPK, kind is Activation.JUMPRELU
    scaled = c.config.get("normalize_activations") in (True, "expected_average_only_in")
    # Some versions wrote a factor on the latents, although it was one everywhere.
    factor = c.state.get("scaling_factor")
    unused = ["scaling_factor"] if isinstance(factor, Tensor) and bool((factor == 1).all()) else []
    sae = _build(
        c,
        NATIVE | PER_LATENT if jump else NATIVE,
        unused,
        activation=kind,
        k=number(of_k, "k", int) if topk else 0,
        subtract_b_dec=choose(c, "apply_b_dec_to_input", YES_OR_NO, True),
        input_norm=InputNorm.NONE if scaled else choose(c, "normalize_activations", NORMS, None),
    )
    if topk and choose(c, "rescale_acts_by_decoder_norm", YES_OR_NO, False):
        _fold_decoder_norms(sae)
    return fold_input(sae, _constant_scale(c)) if scaled else _population_std(sae)


def _constant_scale(c: Checkpoint) -> float:
    file = c.file.parent / SAELENS_SCALER
    if not file.is_file():
        raise PatchSAEError(
            f"{c.file} was trained on activations times a constant that is not in its folder: put the "
            f"run's {SAELENS_SCALER} there, or save the SAE from SAELens with the constant folded in."
        )
    scaler = Checkpoint(c.source, file, read_json(file), {})
    choose(scaler, "has_whitening", {False: None}, False)
    return number(scaler, "scaling_factor")


def _saev(c: Checkpoint) -> SAE:
    """Read saev's: files without a schema were trained with b_dec subtracted, later ones are not.

    One kind is ambiguous: under schema 1, ReLU SAEs were first trained with the subtraction and then
    without, under the same header. They are read as saev reads them, without; if `check_import` fails on
    one, set `sae.config = dataclasses.replace(sae.config, subtract_b_dec=True)` and try again.
    saev's TopK passes negative values where fewer than k are positive; here they are zero.
    """
    schema = c.config.get("schema")
    if schema not in (None, 1, 2, 3, 4, 5):
        raise PatchSAEError(f"{c.file} has saev schema {schema!r}; this version reads none and 1 to 5.")
    sized = c if schema is None else inner(c, "cfg")
    name, params = "Relu", sized
    if schema == 1 and "activation" not in sized.config:
        name = c.config.get("cls")
    elif schema is not None:
        activation = inner(sized, "activation")
        name, params = activation.config.get("cls"), inner(activation, "params")
    kinds = {"Relu": Activation.RELU, "TopK": Activation.TOPK, "BatchTopK": Activation.BATCHTOPK}
    kind = choose(c._replace(config={"activation": name}), "activation", kinds)
    # Earlier files of BatchTopK lack the threshold: what they computed depended on the rest of the batch.
    stored = {"threshold": ("activation.threshold", ())} if kind is Activation.BATCHTOPK else {}
    k = 0 if kind is Activation.RELU else number(params, "top_k", int, 32)
    return _build(sized, NATIVE | stored, activation=kind, k=k, subtract_b_dec=schema is None)


def _sparsify(c: Checkpoint) -> SAE:
    for feature in ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed"):
        choose(c, feature, {False: None}, False)
    kind = choose(c, "activation", {"topk": Activation.TOPK}, "topk")
    return _build(c, LINEAR_ENCODER, activation=kind, k=number(c, "k", int))


def _dictionary_learning(c: Checkpoint) -> SAE:
    c = inner(c, "trainer")
    readers: dict[str, Callable[[], SAE]] = {
        "AutoEncoder": lambda: _build(c, LINEAR | {"b_dec": ("bias", ("d_in",))}),
        "AutoEncoderNew": lambda: _build(
            c, LINEAR | {"b_dec": ("decoder.bias", ("d_in",))}, subtract_b_dec=False
        ),
        "AutoEncoderTopK": lambda: _build(
            c, LINEAR, ["k", "threshold"], activation=Activation.TOPK, k=number(c, "k", int)
        ),
        "BatchTopKSAE": lambda: _with_threshold(c, LINEAR),
        "MatryoshkaBatchTopKSAE": lambda: _with_threshold(c, NATIVE),
        "JumpReluAutoEncoder": lambda: _fold_decoder_norms(
            _build(
                c,
                NATIVE | PER_LATENT,
                activation=Activation.JUMPRELU,
                subtract_b_dec=choose(c, "apply_b_dec_to_input", YES_OR_NO, False),
            )
        ),
    }
    return choose(c, "dict_class", readers)()


def _with_threshold(c: Checkpoint, layout: Layout) -> SAE:
    options = {"activation": Activation.BATCHTOPK, "k": number(c, "k", int)}
    sae = _build(c, layout | ONE_FOR_ALL, ["k", "group_sizes"], **options)
    if sae.threshold < 0:  # its mark of a training too short to have set one
        raise PatchSAEError(f"{c.file} has no threshold yet: give the SAE of a finished training.")
    return sae


READERS: dict[Project, Callable[[Checkpoint], SAE]] = {
    Project.PATCHSAE: _patchsae,
    Project.SAELENS: _saelens,
    Project.SAEV: _saev,
    Project.SPARSIFY: _sparsify,
    Project.PRISMA: _prisma,
    Project.DICTIONARY_LEARNING: _dictionary_learning,
}


def _build(c: Checkpoint, layout: Layout, ignore: Collection[str] = (), **options: Any) -> SAE:
    weights = tensors(c, layout, ignore)
    d_sae, d_in = weights["W_dec"].shape
    if options.get("activation", Activation.RELU) is not Activation.RELU:
        options |= {"l1": 0.0, "ghost": False}  # their sparsity does not come from the objective
    try:
        sae = SAE(SAEConfig(d_in, d_sae / d_in, **options))
    except PatchSAEError as error:
        raise PatchSAEError(f"The configuration of {c.file} is damaged: {error}") from error
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].reshape(sae.threshold.shape)
    sae.load_state_dict(weights)
    return sae


@torch.no_grad()
def _fold_decoder_norms(sae: SAE) -> SAE:
    """Let latents of length ‖row of W_dec‖ times the stored ones come out of the weights, in place."""
    norm = sae.W_dec.norm(dim=-1)
    sae.W_enc *= norm[:, None]
    sae.W_dec /= torch.where(norm > 0, norm, 1)[:, None]  # a row of zeros stays one
    sae.b_enc *= norm
    if sae.config.activation is Activation.JUMPRELU:
        sae.threshold *= norm
    return sae


def _population_std(sae: SAE) -> SAE:
    """Make a layer norm by the sample's standard deviation one by the population's, in place."""
    layer_norm = sae.config.input_norm is InputNorm.LAYER_NORM
    return fold_input(sae, 1 / _std_ratio(sae.d_in)) if layer_norm else sae


def _std_ratio(n: int) -> float:
    return math.sqrt(n / max(n - 1, 1))
