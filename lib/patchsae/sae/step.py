"""One optimiser step of the autoencoder, dense or exactly sparse, whichever is faster."""

from __future__ import annotations

import time
from contextlib import contextmanager
from enum import StrEnum
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.products import fast_float32
from patchsae.sae import cpu
from patchsae.sae.cpu_kernels import BETA1, BETA2, EPS
from patchsae.sae.ghost import GhostRows, Pass, ghost_gradients
from patchsae.sae.model import SAE, Activation, InputNorm

# Shares of active latents, by benchmarks/: above the first the dense step is faster, above the second
# computing the candidates again costs more than bf16 saves. It holds for small SAEs too: with 1,024 or
# 2,048 latents on 128 dimensions and 512 tokens a step, one core, ReLU takes 4.6 to 12 ms sparsely at 4.5 %
# and 11 to 14 ms at 12 %, and 20 to 24 ms densely.
CROSSOVER, BF16_CROSSOVER = 0.15, 0.08
# On an H200 a step at 49,152 latents takes 1.8 µs and 2.1 ns for each active latent of a token, with bf16
# candidates 1.0 µs and 1.6 ns; the dense one takes 9.6 µs (benchmarks/gpu-h200.json, L0 50 and 150).
GPU_CROSSOVER = 0.075
TILE = 512  # tokens encoded at a time where there is no sparse execution


class Execution(StrEnum):
    """How a training step is computed; the numbers agree to 1e-5."""

    AUTO = "auto"  # sparse below the density where it stops paying, dense above
    DENSE = "dense"
    SPARSE = "sparse"
    SPARSE_F32 = "sparse_f32"  # sparse, and no bf16 candidate pass even where the processor has bf16 units


class Step(NamedTuple):
    """What one optimiser step saw."""

    reconstruction: float
    l1_loss: float
    """Already multiplied by λ."""
    ghost: float
    l0: float
    """Mean number of active latents per token."""
    l1_norm: float
    """Mean sum of latents per token: what λ multiplies."""
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

    @fast_float32()
    def step(self, x: Tensor, lr: float, dead: Tensor | None = None, is_cls: Tensor | None = None) -> Step:
        """Take one step on tokens x [N, d_in]; `dead` and `is_cls` as in `SAE.losses`."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        if len(x) and self.group is None and self._pays(x):
            step, done, ghost = self._forward(x, dead, is_cls)
            with self._timed("update"):
                self._update(done, ghost, lr)
        else:
            step = self._combine(self.backward(x, dead, is_cls), len(x))
            self.sae.project_decoder_gradient()
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
            self.sae.normalise_decoder()
        self.density.fill_(step.l0 / self.sae.d_sae)
        return step

    @fast_float32()
    def backward(self, x: Tensor, dead: Tensor | None = None, is_cls: Tensor | None = None) -> Step:
        """Set the parameters' gradients, as `SAE.losses(...).total.backward()` would, and take no step."""
        if not len(x):
            fired = torch.zeros(self.sae.d_sae, dtype=torch.bool, device=x.device)
            return Step(0.0, 0.0, 0.0, 0.0, 0.0, fired, x)
        if not self._pays(x):
            return self._dense(x, dead, is_cls)
        step, done, ghost = self._forward(x, dead, is_cls)
        with self._timed("update"), torch.no_grad():
            for name, grad in self._kernels().gradients(self.sae, done, ghost).items():
                getattr(self.sae, name).grad = grad
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
        if self.execution is Execution.DENSE or not can_step_sparsely(self.sae, x):
            return False
        if self.execution is not Execution.AUTO:
            return True
        if self.density < 0 and self.sae.config.activation is Activation.TOPK:
            self.density.fill_(self.sae.config.k / self.sae.d_sae)
        elif self.density < 0:
            with torch.no_grad():
                some = x[:: max(1, len(x) // 64)]
                self.density.fill_((self.sae.pre_activations(some) > 0).float().mean())
        return self.density.item() < (CROSSOVER if x.device.type == "cpu" else GPU_CROSSOVER)

    def _dense(self, x: Tensor, dead: Tensor | None, is_cls: Tensor | None) -> Step:
        out = self.sae.losses(x, dead, is_cls)
        out.total.backward()
        self.sae.track_threshold(out.latents)
        active = out.latents.detach() > 0
        terms = (value.item() for value in (out.reconstruction, out.l1_loss, out.ghost))
        total = out.latents.detach().sum().item()
        counts = active.sum().item() / len(x), total / len(x)
        return Step(*terms, *counts, active.any(0), out.output.detach())

    def _forward(
        self, x: Tensor, dead: Tensor | None, is_cls: Tensor | None
    ) -> tuple[Step, Pass, GhostRows | None]:
        sae, config = self.sae, self.sae.config
        bf16 = self.execution is not Execution.SPARSE_F32 and self.density.item() < BF16_CROSSOVER
        weight = None
        if is_cls is not None and config.cls_weight != 1:
            weight = torch.where(is_cls, config.cls_weight, 1.0)
        with torch.no_grad():
            done = self._kernels().forward(sae, x.contiguous(), weight, bf16, self._count)
        ghost, ghost_loss = None, 0.0
        if config.ghost and dead is not None and bool(dead.any()):
            with self._timed("ghost"):
                ghost_loss, ghost = ghost_gradients(sae, x, done.output, dead, is_cls)
        l0, l1_norm = done.active / len(x), done.total / len(x)
        terms = done.loss, sae.l1 * l1_norm, ghost_loss
        return Step(*terms, l0, l1_norm, done.fired, done.output), done, ghost

    @torch.no_grad()
    def _update(self, done: Pass, ghost: GhostRows | None, lr: float) -> None:
        states = {name: self.adam.state[p] for name, p in self.sae.named_parameters()}
        count = int(states["b_dec"]["step"]) + 1
        for state in states.values():
            state["step"].fill_(count)
        moments = {name: (state["exp_avg"], state["exp_avg_sq"]) for name, state in states.items()}
        grad = self._kernels().update(self.sae, done, ghost, moments, lr, count)
        m, v = moments["b_dec"]
        m.lerp_(grad, 1 - BETA1)
        v.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        root = (v / (1 - BETA2**count)).sqrt() + EPS
        self.sae.b_dec.addcdiv_(m, root, value=-lr / (1 - BETA1**count))

    def _kernels(self) -> ModuleType:
        """Return the module with `forward`, `gradients` and `update` for the SAE's device."""
        if self.sae.W_dec.device.type == "cpu":
            return cpu
        from patchsae.sae import gpu  # needs Triton, which comes with torch's CUDA build alone

        return gpu

    def _combine(self, step: Step, n: int) -> Step:
        """Average gradients and scalars over the group's tokens, and join what fired."""
        if self.group is None:
            return step
        device = step.fired.device
        sums = torch.tensor([n, *(n * value for value in step[:5])], dtype=torch.float64, device=device)
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
    """Tell whether sparse encoding exists for this SAE and these tokens."""
    config = sae.config
    plain = config.activation is Activation.RELU and config.input_norm is InputNorm.NONE
    return plain and x.device.type in ("cpu", "cuda") and x.dtype == sae.W_enc.dtype == torch.float32


def can_step_sparsely(sae: SAE, x: Tensor) -> bool:
    """Tell whether a sparse training step exists: where encoding does, and for TopK on the processor."""
    config = sae.config
    topk = config.activation is Activation.TOPK and config.input_norm is InputNorm.NONE
    return can_be_sparse(sae, x) or (
        topk and x.device.type == "cpu" and x.dtype == sae.W_enc.dtype == torch.float32
    )


@torch.no_grad()
def latent_lists(sae: SAE, x: Tensor, bf16: bool = True) -> cpu.Lists:
    """Encode tokens x [N, d_in] into latent-major lists of what is active, on the processor.

    No [N, d_sae] array exists for a ReLU SAE; others are encoded through tiles of tokens. `bf16` allows
    bf16 candidates where the processor or GPU has the units; the result is exact either way.

    Raises
    ------
    PatchSAEError : a token is NaN or infinite: no comparison would hold, and no latent seem to fire.
    """
    # the extremes show both without a copy of x
    if x.numel() and not all(bool(end.isfinite()) for end in x.aminmax()):
        raise PatchSAEError(
            "the tokens hold NaN or infinity: check the model's weights and images, or run it in float32."
        )
    if can_be_sparse(sae, x):
        if x.device.type == "cpu":
            return cpu.forward_lists(sae, x.contiguous(), bf16)
        from patchsae.sae import gpu

        shifted = x - sae.b_dec if sae.config.subtract_b_dec else x
        found = gpu.active_set(shifted.contiguous(), sae.W_enc, sae.b_enc, bf16)
        return cpu.Lists(*(part.cpu().numpy() for part in found))
    latent, token, value = [], [], []
    for start in range(0, len(x), TILE):
        f = sae.encode(x[start : start + TILE]).T  # [d_sae, tile]
        rows, columns = f.nonzero(as_tuple=True)
        latent.append(rows)
        token.append(columns + start)
        value.append(f[rows, columns])
    latent, token, value = (torch.cat(parts) for parts in (latent, token, value))
    order = latent.sort(stable=True).indices  # tokens ascend inside a latent: tiles came in order
    start = torch.zeros(sae.d_sae + 1, dtype=torch.int64)
    start[1:] = torch.bincount(latent, minlength=sae.d_sae).cumsum(0).cpu()
    parts = start, token[order].int(), value[order].float()
    return cpu.Lists(*(part.cpu().numpy() for part in parts))
