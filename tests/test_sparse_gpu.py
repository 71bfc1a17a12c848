"""The Triton step against the dense one: on a GPU as it runs there, without one in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
triton = pytest.importorskip("triton")

from patchsae.runs.errors import PatchSAEError  # noqa: E402
from patchsae.sae import gpu  # noqa: E402
from patchsae.sae.ghost import GhostRows  # noqa: E402
from patchsae.sae.model import SAE, SAEConfig  # noqa: E402
from patchsae.sae.step import Stepper  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture(autouse=True)
def interpreter_multiplies_bf16(monkeypatch):
    """Mend Triton 3.7.1's interpreter, which keeps bfloat16 as uint16 and multiplies those integers."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype != triton.language.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, widen(a), widen(b), *rest)
    )


def sae_and_tokens(d_in=48, d_sae=66, tokens=40, seed=0, bias=-1.4, **config) -> tuple[SAE, torch.Tensor]:
    torch.manual_seed(seed)
    sae = SAE(SAEConfig(d_in, d_sae / d_in, **{"l1": 3e-3, **config}), seed=seed).to(DEVICE)
    with torch.no_grad():
        sae.b_enc += (bias + 0.5 * torch.randn(d_sae)).to(DEVICE)
        sae.b_enc[-3:] = -100.0  # never active
        sae.b_dec += 0.3 * torch.randn(d_in).to(DEVICE)
    return sae, torch.randn(tokens, d_in).to(DEVICE)


def whole_step(sae, x, moments, lr, step, bf16=True, weight=None) -> tuple[gpu.Active, gpu.Decoded]:
    """Take the step that the kernels are made for; `moments` are those of W_enc, b_enc, W_dec and b_dec."""
    config = sae.config
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, name).data for name in PARAMETERS)
    xc = x - b_dec if config.subtract_b_dec else x
    active = gpu.active_set(xc, W_enc, b_enc, bf16)
    decoded = gpu.decode_and_loss(x, active, W_dec, b_dec, config.loss, weight)
    gradient = gpu.adam_step(
        active, xc, decoded.g, W_enc, b_enc, W_dec, moments[:3], lr, step, config.l1,
        subtract_b_dec=config.subtract_b_dec,
    )  # fmt: skip
    first, second = moments[3]
    first += 0.1 * (gradient - first)
    second += 0.001 * (gradient.square() - second)
    root = (second / (1 - 0.999**step)).sqrt()
    b_dec -= lr / (1 - 0.9**step) * first / (root + 1e-8)
    return active, decoded


def dense_of(active: gpu.Active, tokens: int) -> torch.Tensor:
    latent = torch.arange(len(active.start) - 1, device=DEVICE).repeat_interleave(active.start.diff())
    f = torch.zeros(tokens, len(active.start) - 1, device=DEVICE)
    f[active.token.long(), latent] = active.value
    return f


def lists_of(f: torch.Tensor) -> gpu.Active:
    latent, token = f.T.nonzero().T
    start = torch.zeros(f.shape[1] + 1, dtype=torch.int64, device=DEVICE)
    start[1:] = (f > 0).sum(0).cumsum(0)
    return gpu.Active(start, token.int(), f[token, latent])


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = ""):
    difference = (actual - expected).norm()
    assert difference <= tolerance * expected.norm(), f"{name}: {difference / expected.norm():.1e}"


@pytest.mark.parametrize(
    "bf16, config",
    [
        (True, {}),
        (False, {"loss": "squared_error", "cls_weight": 4.0}),
        (True, {"subtract_b_dec": False, "cls_weight": 0.5}),
    ],
)
def test_consecutive_steps_equal_the_dense_ones(bf16, config):
    sae, _ = sae_and_tokens(**config, ghost=False)
    other, _ = sae_and_tokens(**config, ghost=False)
    stepper = Stepper(other, "dense")
    moments = [
        (torch.zeros_like(p), torch.zeros_like(p)) for p in (getattr(sae, n).data for n in PARAMETERS)
    ]
    is_cls = torch.arange(40, device=DEVICE) % 10 == 0
    weight = torch.where(is_cls, sae.config.cls_weight, 1.0)
    fired = []
    for step in range(1, 4):
        torch.manual_seed(100 + step)
        x = (torch.randn(40, 48) + torch.randn(48)).to(DEVICE)  # another mean: other latents fire
        active, decoded = whole_step(sae, x, moments, 1e-3, step, bf16, weight)
        expected = stepper.step(x, 1e-3, is_cls=is_cls)
        fired.append(active.start.diff() > 0)
        assert torch.equal(fired[-1], expected.fired)
        assert decoded.error.mean().item() == pytest.approx(expected.reconstruction, rel=1e-5)
        assert sae.config.l1 * active.value.sum().item() / len(x) == pytest.approx(
            expected.l1_loss, rel=1e-5
        )
        assert_near(decoded.x_hat, expected.output, 1e-5, "output")
        for name in PARAMETERS:
            assert_near(getattr(sae, name).data, getattr(other, name).data, 1e-5, f"{name}, step {step}")
    fired = torch.stack(fired)
    assert (fired[:-1] & ~fired[1:]).any() and (~fired).all(0).any()  # some pause, some never start


def golden_sae(name: str):
    golden = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    golden = {key: torch.from_numpy(golden[key]).to(DEVICE) for key in golden.files}
    for key in ("W_enc", "grad_W_enc"):
        golden[key] = golden[key].T.contiguous()  # the released code keeps the encoder's latents in columns
    d_sae, d_in = golden["W_dec"].shape
    sae = SAE(SAEConfig(d_in, d_sae / d_in, l1=golden["l1_coefficient"].item())).to(DEVICE)
    for parameter in PARAMETERS:
        getattr(sae, parameter).data = golden[parameter]
    return golden, sae, golden["x"].flatten(0, 1)


@pytest.mark.parametrize("name", ["sae_step_a", "sae_step_b"])
def test_losses_equal_the_released_code(name):
    golden, sae, x = golden_sae(name)
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, n).data for n in PARAMETERS)
    active = gpu.active_set(x - b_dec, W_enc, b_enc, bf16=True)
    decoded = gpu.decode_and_loss(x, active, W_dec, b_dec, sae.config.loss)
    assert decoded.error.mean().item() == pytest.approx(golden["mse"].item(), rel=1e-5)
    l1 = sae.config.l1 * active.value.sum().item() / len(x)
    assert l1 == pytest.approx(golden["l1"].item(), rel=1e-5)
    torch.testing.assert_close(dense_of(active, len(x)), golden["latents"].flatten(0, 1))
    torch.testing.assert_close(decoded.x_hat, golden["sae_out"].flatten(0, 1))


@pytest.mark.parametrize("name", ["sae_step_a", "sae_step_b"])
def test_gradients_with_ghost_equal_the_released_code(name):
    golden, sae, x = golden_sae(name)
    sae.losses(x, golden["dead"]).ghost.backward()
    ghost = GhostRows(
        golden["dead"].nonzero().squeeze(1),
        *(getattr(sae, n).grad[golden["dead"]].contiguous() for n in PARAMETERS[:3]),
    )
    weights = (sae.W_enc.data, sae.b_enc.data, sae.W_dec.data)
    out = sae.losses(x)
    g = torch.autograd.grad(out.reconstruction, out.output)[0]
    lists = lists_of(out.latents.detach())
    found = gpu.dense_gradients(lists, x - sae.b_dec.data, g, *weights, sae.config.l1, ghost)
    for value, parameter in zip(found, PARAMETERS, strict=True):
        key = f"grad_{parameter}" + ("_before_projection" if parameter == "W_dec" else "")
        # the released code rounded to float32: sae_step_b lies 1.2e-4 from the same gradient in float64
        assert_near(value, golden[key], 2e-4, key)


def test_gradients_equal_the_dense_ones_on_the_released_code_s_tokens():
    _, sae, x = golden_sae("sae_step_a")
    weights = (sae.W_enc.data, sae.b_enc.data, sae.W_dec.data)
    xc = x - sae.b_dec.data
    active = gpu.active_set(xc, *weights[:2], bf16=True)
    decoded = gpu.decode_and_loss(x, active, sae.W_dec.data, sae.b_dec.data, sae.config.loss)
    found = gpu.dense_gradients(active, xc, decoded.g, *weights, sae.config.l1)
    sae.losses(x).total.backward()
    for value, parameter in zip(found, PARAMETERS, strict=True):
        assert_near(value, getattr(sae, parameter).grad, 1e-4, parameter)


def test_gradients_of_parts_add_up():
    sae, x = sae_and_tokens(ghost=False)
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, n).data for n in PARAMETERS)
    added = [torch.zeros_like(p) for p in (W_enc, b_enc, W_dec, b_dec)]
    for part in (x[:25], x[25:], x[:0]):
        active = gpu.active_set(part - b_dec, W_enc, b_enc, bf16=True)
        g = gpu.decode_and_loss(part, active, W_dec, b_dec, sae.config.loss, total=len(x)).g
        weights = W_enc, b_enc, W_dec
        found = gpu.dense_gradients(active, part - b_dec, g, *weights, sae.config.l1, total=len(x))
        added = [total + value for total, value in zip(added, found, strict=True)]
    sae.losses(x).total.backward()
    for value, parameter in zip(added, PARAMETERS, strict=True):
        assert_near(value, getattr(sae, parameter).grad, 1e-5, parameter)


@pytest.mark.parametrize("d_in, d_sae, tokens", [(48, 98, 70), (96, 130, 33), (65, 131, 300)])
def test_both_products_find_the_positive_pre_activations(d_in, d_sae, tokens):
    sae, x = sae_and_tokens(d_in, d_sae, tokens, bias=-1.5)
    xc = x - sae.b_dec.data
    z = xc.double() @ sae.W_enc.data.double().T + sae.b_enc.data.double()
    exact, fast = (gpu.active_set(xc, sae.W_enc.data, sae.b_enc.data, bf16) for bf16 in (False, True))
    for one, other in zip(exact, fast, strict=True):
        assert torch.equal(one, other)
    for first, last in zip(fast.start[:-1].tolist(), fast.start[1:].tolist(), strict=True):
        assert (fast.token[first:last].diff() > 0).all()
    f = dense_of(fast, tokens).double()
    clear = z.abs() > 1e-5
    assert torch.equal((f > 0)[clear], (z > 0)[clear])
    torch.testing.assert_close(f, z.clamp(min=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rounding_never_hides_a_positive_pre_activation(scale):
    # Numbers that bfloat16 takes down as far as it can, all of one sign, and a bias that leaves z barely
    # above 0: rounding errors add up instead of cancelling
    torch.manual_seed(1)
    down = 1 + (2.0**-8 - 2.0**-14) * torch.rand(110, 48).clamp(min=0.5)
    sign = torch.randn(48).sign()
    W_enc, xc = (down[:90] * sign).to(DEVICE), (scale * down[90:] * sign).to(DEVICE)
    z = xc.double() @ W_enc.double().T
    margin = scale * torch.tensor([1e-3, 1e-4, -1e-3], device=DEVICE).repeat(30)
    b_enc = (-z.amax(0) + margin).float()  # the largest token alone is positive, or none
    z += b_enc.double()
    high = (xc.bfloat16().double() @ W_enc.bfloat16().double().T) + b_enc.double()
    assert ((z > 0) & (high <= 0)).sum() > 20  # the product alone would miss them
    positive = dense_of(gpu.active_set(xc, W_enc, b_enc, bf16=True), 20) > 0
    clear = z.abs() > 3e-5 * scale
    assert positive.any() and torch.equal(positive[clear], (z > 0)[clear])
    for one, other in zip(*(gpu.active_set(xc, W_enc, b_enc, bf16) for bf16 in (False, True)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cap", [8, 13])
def test_split_latents_have_the_same_gradients(cap, monkeypatch):
    monkeypatch.setattr(gpu, "CAP", cap)
    sae, x = sae_and_tokens(bias=-0.7, ghost=False)
    xc = x - sae.b_dec.data
    active = gpu.active_set(xc, sae.W_enc.data, sae.b_enc.data, bf16=True)
    assert active.start.diff().max() > 18
    decoded = gpu.decode_and_loss(x, active, sae.W_dec.data, sae.b_dec.data, sae.config.loss)
    weights = (sae.W_enc.data, sae.b_enc.data, sae.W_dec.data)
    found = gpu.dense_gradients(active, xc, decoded.g, *weights, sae.config.l1)
    again = gpu.dense_gradients(active, xc, decoded.g, *weights, sae.config.l1)
    sae.losses(x).total.backward()
    for value, repeated, parameter in zip(found, again, PARAMETERS, strict=True):
        assert torch.equal(value, repeated)
        assert_near(value, getattr(sae, parameter).grad, 1e-5, parameter)


def test_a_batch_without_active_latents_moves_by_momentum_only():
    sae, x = sae_and_tokens(bias=-50.0, ghost=False)
    before = {name: getattr(sae, name).data.clone() for name in PARAMETERS}
    moments = [(torch.full_like(p, 0.1), torch.ones_like(p)) for p in before.values()]
    active, decoded = whole_step(sae, x, moments, 1e-2, 7)
    assert not len(active.value) and torch.equal(decoded.x_hat, before["b_dec"].expand_as(x))
    moved = before["W_enc"] - 1e-2 / (1 - 0.9**7) * 0.09 / ((0.999 / (1 - 0.999**7)) ** 0.5 + 1e-8)
    torch.testing.assert_close(sae.W_enc.data, moved)
    torch.testing.assert_close(sae.W_dec.data.norm(dim=1), torch.ones(66, device=DEVICE))


def test_too_many_pairs_are_given_up():
    sae, x = sae_and_tokens()
    weights = sae.W_enc.data, sae.b_enc.data
    assert gpu.active_set(x, *weights, bf16=True, most=10) is None
    assert gpu.active_set(x, *weights, bf16=True, most=x.shape[0] * sae.d_sae) is not None


def test_wrong_tensors_are_refused():
    sae, x = sae_and_tokens()
    with pytest.raises(PatchSAEError, match="W_enc must be contiguous float32"):
        gpu.active_set(x, sae.W_enc.data.double(), sae.b_enc.data, bf16=False)
    with pytest.raises(PatchSAEError, match="xc must be"):
        gpu.active_set(x.T.contiguous().T, sae.W_enc.data, sae.b_enc.data, bf16=False)


@pytest.mark.parametrize("config", [{"ghost": False}, {"loss": "squared_error", "cls_weight": 3.0}])
def test_the_stepper_takes_the_dense_step_with_these_kernels(config, monkeypatch):
    monkeypatch.setattr(Stepper, "_kernels", lambda self: gpu)
    monkeypatch.setattr("patchsae.sae.step.BF16_CROSSOVER", 1.0)
    dense, sparse = (sae_and_tokens(**config)[0] for _ in range(2))
    steppers = Stepper(dense, "dense"), Stepper(sparse, "sparse")
    dead = torch.arange(dense.d_sae, device=DEVICE) % 4 == 0
    for seed in range(2):
        _, x = sae_and_tokens(seed=seed + 5)
        is_cls = torch.arange(len(x), device=DEVICE) % 9 == 0
        expected, found = (stepper.step(x, 1e-3, dead, is_cls) for stepper in steppers)
        assert found[:4] == pytest.approx(expected[:4], rel=1e-4)
        assert torch.equal(found.fired, expected.fired)
        for name in PARAMETERS:
            assert_near(getattr(sparse, name).data, getattr(dense, name).data, 1e-5, f"{name}, {seed}")
    grads = []
    sparse.load_state_dict(dense.state_dict())
    for stepper in steppers:
        stepper.backward(x, dead, is_cls)
        grads.append([p.grad for p in stepper.sae.parameters()])
    for wanted, got in zip(*grads, strict=True):
        assert_near(got, wanted, 1e-5 if not dense.config.ghost else 1e-3)


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Hopper:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Hopper())
run = JITFunction.run
def compile_only(self, *args, warmup, **options):
    print(self.__name__, "wgmma" in run(self, *args, warmup=True, **options).asm["ptx"])
JITFunction.run = compile_only
torch.empty, torch.Tensor.new_empty = torch.zeros, torch.Tensor.new_zeros  # nothing runs that fills them
from patchsae.sae import gpu
from patchsae.sae.ghost import GhostRows

x, W, b = torch.zeros(128, 768), torch.zeros(256, 768), torch.zeros(256)
active = gpu.active_set(x, W, b, bf16=False)
active = gpu.active_set(x, W, b, bf16=True)
gpu.decode_and_loss(x, active, W, x[0], gpu.Loss.MSE_OVER_NORM, x[:, 0].contiguous())
ghost = GhostRows(torch.arange(3), W[:3], b[:3], W[:3])
gpu.adam_step(active, x, x, W, b, W, [(W, W), (b, b), (W, W)], 1e-3, 1, 1e-3, ghost)
gpu.dense_gradients(active, x, x, W, b, W, 1e-3)
"""


def test_kernels_compile_for_hopper_and_use_its_matrix_units(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert len({name for name, _ in compiled}) == 8
    assert {uses for name, uses in compiled if name == "mask_kernel"} == {"True"}
