"""The autoencoder's equations against the released code's numbers and against their definitions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, Loss, SAEConfig
from patchsae.training.starts import geometric_median

GOLDEN = Path(__file__).parent / "golden"


def random_sae(d_in=16, expansion=4, **config) -> SAE:
    return SAE(SAEConfig(d_in=d_in, expansion=expansion, **config), seed=3)


def per_latent(golden, name: str) -> torch.Tensor:
    """Read an array; the released code keeps the encoder's latents in columns, we in rows."""
    value = torch.from_numpy(golden[name])
    return value.T.contiguous() if name.endswith("W_enc") else value


@pytest.mark.parametrize("name", ["sae_step_a", "sae_step_b"])
def test_losses_and_gradients_equal_the_released_code(name):
    golden = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    x = torch.from_numpy(golden["x"]).flatten(0, 1)
    d_sae, d_in = golden["W_dec"].shape
    sae = SAE(SAEConfig(d_in, d_sae // d_in, l1=float(golden["l1_coefficient"])))
    for parameter in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(sae, parameter).data = per_latent(golden, parameter)
    out = sae.losses(x, dead=torch.from_numpy(golden["dead"]))
    out.total.backward()
    for value, key in (
        (out.reconstruction, "mse"),
        (out.l1_loss, "l1"),
        (out.ghost, "ghost"),
        (out.total, "loss"),
    ):
        assert value.item() == pytest.approx(float(golden[key]), rel=1e-5), key
    torch.testing.assert_close(out.latents, torch.from_numpy(golden["latents"]).flatten(0, 1))
    torch.testing.assert_close(out.output, torch.from_numpy(golden["sae_out"]).flatten(0, 1))
    before = torch.from_numpy(golden["grad_W_dec_before_projection"])
    assert (sae.W_dec.grad - before).norm() <= 1e-4 * before.norm()
    sae.project_decoder_gradient()
    for parameter in ("W_enc", "b_enc", "W_dec", "b_dec"):
        expected = per_latent(golden, f"grad_{parameter}")
        difference = getattr(sae, parameter).grad - expected
        assert difference.norm() <= 1e-4 * expected.norm(), parameter


def test_squared_error_is_equation_2():
    sae, x = random_sae(loss="squared_error", l1=0.3), torch.randn(7, 16)
    out = sae.losses(x)
    f = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).clamp(min=0)
    x_hat = f @ sae.W_dec + sae.b_dec
    expected = ((x_hat - x) ** 2).sum(1).mean() + 0.3 * f.abs().sum(1).mean()
    assert out.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_ghost_reaches_only_dead_latents_and_stays_finite():
    sae, x = random_sae(), torch.randn(50, 16)
    dead = torch.zeros(sae.d_sae, dtype=torch.bool)
    dead[5:9] = True
    with torch.no_grad():
        sae.b_enc[dead] = 100.0  # exp(100) overflows float32
    out = sae.losses(x, dead=dead)
    out.ghost.backward()
    assert torch.isfinite(out.ghost)
    assert out.ghost.item() == pytest.approx(out.reconstruction.item(), rel=1e-3)
    alive = ~dead
    assert sae.W_enc.grad[alive].abs().max() == 0 and sae.W_enc.grad[dead].abs().max() > 0
    assert sae.W_dec.grad[alive].abs().max() == 0 and sae.W_dec.grad[dead].abs().max() > 0
    assert torch.isfinite(sae.W_enc.grad).all()


def test_cls_weight_scales_only_the_cls_error():
    sae, x = random_sae(cls_weight=3.0), torch.randn(10, 16)
    is_cls = torch.arange(10) < 4
    plain = ((sae(x) - x) ** 2).mean(1) / x.norm(dim=1)
    expected = (plain[:4].sum() * 3 + plain[4:].sum()) / 10
    assert sae.losses(x, is_cls=is_cls).reconstruction.item() == pytest.approx(expected.item())


def test_decoder_rows_stay_on_the_unit_sphere():
    sae, x = random_sae(), torch.randn(64, 16)
    sae.losses(x).total.backward()
    sae.project_decoder_gradient()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-6
    sae.W_dec.data *= 2.5
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))


def test_geometric_median_minimises_the_sum_of_distances():
    torch.manual_seed(0)
    points = torch.randn(400, 3).exp()  # skewed, so that it is far from the mean
    median = geometric_median(points)

    def total(centre):
        return (points - centre).norm(dim=1).sum()

    assert total(median) < total(points.mean(0)) - 1
    for step in 0.02 * torch.randn(50, 3):
        assert total(median) <= total(median + step)


def test_save_and_load_round_trip(tmp_path):
    sae = random_sae(l1=0.01, loss=Loss.SQUARED_ERROR)
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert again.config == sae.config
    x = torch.randn(5, 16)
    assert torch.equal(sae(x), again(x))


def test_bad_input_is_named(tmp_path):
    with pytest.raises(PatchSAEError, match="train an SAE first"):
        SAE.load(tmp_path / "absent")
    random_sae().save(tmp_path)
    weights = tmp_path / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(PatchSAEError, match="no readable SAE"):
        SAE.load(tmp_path)
    random_sae(d_in=8).save(tmp_path)
    with pytest.raises(PatchSAEError, match="width 16 .* width 8"):
        SAE.load(tmp_path).encode(torch.randn(2, 16))
    with pytest.raises(PatchSAEError, match="loss='huber'"):
        SAEConfig(d_in=8, loss="huber")
    with pytest.raises(PatchSAEError, match="expansion=0"):
        SAEConfig(d_in=8, expansion=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_one_number_that_is_not_finite_is_refused(tmp_path, name, value):
    sae = random_sae()
    getattr(sae, name).data.view(-1)[3] = value
    with pytest.raises(PatchSAEError, match=f"this SAE has NaN or infinite values in {name}"):
        sae.fingerprint()
    sae.save(tmp_path)
    with pytest.raises(PatchSAEError, match=f"sae.safetensors' has NaN or infinite values in {name}"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(("change", "match"), [
    ({"d_in": "x"}, "d_in='x' must be a whole number"), ({"d_in": 16.0}, "d_in=16.0 must be a whole"),
    ({"d_in": True}, "d_in=True must be"), ({"expansion": "4"}, "expansion='4' must be a finite number"),
    ({"expansion": float("inf")}, "expansion=inf must be a finite"), ({"l1": []}, r"l1=\[\] must be"),
    ({"expansion": 1e308}, "makes no number of latents"),
    ({"expansion": 0.001}, "makes no number of latents"),
    ({"k": "3", "activation": "topk"}, "k='3' must be a whole number"), ({"k": None}, "k=None must be"),
    ({"ghost": "no"}, "ghost='no' must be true or false"), ({"subtract_b_dec": 0}, "subtract_b_dec=0 must"),
    ({"cls_weight": float("nan")}, "cls_weight=nan must"), ({"activation": ["relu"]}, "is unknown; choose"),
    ({"d_in": 10**6, "expansion": 64}, r"64000000 latents of width 1000000, but .* shape \[64, 16\]"),
    ("[1]", "has other fields"), ("3", "has other fields"), ("[" * 100_000, "holds no readable SAE"),
    ("{}", "has other fields"), ("{", "holds no readable SAE"),
])  # fmt: skip
def test_a_configuration_of_wrong_types_is_refused_by_its_field(tmp_path, change, match):
    file = random_sae().save(tmp_path) / "sae.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change)
    file.write_text(text)
    with pytest.raises(PatchSAEError, match=match) as error:
        SAE.load(tmp_path)
    assert "\n" not in str(error.value)
