"""The trainer, its metrics and what it refuses, on a tiny backbone with real scenes."""

import csv
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIG, tiny_backbone, tiny_images

from patchbook import train
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, Loss, SAEConfig
from patchsae.sae.step import Execution, Stepper
from patchsae.training.starts import (
    BiasInit,
    geometric_median,
    geometric_median_images,
    initial_bias,
    initial_rows,
)
from patchsae.training.stream import TokenStream
from patchsae.training.trainer import CHECKPOINT, TrainConfig, train_sae

SAE_CONFIG = SAEConfig(d_in=32, expansion=4, l1=1e-4)


def test_training_learns_where_its_caller_only_measures(backbone, images, tmp_path):
    with torch.no_grad():
        inside = train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path / "a", progress=False)
    outside = train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path / "b", progress=False)
    assert torch.equal(inside.sae.W_dec, outside.sae.W_dec)


def test_training_reconstructs_better_and_is_done_once(backbone, images, tmp_path):
    trained = train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path, progress=False)
    rows = trained.metrics
    assert (rows[-1]["tokens"], rows[-1]["images"]) == (96 * 50, 96) and len(rows) == rows[-1]["step"] == 40
    assert rows[-1]["fvu"] < 0.6 * rows[0]["fvu"]
    assert [row["lr"] for row in rows[:6]] == pytest.approx([3e-3 * k / 5 for k in (1, 2, 3, 4, 5, 5)])
    norms = trained.sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert sorted(p.name for p in trained.folder.iterdir() if p.name[0] != ".") == [
        "manifest.json", "metrics.csv", "sae.json", "sae.safetensors",
    ]  # fmt: skip
    stamp = (trained.folder / "manifest.json").stat().st_mtime_ns
    # what does not change the result does not make another run
    idle = replace(CONFIG, workers=2, checkpoint_share=0.5, tensorboard=True)
    again = train_sae(images, backbone, SAE_CONFIG, idle, tmp_path, progress=False)
    assert (again.folder / "manifest.json").stat().st_mtime_ns == stamp
    assert torch.equal(again.sae.W_enc, trained.sae.W_enc)


def test_metrics_are_those_of_the_batch(backbone, images, tmp_path):
    """The first row, against a direct computation of the first step."""
    config = replace(CONFIG, b_dec_init="zeros", execution="dense")
    sae_config = replace(SAE_CONFIG, loss=Loss.SQUARED_ERROR, cls_weight=3.0)
    row = train_sae(images, backbone, sae_config, config, tmp_path, progress=False).metrics[0]
    sae = SAE(sae_config, seed=config.seed)
    x = next(TokenStream(images, backbone, config).batches()).x
    f = sae.encode(x).detach()
    x_hat = sae.decode(f).detach()
    gap = (x - x_hat).square()
    assert row["mse"] == pytest.approx((gap.mean(1) / x.norm(dim=1)).mean().item(), rel=1e-5)
    assert row["fvu"] == pytest.approx((gap.sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
    assert row["cosine"] == pytest.approx(torch.cosine_similarity(x, x_hat).mean().item(), rel=1e-5)
    assert row["l0"] == pytest.approx((f > 0).sum(1).float().mean().item(), rel=1e-6)
    assert row["l1_norm"] == pytest.approx(f.sum(1).mean().item(), rel=1e-5)
    assert row["step"] == 1 and row["tokens"] == 128 and row["images"] == 2 and row["ghost"] == 0


def test_dead_latents_are_those_silent_for_the_window(backbone, images, tmp_path, monkeypatch):
    fired, dead, real = [], [], Stepper.step

    def spy(self, x, lr, silent, is_cls):
        step = real(self, x, lr, silent, is_cls)
        dead.append(silent.clone())
        fired.append(step.fired.clone())
        return step

    monkeypatch.setattr(Stepper, "step", spy)
    config = replace(CONFIG, images=48, token_batch=32, lr=3e-2)  # latents die of large steps
    sae_config = replace(SAE_CONFIG, l1=0.1)
    rows = train_sae(images, backbone, sae_config, config, tmp_path, progress=False).metrics
    for step in range(len(fired)):
        recent = fired[max(0, step - 4) : step]
        expected = ~torch.stack(recent).any(0) if step >= 4 else torch.zeros_like(dead[0])
        assert torch.equal(dead[step], expected)
        assert rows[step]["dead_share"] == pytest.approx(expected.float().mean().item())
    assert any(row["dead_share"] > 0 and row["ghost"] > 0 for row in rows)


def test_bias_starts(backbone, images, tmp_path):
    tokens = TokenStream(images, backbone, CONFIG).first(20)
    x = tokens.flatten(0, 1)
    assert torch.equal(initial_bias(tokens, BiasInit.ZEROS), torch.zeros(32))
    torch.testing.assert_close(initial_bias(tokens, BiasInit.MEAN), x.mean(0))
    median, mean = initial_bias(tokens, BiasInit.GEOMETRIC_MEDIAN), x.mean(0)
    assert (x - median).norm(dim=1).sum() < (x - mean).norm(dim=1).sum()
    assert torch.equal(median, geometric_median(x))
    by_image = initial_bias(tokens, BiasInit.GEOMETRIC_MEDIAN_IMAGES)
    assert torch.equal(by_image, geometric_median_images(tokens))
    # lr so small that the run ends where it started; 1000 tokens are 20 images
    still = replace(CONFIG, images=24, lr=1e-30)
    ends = [
        train_sae(images, backbone, SAE_CONFIG, config, tmp_path, progress=False).sae.b_dec.detach()
        for config in (still, replace(still, b_dec_init="geometric_median_images", bias_images=20))
    ]
    assert torch.equal(ends[0], median) and torch.equal(ends[1], by_image)


def test_step_size_decays_and_the_penalty_warms_up_over_shares_of_the_run(
    backbone, images, tmp_path, monkeypatch
):
    weights, real = [], Stepper.step

    def spy(self, *args):
        weights.append(self.sae.l1)
        return real(self, *args)

    monkeypatch.setattr(Stepper, "step", spy)
    config = replace(CONFIG, decay_from=0.75, l1_warmup=0.5)
    rows = train_sae(images, backbone, SAE_CONFIG, config, tmp_path, progress=False).metrics
    passed = np.array([0, *(row["tokens"] for row in rows[:-1])]) / rows[-1]["tokens"]
    warm = np.minimum(1, np.arange(1, 41) / 5)
    np.testing.assert_allclose(
        [row["lr"] for row in rows], 3e-3 * warm * np.minimum(1, (1 - passed) / 0.25), rtol=1e-9
    )
    np.testing.assert_allclose(weights, 1e-4 * np.minimum(1, passed / 0.5), rtol=1e-9)
    assert weights[0] == 0 < weights[1] and weights[-1] == 1e-4 and rows[-1]["lr"] < 0.12 * 3e-3


def test_start_from_data(backbone, images, tmp_path):
    still = replace(CONFIG, images=24, lr=1e-30, start="data")
    sae = train_sae(images, backbone, SAE_CONFIG, still, tmp_path, progress=False).sae
    x = TokenStream(images, backbone, CONFIG).first(20).flatten(0, 1)
    cosines = torch.nn.functional.normalize(x - sae.b_dec, dim=1) @ sae.W_dec.T
    best, which = cosines.max(0)
    assert best.min() > 0.9999 and len(which.unique()) == sae.d_sae
    torch.testing.assert_close(sae.W_enc, sae.W_dec)
    other = initial_rows(x[None], sae.b_dec, sae.d_sae, seed=1)
    assert not torch.allclose(other, sae.W_dec)
    # more latents than tokens: what is over stays as drawn
    wide = SAEConfig(d_in=32, expansion=40)
    rows = train_sae(images, backbone, wide, still, tmp_path, progress=False).sae.W_dec
    torch.testing.assert_close(rows[1000:], SAE(wide, seed=CONFIG.seed).W_dec[1000:])


def test_a_run_with_every_option_goes_on_with_the_same_bits(backbone, images, tmp_path, monkeypatch):
    config = replace(CONFIG, decay_from=0.5, l1_warmup=0.4, start="data", cache=str(tmp_path))
    for name, sae_config in (
        ("relu", SAE_CONFIG), ("topk", replace(SAE_CONFIG, activation="topk", k=8)),
    ):  # fmt: skip
        whole = train_sae(images, backbone, sae_config, config, tmp_path / name, progress=False)
        for stop in (3, 20):
            stop_at_step(monkeypatch, stop)
            with pytest.raises(KeyboardInterrupt):
                train_sae(images, backbone, sae_config, config, tmp_path / f"cut-{name}", progress=False)
            monkeypatch.undo()
        cut = train_sae(images, backbone, sae_config, config, tmp_path / f"cut-{name}", progress=False)
        assert all(torch.equal(a, b) for a, b in zip(whole.sae.parameters(), cut.sae.parameters()))  # noqa: B905
        keys = ("step", "tokens", "fvu", "l0", "lr", "dead_share")
        assert [[r[k] for k in keys] for r in whole.metrics] == [[r[k] for k in keys] for r in cut.metrics]


def test_options_that_do_nothing_leave_a_result_its_name():
    plain = CONFIG.inputs()
    assert not {"decay_from", "l1_warmup", "start"} & set(plain)
    for change in ({"decay_from": 0.8}, {"l1_warmup": 0.1}, {"start": "data"}):
        assert replace(CONFIG, **change).inputs() == plain | change


def test_training_from_a_cache(backbone, images, tmp_path):
    plain = train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path, progress=False)
    config = replace(CONFIG, cache=str(tmp_path / "cache"))
    cached = train_sae(images, backbone, SAE_CONFIG, config, tmp_path, progress=False)
    assert cached.folder != plain.folder  # float16 rounds
    assert cached.metrics[-1]["fvu"] == pytest.approx(plain.metrics[-1]["fvu"], rel=0.02)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole, tensors, meta: whole[:-100],
        lambda whole, tensors, meta: b"",
        lambda whole, tensors, meta: (
            tensors,
            meta | {"facts": meta["facts"].replace('"inputs": "', '"inputs": "0')},
        ),
        lambda whole, tensors, meta: (tensors, {}),
        lambda whole, tensors, meta: ({k: v for k, v in tensors.items() if k != "sae.b_enc"}, meta),
        lambda whole, tensors, meta: (tensors | {"sae.b_enc": tensors["sae.b_enc"] + 1}, meta),
        lambda whole, tensors, meta: ({k: v for k, v in tensors.items() if "exp_avg" not in k}, meta),
        lambda whole, tensors, meta: (tensors | {"silent": tensors["silent"][:3].clone()}, meta),
    ],
    ids=[
        "cut",
        "empty",
        "foreign",
        "no metadata",
        "no weights",
        "other weights",
        "no moments",
        "other size",
    ],
)
def test_a_bad_checkpoint_is_named(backbone, images, tmp_path, monkeypatch, damage):
    stop_at_step(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path, progress=False)
    monkeypatch.undo()
    (path,) = tmp_path.glob(f"sae-*/{CHECKPOINT}")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    bad = damage(path.read_bytes(), load_file(path), meta)
    path.unlink()
    path.write_bytes(bad) if isinstance(bad, bytes) else save_file(bad[0], path, bad[1])
    with pytest.raises(
        PatchSAEError, match=r"checkpoint.safetensors' is no checkpoint .*; delete it"
    ) as error:
        train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path, progress=False)
    assert "\n" not in str(error.value)
    path.unlink()
    train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path, progress=False)


def stop_at_step(monkeypatch, number: int) -> None:
    real, steps = Stepper.step, []

    def step(self, *args):
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Stepper, "step", step)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    backbone, images, tmp_path, monkeypatch
):
    real = Stepper.step

    def explode(self, x, lr, dead, is_cls):
        step = real(self, x, lr, dead, is_cls)
        return step._replace(reconstruction=float("nan")) if lr == CONFIG.lr else step

    monkeypatch.setattr(Stepper, "step", explode)
    with pytest.raises(PatchSAEError, match="not finite at step 5 .*smaller lr than 0.003; nothing"):
        train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path, progress=False)
    monkeypatch.undo()
    assert len(list(tmp_path.glob(f"sae-*/{CHECKPOINT}"))) == 1
    assert (
        train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path, progress=False).metrics[-1]["step"] == 40
    )


def test_bad_input_is_named(backbone, images, tmp_path):
    for name in ("bias_tokens", "log_every", "lr", "checkpoint_share"):
        with pytest.raises(PatchSAEError, match=f"{name}=0 must be positive"):
            TrainConfig(**{name: 0})
    with pytest.raises(PatchSAEError, match="b_dec_init='median'.*geometric_median_images"):
        TrainConfig(b_dec_init="median")
    with pytest.raises(PatchSAEError, match="start='zeros'.*random, data"):
        TrainConfig(start="zeros")
    for name in ("decay_from", "l1_warmup"):
        for value in (-0.1, 1.5, float("nan")):
            with pytest.raises(PatchSAEError, match=f"{name}={value} must be a share from 0 to 1"):
                TrainConfig(**{name: value})
    with pytest.raises(PatchSAEError, match="execution='fast'.*auto, dense"):
        TrainConfig(execution="fast")
    assert TrainConfig(execution="dense").execution is Execution.DENSE
    with pytest.raises(PatchSAEError, match="d_in=64 of the SAE is not the width 32 of tiny; set d_in=32"):
        train_sae(images, backbone, SAEConfig(64), CONFIG, tmp_path)
    with pytest.raises(PatchSAEError, match="empty"):
        train_sae(images.subset([]), backbone, SAE_CONFIG, CONFIG, tmp_path)


def test_tensorboard(backbone, images, tmp_path, monkeypatch):
    config = replace(CONFIG, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PatchSAEError, match="tensorboard=True needs the package tensorboard; run 'pip"):
        train_sae(images, backbone, SAE_CONFIG, config, tmp_path, progress=False)
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = train_sae(images, backbone, SAE_CONFIG, config, tmp_path, progress=False)
    events = EventAccumulator(str(trained.folder / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("fvu")]
    assert found == [(row["step"], pytest.approx(row["fvu"])) for row in trained.metrics]


def test_two_processes_that_want_the_same_sae_do_not_disturb_each_other(backbone, images, tmp_path):
    """The second waits for the first, then finds its result."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); from test_training import *; once(sys.argv[2])"
    command = [sys.executable, "-c", script, os.path.dirname(__file__), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.split()[0] for text in said) == ["found", "trained"]
    assert len({text.split()[1] for text in said}) == 1


def once(root: str) -> None:
    """Train in a process of its own; say whether it did, and what came out."""
    steps, real = [], Stepper.step

    def count(self, *args):
        steps.append(1)
        return real(self, *args)

    Stepper.step = count
    trained = train_sae(tiny_images(), tiny_backbone(), SAE_CONFIG, CONFIG, root, progress=False)
    print("trained" if steps else "found", trained.sae.W_enc.double().sum().item())


def test_command_line(tmp_path, capsys):
    arguments = [*"--images 16 --expansion 2 --token-batch 512 --quiet --out".split(), str(tmp_path)]
    assert train.main([*arguments, "--b-dec-init", "mean", "--no-ghost"]) == 0
    said = capsys.readouterr().out
    (folder,) = tmp_path.glob("sae-*")
    assert said.startswith(f"{folder}: 3,152 tokens, mse 0.")
    with open(folder / "metrics.csv", newline="") as file:
        assert next(csv.DictReader(file))["tokens"]
    assert train.main([*arguments, "--tokens", "some"]) == 2
    assert "tokens='some' is unknown" in capsys.readouterr().err
    assert train.main(["--scale", "paper", "--model", "nothing"]) == 2
