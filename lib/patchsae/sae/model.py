"""The sparse autoencoder of the paper, on one page."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsae.runs.checks import check_weights
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.products import fast_float32
from patchsae.sae.config import Activation, InputNorm, Loss, SAEConfig
from patchsae.sae.files import CONFIG, WEIGHTS, read_sae, write_sae

__all__ = ["CONFIG", "SAE", "WEIGHTS", "Activation", "InputNorm", "Loss", "Losses", "SAEConfig"]


class Losses(NamedTuple):
    """One training step's objective and what it was made of."""

    total: Tensor  # []
    reconstruction: Tensor  # []
    l1_loss: Tensor  # [] already multiplied by λ
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

    @fast_float32()
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

    @fast_float32()
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
        l1_loss = self.l1 * f.sum(-1).mean()
        ghost = x.new_zeros(())
        if self.config.ghost and dead is not None and bool(dead.any()):
            ghost = self._ghost(x - x_hat, z[:, dead], error, self.W_dec[dead])
        return Losses(reconstruction + l1_loss + ghost, reconstruction, l1_loss, ghost, f, x_hat)

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
        write_sae(Path(folder), self.config, self.state_dict())
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> SAE:
        """Read an SAE from a folder written by `save`.

        Raises
        ------
        PatchSAEError : a file is missing, damaged, of another format, or has weights that are not finite.
        """
        config, weights = read_sae(Path(folder), device)
        sae = cls(config).to(device)
        expected = {name: tuple(w.shape) for name, w in sae.state_dict().items()}
        if (found := {name: tuple(w.shape) for name, w in weights.items()}) != expected:
            raise PatchSAEError(
                f"'{Path(folder) / WEIGHTS}' has tensors {found}, not {expected}; train the SAE again."
            )
        sae.load_state_dict(weights)
        return sae
