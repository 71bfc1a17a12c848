"""The sparse autoencoder of the paper, on one page."""

from __future__ import annotations

import hashlib
import json
import numbers
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchsae.runs.checks import check_counts, check_weights
from patchsae.runs.errors import PatchSAEError, choose
from patchsae.runs.stage import write_atomic, write_json

WEIGHTS, CONFIG = "sae.safetensors", "sae.json"
MOST_LATENTS = 2**31 - 1  # they are counted in 32 bits


class Loss(StrEnum):
    """What 'reconstruction error' means (facts.md §4.1)."""

    MSE_OVER_NORM = "mse_over_norm"  # mean of (x̂ - x)² / ‖x‖: the released code, the unit of Table 2
    SQUARED_ERROR = "squared_error"  # ‖x̂ - x‖²: Eq. 2 as printed


class Activation(StrEnum):
    """Which pre-activations survive as latents; all of them are non-negative."""

    RELU = "relu"  # the positive ones: the paper
    TOPK = "topk"  # the k largest of each token
    BATCHTOPK = "batchtopk"  # the k·N largest of a training batch; above a fixed threshold afterwards
    JUMPRELU = "jumprelu"  # those above a threshold of the latent's own; for imported weights


class InputNorm(StrEnum):
    """What is done to a token before the encoder and undone after the decoder; for imported weights."""

    NONE = "none"
    LAYER_NORM = "layer_norm"  # mean 0 and standard deviation 1 over dimensions
    UNIT_RMS = "unit_rms"  # length √d_in


@dataclass(frozen=True)
class SAEConfig:
    """Size and objective of a sparse autoencoder."""

    d_in: int
    """Width of the residual stream."""
    expansion: float = 64
    """Latents per input dimension: d_sae = expansion · d_in."""
    activation: Activation = Activation.RELU
    """Which pre-activations become latents."""
    k: int = 0
    """Active latents per token, for topk and batchtopk."""
    loss: Loss = Loss.MSE_OVER_NORM
    """Reconstruction term."""
    l1: float = 8e-5
    """Weight λ of the L1 penalty."""
    ghost: bool = True
    """Whether dead latents get ghost gradients."""
    cls_weight: float = 1.0
    """Weight of the CLS token's reconstruction error against a patch's."""
    subtract_b_dec: bool = True
    """Whether the encoder sees x - b_dec (the paper, footnote 2) or x."""
    input_norm: InputNorm = InputNorm.NONE
    """How tokens are normalised before the encoder."""

    def __post_init__(self):
        for name, kind in (("loss", Loss), ("activation", Activation), ("input_norm", InputNorm)):
            choose(self, name, kind)
        # a configuration may come from a file of anybody's, where 0 is not False and '64' no number
        check_counts(d_in=self.d_in)
        check_counts(0, k=self.k)
        for name, least in (("expansion", 1e-9), ("l1", 0.0), ("cls_weight", 0.0)):
            value = getattr(self, name)
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not real or not least <= value < float("inf"):
                raise PatchSAEError(f"{name}={value!r} must be a finite number of at least {least}.")
        for name in ("ghost", "subtract_b_dec"):
            if not isinstance(getattr(self, name), bool):
                raise PatchSAEError(f"{name}={getattr(self, name)!r} must be true or false.")
        if not 0.5 < self.expansion * self.d_in <= MOST_LATENTS:  # 0.5 is rounded to none
            raise PatchSAEError(
                f"expansion={self.expansion} of d_in={self.d_in} makes no number of latents from 1 to "
                f"{MOST_LATENTS}; give another."
            )
        if self.activation in (Activation.TOPK, Activation.BATCHTOPK) and not 1 <= self.k <= self.d_sae:
            raise PatchSAEError(
                f"activation='{self.activation}' needs k from 1 to {self.d_sae} latents; got k={self.k}."
            )

    @property
    def d_sae(self) -> int:
        return round(self.expansion * self.d_in)


class Losses(NamedTuple):
    """One training step's objective and what it was made of."""

    total: Tensor  # []
    reconstruction: Tensor  # []
    l1: Tensor  # [] already multiplied by λ
    ghost: Tensor  # []
    latents: Tensor  # [N, d_sae]
    output: Tensor  # [N, d_in]


class SAE(nn.Module):
    r"""Reconstruct residual-stream tokens from a sparse, non-negative code.

    For a token x ∈ R^d (Eq. 1 with biases, footnote 2):

        z = W_enc (x - b_dec) + b_enc          pre-activation       [d_sae]
        f = relu(z)                            latents              [d_sae]
        x̂ = f W_dec + b_dec                    reconstruction       [d_in]

    Both weight matrices have one row per latent, so that what a latent reads and what it writes are each
    contiguous in memory. TopK and BatchTopK keep the largest entries of relu(z) only.

    Objective (Eq. 2; the released code's scaling is the default, facts.md §4.1), averaged over tokens:

        L = R(x, x̂) + λ Σ_s |f_s| + ghost
        R = mean_j (x̂_j - x_j)² / ‖x‖   or   ‖x̂ - x‖²

    Rows of W_dec have unit length: they are renormalised after every step, and the part of the gradient
    along a row is removed before it, so that λ cannot be cheated by shrinking f and growing W_dec.

    Ghost gradients (footnote 5; facts.md §4.2) let latents D that have not fired for a while explain the
    residual r = x - x̂ through an exponential instead of the relu:

        g = exp(z_D) W_dec[D],   g ← g · sg(‖r‖ / 2‖g‖),   ghost = R'_j · sg(R_j / R'_j),   R' = R(sg r, g)

    where sg stops gradients and R_j is R before the mean over coordinates. It equals R in value and sends
    gradients to the dead latents' parameters (and b_dec) only.
    """

    def __init__(self, config: SAEConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.l1 = config.l1  # λ of the next step: the trainer lets it rise from 0 under `l1_warmup`
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randn(config.d_sae, config.d_in, generator=draw)
        rows = F.normalize(rows, dim=-1)
        self.W_dec = nn.Parameter(rows)  # [d_sae, d_in]
        self.W_enc = nn.Parameter(rows.clone())  # [d_sae, d_in]; tied at the start only
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        thresholds = {Activation.BATCHTOPK: 1, Activation.JUMPRELU: config.d_sae}
        if config.activation in thresholds:
            self.register_buffer("threshold", torch.zeros(thresholds[config.activation]))

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def pre_activations(self, x: Tensor) -> Tensor:
        """Compute z: [..., d_in] to [..., d_sae]."""
        if x.shape[-1] != self.d_in:
            raise PatchSAEError(
                f"tokens have width {x.shape[-1]} but this SAE was trained on width {self.d_in}; "
                f"use the backbone and block it was trained on."
            )
        x = self.normalise(x)[0]
        if self.config.subtract_b_dec:
            x = x - self.b_dec
        return F.linear(x, self.W_enc, self.b_enc)

    def activate(self, z: Tensor, batch: bool = False) -> Tensor:
        """Compute the latents f from z [..., d_sae]; `batch` lets BatchTopK choose within this batch."""
        f, kind = z.relu(), self.config.activation
        if kind is Activation.TOPK:
            best = f.topk(self.config.k, dim=-1)
            return torch.zeros_like(f).scatter(-1, best.indices, best.values)
        if kind is Activation.BATCHTOPK and batch:
            kept = f.flatten().topk(self.config.k * (f.numel() // self.d_sae)).values
            return f * (f >= kept[-1])
        return f * (z > self.threshold) if hasattr(self, "threshold") else f

    def encode(self, x: Tensor) -> Tensor:
        """Compute the latents f: [..., d_in] to [..., d_sae], non-negative."""
        return self.activate(self.pre_activations(x))

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """Compute the reconstruction x̂: [..., d_sae] to [..., d_in].

        `x` are the tokens that f came from; an SAE with an `input_norm` needs them to undo it.
        """
        x_hat = f @ self.W_dec + self.b_dec
        if self.config.input_norm is InputNorm.NONE:
            return x_hat
        if x is None:
            raise PatchSAEError(
                f"this SAE has input_norm='{self.config.input_norm}': decode(f, x) needs the tokens too."
            )
        _, mean, scale = self.normalise(x)
        return x_hat * scale + mean

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        if self.config.input_norm is InputNorm.NONE:
            return x, 0.0, 1.0
        layer = self.config.input_norm is InputNorm.LAYER_NORM
        mean = x.mean(-1, keepdim=True) if layer else 0.0
        scale = (x - mean).square().mean(-1, keepdim=True).sqrt()
        # SAELens and Prisma add the epsilon on the way in alone
        return (x - mean) / (scale + 1e-5 if layer else scale.clamp(min=1e-12)), mean, scale

    def losses(self, x: Tensor, dead: Tensor | None = None, is_cls: Tensor | None = None) -> Losses:
        """Compute the training objective on tokens.

        Parameters
        ----------
        x : [N, d_in]
        dead : bool [d_sae], latents that get ghost gradients (none if omitted)
        is_cls : bool [N], tokens weighted by `cls_weight`
        """
        z = self.pre_activations(x)  # [N, d_sae]
        f = self.activate(z, batch=True)
        x_hat = self.decode(f, x)  # [N, d_in]
        error = self.weighted_error(x_hat, x, is_cls)  # [N, d_in]
        reconstruction = self._average(error)
        l1 = self.l1 * f.sum(-1).mean()
        ghost = x.new_zeros(())
        if self.config.ghost and dead is not None and bool(dead.any()):
            ghost = self._ghost(x - x_hat, z[:, dead], error, self.W_dec[dead])
        return Losses(reconstruction + l1 + ghost, reconstruction, l1, ghost, f, x_hat)

    def error(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Compute R before any mean: [N, d_in]."""
        square = (x_hat - x).square()
        if self.config.loss is Loss.SQUARED_ERROR:
            return square
        return square / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)

    def weighted_error(self, x_hat: Tensor, x: Tensor, is_cls: Tensor | None = None) -> Tensor:
        """Compute R before any mean, CLS tokens weighted: [N, d_in]."""
        error = self.error(x_hat, x)
        if is_cls is None or self.config.cls_weight == 1:
            return error
        return error * torch.where(is_cls, self.config.cls_weight, 1.0)[:, None]

    def _average(self, error: Tensor) -> Tensor:
        # Eq. 2 sums over dimensions, the released code averages over them; both average over tokens
        return error.sum(-1).mean() if self.config.loss is Loss.SQUARED_ERROR else error.mean()

    def _ghost(self, residual: Tensor, z_dead: Tensor, error: Tensor, rows: Tensor) -> Tensor:
        residual = residual.detach()  # [N, d_in]
        # exp(z - max z) differs from exp(z) by a factor that the rescaling removes, and is finite
        g = (z_dead - z_dead.detach().amax(-1, keepdim=True)).exp() @ rows  # [N, d_in]
        length = residual.norm(dim=-1, keepdim=True)
        g = g * (length / (2 * g.norm(dim=-1, keepdim=True) + 1e-6)).detach()
        term = self.error(g, residual)
        return self._average(term * (error / (term + 1e-6)).detach())

    @torch.no_grad()
    def track_threshold(self, f: Tensor, rate: float = 0.01) -> None:
        """Move BatchTopK's threshold towards the least latent kept in a training batch (facts.md §7)."""
        if self.config.activation is Activation.BATCHTOPK and (f > 0).any():
            least = f[f > 0].min()
            self.threshold += (rate if self.threshold > 0 else 1.0) * (least - self.threshold)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from the gradient of each decoder row its component along the row."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)
            self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale every decoder row to unit length."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def fingerprint(self) -> str:
        """Return a sha256 over weights and configuration, independent of device and machine.

        Raises
        ------
        PatchSAEError : a weight is not finite; nothing that is named after such weights means anything.
        """
        check_weights("this SAE", self.state_dict())
        content = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, weights in sorted(self.state_dict().items()):
            content.update(name.encode())
            content.update(weights.float().cpu().contiguous().numpy())
        return content.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write weights (safetensors) and configuration (json) into `folder`, each atomically."""
        folder = Path(folder)
        weights = {name: w.cpu().contiguous() for name, w in self.state_dict().items()}
        write_json(folder / CONFIG, asdict(self.config))
        write_atomic(folder / WEIGHTS, lambda temporary: save_file(weights, temporary))
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> SAE:
        """Read an SAE from a folder written by `save`.

        Raises
        ------
        PatchSAEError : a file is missing, damaged, of another format, or has weights that are not finite.
        """
        folder = Path(folder)
        try:
            values = json.loads((folder / CONFIG).read_text("utf-8-sig"))
            weights = load_file(folder / WEIGHTS, device=str(device))
        except FileNotFoundError as error:
            raise PatchSAEError(
                f"'{error.filename or folder}' does not exist; train an SAE first "
                f"(notebook 01_training) or give the folder of one."
            ) from error
        except (ValueError, RecursionError, SafetensorError) as error:  # the first of JSON and of UTF-8
            raise PatchSAEError(
                f"'{folder}' holds no readable SAE ({error}); delete the folder and train it again."
            ) from error
        known = {field.name for field in fields(SAEConfig)}
        if not isinstance(values, dict) or set(values) != known:
            other = known ^ set(values) if isinstance(values, dict) else known
            raise PatchSAEError(
                f"'{folder / CONFIG}' has other fields than this version's: "
                f"{', '.join(sorted(other))}; train the SAE again."
            )
        try:
            config = SAEConfig(**values)
        except PatchSAEError as error:
            raise PatchSAEError(f"'{folder / CONFIG}' is damaged: {error}") from error
        there = tuple(weights["W_dec"].shape) if "W_dec" in weights else ()
        if there != (config.d_sae, config.d_in):  # before an SAE of that size takes the memory
            raise PatchSAEError(
                f"'{folder / CONFIG}' describes {config.d_sae} latents of width {config.d_in}, but "
                f"'{folder / WEIGHTS}' has W_dec of shape {list(there)}; train the SAE again."
            )
        sae = cls(config).to(device)
        expected = {name: tuple(w.shape) for name, w in sae.state_dict().items()}
        if (found := {name: tuple(w.shape) for name, w in weights.items()}) != expected:
            raise PatchSAEError(
                f"'{folder / WEIGHTS}' has tensors {found}, not {expected}; train the SAE again."
            )
        check_weights(f"'{folder / WEIGHTS}'", weights)
        sae.load_state_dict(weights)
        return sae


def geometric_median_images(tokens: Tensor) -> Tensor:
    """Find the released code's start of b_dec for tokens [I, T, d]: images, not tokens, are the points.

    The geometric median of the images as vectors of length T·d is a token per position; their mean is
    returned, [d] (facts.md §4.3).
    """
    if tokens.ndim != 3:
        raise PatchSAEError(f"tokens must be [I, T, d]; got shape {tuple(tokens.shape)}.")
    return geometric_median(tokens.flatten(1), tolerance=1e-20).view(tokens.shape[1:]).mean(0)


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-7) -> Tensor:
    """Find the point with the least sum of distances to `points` [N, d] by Weiszfeld's iteration.

    Starts at the mean and stops when the objective falls by less than `tolerance` of itself
    (facts.md §4.3). Returns [d].
    """
    if points.ndim != 2 or not len(points):
        raise PatchSAEError(f"points must be [N, d] with N > 0; got shape {tuple(points.shape)}.")
    centre, last = points.mean(0), torch.inf
    for _ in range(iterations):
        distance = (points - centre).norm(dim=-1).clamp(min=1e-6)
        total = distance.sum().item()
        if last - total <= tolerance * total:
            break
        last = total
        weight = 1 / distance
        centre = (points * weight[:, None]).sum(0) / weight.sum()
    return centre
