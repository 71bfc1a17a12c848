"""One optimiser step of the autoencoder, dense or exactly sparse, whichever is faster."""

from __future__ import annotations

import time
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from . import sparse_cpu as cpu
from .errors import PatchSAEError
from .sae import SAE, Activation, InputNorm, Loss
from .sparse_cpu import Slopes, array

# Shares of active latents, by benchmarks/: above the first the dense step is faster, above the second
# computing the candidates again costs more than bf16 saves.
CROSSOVER, BF16_CROSSOVER = 0.15, 0.08


class Execution(StrEnum):
    """How a training step is computed; the numbers agree to 1e-5."""

    AUTO = "auto"  # sparse below the density where it stops paying, dense above
    DENSE = "dense"
    SPARSE = "sparse"
    SPARSE_F32 = "sparse_f32"  # sparse, and no bf16 candidate pass even where the processor has bf16 units


class Step(NamedTuple):
    """What one optimiser step saw."""

    reconstruction: float
    l1: float
    """Already multiplied by λ."""
    ghost: float
    l0: float
    """Mean number of active latents per token."""
    fired: Tensor
    """Which latents were active on any token: bool [d_sae]."""
    output: Tensor
    """Reconstruction before the update: [N, d_in]."""


class Stepper:
    """Own an SAE's optimiser state and take Adam steps on batches of tokens.

    Under a process group every process holds its share of a batch's tokens (possibly none); gradients,
    losses and firing are combined so that all processes take the step of one process with all tokens.
    """

    def __init__(
        self,
        sae: SAE,
        execution: Execution = Execution.AUTO,
        group: distributed.ProcessGroup | None = None,
    ):
        try:
            self.execution = Execution(execution)
        except ValueError:
            raise PatchSAEError(
                f"execution='{execution}' is unknown; choose one of {', '.join(Execution)}."
            ) from None
        self.sae, self.group = sae, group
        if group is not None and sae.config.activation is Activation.BATCHTOPK:
            raise PatchSAEError(
                "activation='batchtopk' chooses latents across the whole batch, which torchrun's processes "
                "do not see: train it with one process, or choose topk."
            )
        self.density = torch.full((), -1.0)
        self.seconds: dict[str, float] = {}
        self.adam = torch.optim.Adam(sae.parameters(), fused=sae.W_dec.device.type in ("cpu", "cuda"))
        for p in sae.parameters():
            self.adam.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def step(self, x: Tensor, lr: float, dead: Tensor | None = None, is_cls: Tensor | None = None) -> Step:
        """Take one step on tokens x [N, d_in]; `dead` and `is_cls` as in `SAE.losses`."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        if len(x) and self.group is None and self._pays(x):
            step, slopes = self._forward(x, dead, is_cls)
            self._update(slopes, lr)
        else:
            step = self._combine(self.backward(x, dead, is_cls), len(x))
            self.sae.project_decoder_gradient()
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
            self.sae.normalise_decoder()
        self.density.fill_(step.l0 / self.sae.d_sae)
        return step

    def backward(self, x: Tensor, dead: Tensor | None = None, is_cls: Tensor | None = None) -> Step:
        """Set the parameters' gradients, as `SAE.losses(...).total.backward()` would, and take no step."""
        if not len(x):
            fired = torch.zeros(self.sae.d_sae, dtype=torch.bool, device=x.device)
            return Step(0.0, 0.0, 0.0, 0.0, fired, x)
        if not self._pays(x):
            return self._dense(x, dead, is_cls)
        step, slopes = self._forward(x, dead, is_cls)
        with self._timed("update"):
            self._set_gradients(slopes)
        return step

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on bit for bit, by name; the tensors are not copies."""
        moments = {
            f"{name}.{key}": value
            for name, p in self.sae.named_parameters()
            for key, value in self.adam.state[p].items()
        }
        return {"density": self.density, **moments}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over a state returned by `state`; raises KeyError or RuntimeError on another layout."""
        for name, value in self.state().items():
            value.copy_(state[name])

    def _pays(self, x: Tensor) -> bool:
        """Tell whether to step sparsely, from the last step's density or, at first, from a few tokens."""
        if self.execution is Execution.DENSE or not can_be_sparse(self.sae, x):
            return False
        if self.execution is not Execution.AUTO:
            return True
        if self.density < 0:
            with torch.no_grad():
                some = x[:: max(1, len(x) // 64)]
                self.density.fill_((self.sae.pre_activations(some) > 0).float().mean())
        return self.density.item() < CROSSOVER

    def _dense(self, x: Tensor, dead: Tensor | None, is_cls: Tensor | None) -> Step:
        out = self.sae.losses(x, dead, is_cls)
        out.total.backward()
        self.sae.track_threshold(out.latents)
        active = out.latents.detach() > 0
        terms = (value.item() for value in (out.reconstruction, out.l1, out.ghost))
        return Step(*terms, active.sum().item() / len(x), active.any(0), out.output.detach())

    def _forward(self, x: Tensor, dead: Tensor | None, is_cls: Tensor | None) -> tuple[Step, Slopes]:
        sae, config, n = self.sae, self.sae.config, len(x)
        bf16 = self.execution is not Execution.SPARSE_F32 and cpu.has_bf16_units()
        bf16 = bf16 and self.density.item() < BF16_CROSSOVER
        tokens = x.contiguous().numpy()
        W_enc, b_enc, W_dec, b_dec = (array(p) for p in self._parameters())
        shift = b_dec if config.subtract_b_dec else np.zeros_like(b_dec)
        with self._timed("candidates"):
            lists, centred, product = cpu.active(tokens, W_enc, b_enc, shift, bf16)
        self._count("encoder", product)
        self._count("candidates", -product)
        with self._timed("decode"):
            x_hat = cpu.decode(cpu.by_token(lists, n), W_dec, b_dec)
            weight = np.empty(0, np.float32)
            if is_cls is not None and config.cls_weight != 1:
                weight = torch.where(is_cls, config.cls_weight, 1.0).numpy()
            loss, slope = cpu.slopes(tokens, x_hat, weight, config.loss is Loss.MSE_OVER_NORM)
        output, ghost, ghost_loss = torch.from_numpy(x_hat), cpu.no_ghost(sae.d_in), 0.0
        if config.ghost and dead is not None and bool(dead.any()):
            with self._timed("ghost"):
                ghost_loss, ghost = ghost_gradients(sae, x, output, dead, is_cls)
        l0, l1 = len(lists.value) / n, config.l1 * float(lists.value.sum(dtype=np.float64)) / n
        fired = torch.from_numpy(np.diff(lists.start) > 0)
        step = Step(loss, l1, ghost_loss, l0, fired, output)
        return step, Slopes(lists, centred, slope, config.l1 / n, ghost)

    def _set_gradients(self, slopes: Slopes) -> None:
        W_enc, _, W_dec, _ = (array(p) for p in self._parameters())
        enc, bias, dec = cpu.gradients(slopes, W_dec)
        toward = slopes.slope.sum(0) - (bias @ W_enc if self.sae.config.subtract_b_dec else 0)
        for p, grad in zip(self._parameters(), (enc, bias, dec, toward), strict=True):
            p.grad = torch.from_numpy(grad)

    def _update(self, slopes: Slopes, lr: float) -> None:
        with self._timed("update"):
            states = [self.adam.state[p] for p in self._parameters()]
            count = int(states[0]["step"]) + 1
            for state in states:
                state["step"].fill_(count)
            moments = [(array(state["exp_avg"]), array(state["exp_avg_sq"])) for state in states]
            *latents, b_dec = (
                cpu.Adam(array(p), *pair) for p, pair in zip(self._parameters(), moments, strict=True)
            )
            pull = cpu.update(slopes, *latents, lr, count)
            toward = slopes.slope.sum(0) - (pull if self.sae.config.subtract_b_dec else 0)
            cpu.adam_row(b_dec, toward, lr, count)

    def _parameters(self) -> tuple[Tensor, ...]:
        return self.sae.W_enc, self.sae.b_enc, self.sae.W_dec, self.sae.b_dec

    def _combine(self, step: Step, n: int) -> Step:
        """Average gradients and scalars over the group's tokens, and join what fired."""
        if self.group is None:
            return step
        device = step.fired.device
        sums = torch.tensor([n, *(n * value for value in step[:4])], dtype=torch.float64, device=device)
        distributed.all_reduce(sums, group=self.group)
        count, *sums = sums.tolist()
        for p in self.sae.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad * (n / count)
            distributed.all_reduce(p.grad, group=self.group)
        fired = step.fired.to(torch.uint8)
        distributed.all_reduce(fired, distributed.ReduceOp.MAX, group=self.group)
        return Step(*(value / count for value in sums), fired.bool(), step.output)

    @contextmanager
    def _timed(self, phase: str):
        started = time.perf_counter()
        yield
        self._count(phase, time.perf_counter() - started)

    def _count(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def can_be_sparse(sae: SAE, x: Tensor) -> bool:
    """Tell whether sparse execution exists for this SAE and these tokens."""
    config = sae.config
    plain = config.activation is Activation.RELU and config.input_norm is InputNorm.NONE
    return plain and x.device.type == "cpu" and x.dtype == sae.W_enc.dtype == torch.float32


@torch.no_grad()
def ghost_gradients(
    sae: SAE, x: Tensor, x_hat: Tensor, dead: Tensor, is_cls: Tensor | None, tile: int = 512
) -> tuple[float, cpu.Ghost]:
    """Compute the ghost term (`SAE`, facts.md §4.2) and its gradients for the dead latents alone.

    Dense in the dead latents by its nature, so it runs through tiles of tokens: no [tokens, dead] array.
    """
    rows = dead.nonzero().flatten()
    index = torch.full((sae.d_sae,), -1, dtype=torch.int32)
    index[rows] = torch.arange(len(rows), dtype=torch.int32)
    enc, dec, bias = sae.W_enc[rows], sae.W_dec[rows], sae.b_enc[rows]  # [D, d], [D, d], [D]
    for_enc, for_dec, for_bias = torch.zeros_like(enc), torch.zeros_like(dec), torch.zeros_like(bias)
    total, over = 0.0, len(x) * (sae.d_in if sae.config.loss is Loss.MSE_OVER_NORM else 1)
    centred = x - sae.b_dec if sae.config.subtract_b_dec else x
    for t in range(0, len(x), tile):
        part = slice(t, t + tile)
        error = sae.weighted_error(x_hat[part], x[part], None if is_cls is None else is_cls[part])
        r = x[part] - x_hat[part]
        z = torch.addmm(bias, centred[part], enc.T)  # [T, D]
        e = z.sub_(z.amax(-1, keepdim=True)).exp_()
        g = e @ dec  # [T, d]
        scale = r.norm(dim=-1, keepdim=True) / (2 * g.norm(dim=-1, keepdim=True) + 1e-6)
        g *= scale
        term = sae.error(g, r)
        weight = error / (term + 1e-6)
        total += (term * weight).sum().item() / over
        slope = 2 * (g - r) * weight * scale / over
        if sae.config.loss is Loss.MSE_OVER_NORM:
            slope /= r.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        for_dec.addmm_(e.T, slope)
        dz = e.mul_(slope @ dec.T)
        for_enc.addmm_(dz.T, centred[part])
        for_bias += dz.sum(0)
    return total, cpu.Ghost(*(array(v) for v in (index, for_enc, for_bias, for_dec)))
