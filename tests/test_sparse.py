"""The sparse step against the dense one and against the released code's numbers."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsae.runs.errors import PatchSAEError
from patchsae.sae import cpu, cpu_kernels
from patchsae.sae.model import SAE, SAEConfig
from patchsae.sae.step import Execution, Stepper, latent_lists

GOLDEN = Path(__file__).parent / "golden"
SPARSE = [Execution.SPARSE, Execution.SPARSE_F32]


def quiet_sae(d_in: int, expansion: int, **config) -> SAE:
    """Make an SAE whose latents fire from often to never."""
    sae = SAE(SAEConfig(d_in, expansion, **config), seed=1)
    draw = torch.Generator().manual_seed(2)
    sae.b_enc.data = -4 * torch.rand(sae.d_sae, generator=draw)
    sae.b_dec.data = 0.1 * torch.randn(d_in, generator=draw)
    return sae


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("execution", SPARSE)
@pytest.mark.parametrize("name", ["sae_step_a", "sae_step_b"])
def test_losses_and_gradients_equal_the_released_code(name, execution):
    golden = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    x = torch.from_numpy(golden["x"]).flatten(0, 1)
    d_sae, d_in = golden["W_dec"].shape
    sae = SAE(SAEConfig(d_in, d_sae // d_in, l1=float(golden["l1_coefficient"])))
    for parameter in ("W_enc", "b_enc", "W_dec", "b_dec"):
        value = torch.from_numpy(golden[parameter])
        getattr(sae, parameter).data = value.T.contiguous() if parameter == "W_enc" else value
    found = Stepper(sae, execution).backward(x, torch.from_numpy(golden["dead"]))
    for value, key in ((found.reconstruction, "mse"), (found.l1_loss, "l1"), (found.ghost, "ghost")):
        assert value == pytest.approx(float(golden[key]), rel=1e-5), key
    assert sum(found[:3]) == pytest.approx(float(golden["loss"]), rel=1e-5)
    expected = torch.from_numpy(golden["sae_out"]).flatten(0, 1)
    assert relative(found.output, expected) < 1e-5
    before = torch.from_numpy(golden["grad_W_dec_before_projection"])
    assert relative(sae.W_dec.grad, before) < 1e-4
    sae.project_decoder_gradient()
    for parameter in ("W_enc", "b_enc", "W_dec", "b_dec"):
        expected = torch.from_numpy(golden[f"grad_{parameter}"])
        expected = expected.T if parameter == "W_enc" else expected
        assert relative(getattr(sae, parameter).grad, expected) < 1e-4, parameter


@pytest.mark.parametrize("execution", SPARSE)
@pytest.mark.parametrize(
    "config",
    [
        {"l1": 1e-3, "ghost": False},
        {"l1": 1e-2, "ghost": False, "loss": "squared_error", "cls_weight": 3.0},
        {"l1": 1e-3, "ghost": False, "subtract_b_dec": False},
        {"l1": 1e-3, "ghost": True},
        {"l1": 1e-2, "ghost": True, "loss": "squared_error", "cls_weight": 3.0},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_steps_equal_dense_adam_idle_latents_included(execution, config, monkeypatch):
    monkeypatch.setattr("patchsae.sae.step.BF16_CROSSOVER", 1.0)
    dense, sparse = quiet_sae(40, 6, **config), quiet_sae(40, 6, **config)
    a, b = Stepper(dense, Execution.DENSE), Stepper(sparse, execution)
    draw = torch.Generator().manual_seed(0)
    idle = before = torch.zeros(dense.d_sae, dtype=torch.bool)
    dead = torch.zeros(dense.d_sae, dtype=torch.bool)
    dead[::3] = True
    for step in range(8):
        if config["ghost"]:
            # ghost gradients divide by (g - r)²: rounding grows over steps in any two float32 programs
            sparse.load_state_dict(dense.state_dict())
            b.restore(a.state())
        n = 70 if step % 2 else 33
        x = (0.6 + step % 3) * torch.randn(n, 40, generator=draw) + 0.2
        is_cls = torch.arange(n) % 7 == 0
        wanted, found = a.step(x, 5e-3, dead, is_cls), b.step(x, 5e-3, dead, is_cls)
        assert found[:4] == pytest.approx(wanted[:4], rel=1e-5)
        assert torch.equal(found.fired, wanted.fired)
        assert relative(found.output, wanted.output) < 1e-5
        for name, p in dense.named_parameters():
            assert relative(dict(sparse.named_parameters())[name], p) < 1e-5, name
        for name, value in a.state().items():
            # 1e-4 to 1e-3 by the draw, whichever library makes the products
            limit = 2e-3 if config["ghost"] else 1e-5
            assert relative(b.state()[name].float(), value.float()) < limit, name
        idle = idle | before & ~wanted.fired
        before = wanted.fired
    assert idle.any()  # momentum alone moved some rows


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(1, 90), st.sampled_from([1e-3, 1.0, 300.0]))
def test_bf16_candidates_miss_no_active_entry(seed, n, d, scale):
    rng = np.random.default_rng(seed)
    latents = 150
    W = rng.standard_normal((latents, d)).astype(np.float32)
    x = (scale * rng.standard_normal((n, d))).astype(np.float32)
    shift = rng.standard_normal(d).astype(np.float32)
    # biases that put many pre-activations within a rounding error of zero
    exact = (x - shift).astype(np.float64) @ W.T.astype(np.float64)
    bias = (-exact[rng.integers(0, n, latents), np.arange(latents)]).astype(np.float32)
    lists, _, _ = cpu.active(x, W, bias, shift, bf16=True)
    z = exact + bias
    found = np.zeros_like(z)
    found[lists.index, np.repeat(np.arange(latents), np.diff(lists.start))] = lists.value
    tie = np.abs(z) < 1e-5 * (np.linalg.norm(x - shift, axis=1)[:, None] * np.linalg.norm(W, axis=1) + 1e-6)
    assert ((found > 0) == (z > 0))[~tie].all()
    np.testing.assert_allclose(found, np.maximum(z, 0), atol=2e-5 * (np.abs(exact).max() + 1e-6))


def test_lists_are_ordered_and_turn_into_each_other():
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((37, 8), np.float32), rng.standard_normal((1100, 8), np.float32)
    zeros = np.zeros(1100, np.float32)
    lists, centred, _ = cpu.active(x, W, zeros, zeros[:8], bf16=False)
    assert (centred == x).all()
    dense = np.maximum(x @ W.T, 0)
    by_token = cpu.by_token(lists, len(x))
    for j in range(len(x)):
        row = slice(by_token.start[j], by_token.start[j + 1])
        assert (by_token.index[row] == np.flatnonzero(dense[j])).all()
        np.testing.assert_allclose(by_token.value[row], dense[j][dense[j] > 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"activation": "topk", "k": 5}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tokens_that_are_not_finite_are_no_silence(config, value):
    sae, x = quiet_sae(16, 4, **config), torch.ones(20, 16)
    assert len(latent_lists(sae, x).value)
    x[7, 3] = value
    with pytest.raises(PatchSAEError, match="tokens hold NaN or infinity: check the model's weights"):
        latent_lists(sae, x)


@pytest.mark.parametrize("bf16", [False, True])
def test_many_threads_find_the_same_in_smaller_blocks(bf16):
    assert [cpu.block_size(n) for n in (1, 2, 8, 16, 64)] == [512, 512, 128, 64, 64]
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((90, 40), np.float32), rng.standard_normal((1300, 40), np.float32)
    bias = -5 * rng.random(1300, np.float32)
    before, found = torch.get_num_threads(), []
    for threads in (2, 16):
        torch.set_num_threads(threads)
        try:
            found.append(cpu.active(x, W, bias, np.zeros(40, np.float32), bf16)[0])
        finally:
            torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0].start, found[1].start)
    np.testing.assert_array_equal(found[0].index, found[1].index)
    np.testing.assert_allclose(found[0].value, found[1].value, rtol=1e-5, atol=1e-6)


def test_a_step_gives_the_same_bits_again_and_with_another_number_of_threads():
    ends = []
    for threads in (2, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            sae = quiet_sae(64, 20)
            stepper, draw = Stepper(sae, Execution.SPARSE_F32), torch.Generator().manual_seed(0)
            for _ in range(3):
                stepper.step(torch.randn(150, 64, generator=draw), 1e-2)
        finally:
            torch.set_num_threads(before)
        ends.append([p.detach().clone() for p in sae.parameters()])
    for first, *others in zip(*ends, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_state_continues_bit_for_bit():
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(40, 32, generator=draw) for _ in range(6)]
    whole = quiet_sae(32, 8)
    stepper = Stepper(whole)
    for x in batches[:3]:
        stepper.step(x, 1e-2)
    state = {name: value.clone() for name, value in stepper.state().items()}
    later = copy.deepcopy(whole)
    for x in batches[3:]:
        stepper.step(x, 1e-2)
    again = Stepper(later)
    again.restore(state)
    for x in batches[3:]:
        again.step(x, 1e-2)
    for a, b in zip(whole.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(KeyError):
        again.restore({})


def test_auto_is_dense_at_high_density_and_sparse_at_low(monkeypatch):
    used = []
    for name in ("_dense", "_forward"):
        real = getattr(Stepper, name)
        monkeypatch.setattr(Stepper, name, lambda *a, real=real, name=name: used.append(name) or real(*a))
    x = torch.randn(100, 32)
    Stepper(SAE(SAEConfig(32, 8))).step(x, 1e-3)  # no bias: half of all latents fire
    quiet = SAE(SAEConfig(32, 8))
    quiet.b_enc.data -= 2.5
    Stepper(quiet).step(x, 1e-3)
    assert used == ["_dense", "_forward"]


def test_a_sparse_topk_step_is_the_dense_one():
    """Rows of few positive entries among them, and ghost gradients; AUTO takes it where k is small."""
    x, dead = torch.randn(300, 32), torch.arange(256) % 7 == 0
    is_cls = torch.arange(300) % 50 == 0
    sae = quiet_sae(32, 8, activation="topk", k=9, l1=1e-3, cls_weight=2.0)
    sae.b_enc.data -= 1.0
    assert (sae.pre_activations(x) > 0).sum(1).min() < 9 < (sae.pre_activations(x) > 0).sum(1).max()
    ends, steps = [], []
    for execution in (Execution.DENSE, Execution.SPARSE, Execution.AUTO):
        stepper = Stepper(copy.deepcopy(sae), execution)
        steps.append([stepper.step(x, 1e-3, dead, is_cls) for _ in range(3)][-1])
        ends.append({name: p.detach() for name, p in stepper.sae.named_parameters()})
    for step, end in zip(steps[1:], ends[1:], strict=True):
        assert step[:5] == pytest.approx(steps[0][:5], rel=1e-4)
        assert torch.equal(step.fired, steps[0].fired)
        assert all(relative(end[name], ends[0][name]) < 1e-4 for name in end)
    assert all(torch.equal(ends[1][name], ends[2][name]) for name in ends[1])


@pytest.mark.parametrize("execution", [Execution.DENSE, Execution.SPARSE_F32])
def test_the_weight_of_the_penalty_is_that_of_the_moment(execution):
    x, sae = torch.randn(200, 32), quiet_sae(32, 8, l1=0.5)
    half = SAE(SAEConfig(32, 8, l1=0.25))
    half.load_state_dict(sae.state_dict())
    sae.l1 = 0.25
    found, expected = (Stepper(s, execution).step(x, 1e-3) for s in (sae, half))
    assert found[:5] == expected[:5]
    assert torch.equal(sae.W_enc, half.W_enc) and torch.equal(sae.b_enc, half.b_enc)


def test_topk_and_batchtopk_train_and_keep_k():
    x = torch.randn(200, 32)
    for kind in ("topk", "batchtopk"):
        sae = SAE(SAEConfig(32, 8, activation=kind, k=5, l1=0.0))
        stepper = Stepper(sae)
        first = stepper.step(x, 1e-2)
        for _ in range(30):
            last = stepper.step(x, 1e-2)
        assert last.reconstruction < 0.8 * first.reconstruction
        assert last.l0 == pytest.approx(5)
        kept = (sae.encode(x) > 0).sum(1).float()
        if kind == "topk":
            assert kept.max() == 5
        else:  # the threshold lags behind, at a hundredth a step
            assert 2 < kept.mean() < 10
    with pytest.raises(PatchSAEError, match="k from 1 to 256"):
        SAEConfig(32, 8, activation="topk")


def test_an_unknown_execution_is_named():
    with pytest.raises(PatchSAEError, match="execution='quick'.*auto, dense, sparse, sparse_f32"):
        Stepper(quiet_sae(8, 2), "quick")


def test_kernels_compile_where_nothing_can_be_written(monkeypatch):
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert cpu_kernels.compiled(lambda x: x + 1)(2) == 3
