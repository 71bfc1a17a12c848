"""One training step of every competitor behind one small interface.

A competitor starts from the same weights, sees the same float32 tokens and does what its own trainer does
in a step: forward, loss, backward, whatever it does to the decoder's gradient and rows, Adam as it sets it
up. Logging is left out. Packages are called, not copied; the released PatchSAE's step is written afresh.

ViT-Prisma is absent: its release on the package index, 0.1.4, has no sparse autoencoder. saev, the other
package for vision, is there in its place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload import Weights

import patchsae.runs.compat  # noqa: F401  (before anything that imports torchvision)
from patchsae.sae.model import SAE, SAEConfig
from patchsae.sae.step import Execution, Stepper


@dataclass(frozen=True)
class Setting:
    """What a step needs beside weights and tokens."""

    tokens: int
    """Tokens per step."""
    l0: int
    """Active latents per token: TopK's k."""
    l1: float = 8e-5
    """Weight of the L1 penalty."""
    lr: float = 1e-6
    """Adam's step size: too small to move the sparsity while it is timed."""
    dead: Tensor | None = None
    """Latents that get ghost gradients (bool [d_sae]), where the competitor has them."""


def mean_over_norm(residual: Tensor, x: Tensor) -> Tensor:
    """Compute the released PatchSAE's reconstruction error, and ours: []."""
    return (residual.square() / x.norm(dim=-1, keepdim=True)).mean()


def mean_square(residual: Tensor, x: Tensor) -> Tensor:
    """Compute the reconstruction error of overcomplete and saev: []."""
    return residual.square().mean()


def summed_square(residual: Tensor, x: Tensor) -> Tensor:
    """Compute the reconstruction error of SAELens: []."""
    return residual.square().sum(-1).mean()


def unexplained(residual: Tensor, x: Tensor) -> Tensor:
    """Compute the reconstruction error of sparsify: []."""
    return residual.square().sum() / (x - x.mean(0)).square().sum()


class Competitor(Protocol):
    """A model in training."""

    error: Callable[[Tensor, Tensor], Tensor]
    """Reconstruction error of its objective, from residual and tokens; only checks use it."""

    def step(self, x: Tensor) -> float:
        """Take one optimiser step on tokens [N, d_in] and return the loss."""

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents [N, d_sae] and reconstruction [N, d_in] as the competitor computes them."""


class Ours:
    """PatchSAE's own step."""

    error = staticmethod(mean_over_norm)

    def __init__(self, weights: Weights, setting: Setting, execution: Execution):
        d_sae, d_in = weights.rows.shape
        ghost = setting.dead is not None
        self.sae = SAE(SAEConfig(d_in=d_in, expansion=d_sae // d_in, l1=setting.l1, ghost=ghost))
        self.sae.load_state_dict(_by_name(weights, weights.rows))
        self.sae.to(weights.rows.device)
        self.stepper, self.setting, self.l0 = Stepper(self.sae, execution), setting, 0.0

    def step(self, x: Tensor) -> float:
        out = self.stepper.step(x, lr=self.setting.lr, dead=self.setting.dead)
        self.l0 = out.l0
        return out.reconstruction + out.l1_loss + out.ghost

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.sae.encode(x)
        return latents, self.sae.decode(latents)


class Plain:
    """Take the step anybody would write: ReLU-L1, autograd, fused Adam, unit decoder rows."""

    error = staticmethod(mean_over_norm)

    def __init__(self, weights: Weights, setting: Setting):
        start = (weights.rows, weights.b_enc, weights.rows, weights.b_dec)
        self.parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        self.adam = torch.optim.Adam(self.parameters, lr=setting.lr, fused=True)
        self.setting = setting

    def product(self, x: Tensor) -> Tensor:
        """Compute the encoder's matrix product and nothing else: [N, d_sae]."""
        with torch.no_grad():
            return x @ self.parameters[0].T

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        W_enc, b_enc, W_dec, b_dec = self.parameters
        latents = F.linear(x - b_dec, W_enc, b_enc).relu()
        return latents, latents @ W_dec + b_dec

    def step(self, x: Tensor) -> float:
        latents, x_hat = self.codes(x)
        error = ((x_hat - x).square() / x.norm(dim=-1, keepdim=True)).mean()
        loss = error + self.setting.l1 * latents.sum(-1).mean()
        loss.backward()
        W_dec = self.parameters[2]
        _remove_parallel(W_dec)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=-1, keepdim=True)
        return loss.item()


class Released:
    """Take the released PatchSAE's step (facts.md §4.1, §4.2): everything dense, torch's default Adam."""

    error = staticmethod(mean_over_norm)

    def __init__(self, weights: Weights, setting: Setting):
        start = (weights.rows.T.contiguous(), weights.b_enc, weights.rows, weights.b_dec)
        self.parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        self.adam = torch.optim.Adam(self.parameters, lr=setting.lr)
        self.silent = torch.zeros(len(weights.rows), dtype=torch.int64, device=weights.rows.device)
        self.setting = setting

    def pre_activations(self, x: Tensor) -> Tensor:
        W_enc, b_enc, _, b_dec = self.parameters
        return (x - b_dec) @ W_enc + b_enc

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.pre_activations(x).relu()
        return latents, latents @ self.parameters[2] + self.parameters[3]

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the objective [] and the latents [N, d_sae]."""
        _, _, W_dec, b_dec = self.parameters
        z = self.pre_activations(x)
        latents = z.relu()
        x_hat = latents @ W_dec + b_dec
        error = (x_hat - x).square() / x.norm(dim=-1, keepdim=True)
        loss = error.mean() + self.setting.l1 * latents.abs().sum(-1).mean()
        if self.setting.dead is not None:
            loss = loss + self._ghost(x - x_hat, z, error)
        return loss, latents

    def _ghost(self, residual: Tensor, z: Tensor, error: Tensor) -> Tensor:
        dead, target = self.setting.dead, residual.detach()
        ghost = z[:, dead].exp() @ self.parameters[2][dead]
        half = target.norm(dim=-1, keepdim=True) / (2 * ghost.norm(dim=-1, keepdim=True) + 1e-6)
        miss = (ghost * half.detach() - target).square() / target.norm(dim=-1, keepdim=True)
        return (miss * (error / (miss + 1e-6)).detach()).mean()

    def step(self, x: Tensor) -> float:
        W_dec = self.parameters[2]
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=-1, keepdim=True)
        loss, latents = self.loss(x)
        with torch.no_grad():  # which latents are dead is decided by this count
            self.silent = torch.where((latents > 0).any(0), 0, self.silent + 1)
        self.adam.zero_grad()
        loss.backward()
        _remove_parallel(W_dec)
        self.adam.step()
        return loss.item()


class SAELens:
    """Call SAELens: StandardTrainingSAE in an SAETrainer."""

    error = staticmethod(summed_square)

    def __init__(self, weights: Weights, setting: Setting):
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        (d_sae, d_in), device = weights.rows.shape, str(weights.rows.device)
        self.sae = StandardTrainingSAE(
            StandardTrainingSAEConfig(
                d_in, d_sae, l1_coefficient=setting.l1, decoder_init_norm=None, device=device
            )
        )
        self.sae.load_state_dict(_by_name(weights, weights.rows.T))
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=setting.tokens,
            lr=setting.lr,
            lr_end=setting.lr,
            device=device,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer = SAETrainer(config, self.sae, data_provider=iter(()))

    def step(self, x: Tensor) -> float:
        loss = self.trainer.step(x).loss.item()
        self.trainer.n_training_steps += 1
        return loss

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.sae.encode(x)
        return latents, self.sae.decode(latents)


class Overcomplete:
    """Call overcomplete: an untied SAE, loss mse_l1, its train_sae on one batch without monitoring.

    It has no decoder bias, so it gets centred tokens.
    """

    error = staticmethod(mean_square)

    def __init__(self, weights: Weights, setting: Setting):
        import matplotlib

        if not hasattr(matplotlib.cm, "get_cmap"):
            # gone from the matplotlib pinned here, and called while overcomplete's figures are imported
            matplotlib.cm.get_cmap = matplotlib.colormaps.__getitem__
        from overcomplete.sae import SAE as Untied
        from overcomplete.sae.losses import mse_l1
        from overcomplete.sae.train import train_sae

        d_sae, d_in = weights.rows.shape
        self.model, self.train, self.objective = Untied(d_in, d_sae, "identity"), train_sae, mse_l1
        self.model.dictionary._weights.data.copy_(weights.rows)
        self.model.untied(bias=True)
        self.model.encoder.bias.data.copy_(weights.b_enc)
        self.model.to(weights.rows.device)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=setting.lr)
        # its L1 term sums over the batch
        self.penalty, self.b_dec, self.last = setting.l1 / setting.tokens, weights.b_dec, 0.0

    def step(self, x: Tensor) -> float:
        batches, device = [x - self.b_dec], str(x.device)
        self.train(
            self.model, batches, self._criterion, self.adam, nb_epochs=1, monitoring=0, device=device
        )
        return self.last.item()

    def _criterion(self, *terms: Tensor) -> Tensor:
        loss = self.objective(*terms, penalty=self.penalty)
        self.last = loss.detach()
        return loss

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, latents, x_hat = self.model(x - self.b_dec)
        return latents, x_hat + self.b_dec


class Saev:
    """Call saev: its SparseAutoencoder in the order of its training loop."""

    error = staticmethod(mean_square)

    def __init__(self, weights: Weights, setting: Setting):
        from saev.config import SparseAutoencoder as Config
        from saev.nn import SparseAutoencoder

        d_sae, d_in = weights.rows.shape
        config = Config(d_vit=d_in, exp_factor=d_sae // d_in, sparsity_coeff=setting.l1)
        self.sae = SparseAutoencoder(config)
        self.sae.load_state_dict(_by_name(weights, weights.rows.T))
        self.sae.to(weights.rows.device)
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=setting.lr, fused=True)

    def step(self, x: Tensor) -> float:
        self.sae.normalize_w_dec()
        _, _, parts = self.sae(x)
        parts.loss.backward()
        self.sae.remove_parallel_grads()
        self.adam.step()
        self.adam.zero_grad()
        return parts.loss.item()

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, latents, _ = self.sae(x)
        return latents, x_hat


class Sparsify:
    """Call sparsify: TopK with k = L0. Another objective, so never the one to beat."""

    error = staticmethod(unexplained)

    def __init__(self, weights: Weights, setting: Setting):
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        d_sae, d_in = weights.rows.shape
        self.coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=setting.l0))
        start = {"encoder.weight": weights.rows, "encoder.bias": weights.b_enc}
        self.coder.load_state_dict({**start, "W_dec": weights.rows, "b_dec": weights.b_dec})
        self.coder.to(weights.rows.device)
        self.adam = torch.optim.Adam(self.coder.parameters(), lr=setting.lr)
        self.fired = torch.zeros(d_sae, dtype=torch.bool, device=weights.rows.device)

    def step(self, x: Tensor) -> float:
        self.coder.set_decoder_norm_to_unit_norm()
        out = self.coder(x)
        self.fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()
        return out.fvu.item()

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.coder(x)
        latents = x.new_zeros(len(x), self.coder.num_latents)
        return latents.scatter_(1, out.latent_indices, out.latent_acts), out.sae_out


OURS = {
    "ours, float32": Execution.SPARSE_F32,
    "ours, bf16 candidates": Execution.SPARSE,
    "ours, automatic": Execution.AUTO,
    "ours, dense": Execution.DENSE,
}
WRITTEN_HERE = {"released PatchSAE step": Released, "plain dense torch, fused Adam": Plain}
PACKAGES = {  # name on the package index -> module, adapter
    "sae-lens": ("sae_lens", SAELens),
    "overcomplete": ("overcomplete", Overcomplete),
    "saev": ("saev", Saev),
    "eai-sparsify": ("sparsify", Sparsify),
}
REFERENCE = "eai-sparsify"  # TopK: listed, but not compared with
RELEASED, PLAIN = WRITTEN_HERE


def missing() -> list[str]:
    """Return the packages of the comparison that are not installed."""
    return [name for name, (module, _) in PACKAGES.items() if importlib.util.find_spec(module) is None]


def rivals() -> list[str]:
    """Return every installed competitor with a ReLU-L1 objective."""
    absent = {REFERENCE, *missing()}
    return [*WRITTEN_HERE, *(name for name in PACKAGES if name not in absent)]


def make(name: str, weights: Weights, setting: Setting) -> Competitor:
    """Build a competitor by name from weights, which it copies."""
    if name in OURS:
        return Ours(weights, setting, OURS[name])
    adapter = WRITTEN_HERE[name] if name in WRITTEN_HERE else PACKAGES[name][1]
    return adapter(weights, setting)


def label(name: str) -> str:
    """Return a competitor's name with its version, if it is a package."""
    if name not in PACKAGES:
        return name
    objective = " (TopK, another objective, for reference)" if name == REFERENCE else ""
    return f"{name} {metadata.version(name)}{objective}"


def _by_name(weights: Weights, encoder: Tensor) -> dict[str, Tensor]:
    return {"W_enc": encoder, "b_enc": weights.b_enc, "W_dec": weights.rows, "b_dec": weights.b_dec}


@torch.no_grad()
def _remove_parallel(rows: nn.Parameter) -> None:
    along = (rows.grad * rows).sum(-1, keepdim=True)
    rows.grad -= along * rows
