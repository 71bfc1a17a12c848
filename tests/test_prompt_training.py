"""Learning prompts: the published recipe, runs that are killed, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_images

from patchsae.adaptation import prompt_training
from patchsae.adaptation.prompt_training import (
    BASE_TO_NOVEL,
    CROSS_DATASET,
    PromptTrainConfig,
    train_prompts,
)
from patchsae.images.augmentation import Crops
from patchsae.images.sets import Batch, ImageSet
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.tensors import save_tensors

# 24 images in 6 steps per epoch, the tiny CLIP's text tower having one block
CONFIG = PromptTrainConfig(depth=1, epochs=2, batch_size=4, lr=0.01, checkpoint_share=1e9)


class Killed(BaseException):
    """Stop a run as a kill would: nothing in it catches this."""


class Held(ImageSet):
    """Images of a set, drawn once for all of these tests."""

    def __init__(self, images):
        self.name, self.split, self.classnames, self.labels = (
            "held",
            "train",
            images.classnames,
            images.labels,
        )
        self.pixels, self.print = images.load(range(len(images))).images, images.fingerprint()

    def load(self, indices):
        indices = np.asarray(indices)
        labels = torch.from_numpy(self.labels[indices])
        return Batch(self.pixels[indices], labels, torch.from_numpy(indices))

    def fingerprint(self):
        return self.print


@pytest.fixture(scope="module")
def images():
    return Held(tiny_images())


@pytest.fixture(scope="module")
def shots(images):
    return images.subset(range(24))


@pytest.fixture(scope="module")
def whole(backbone, shots, tmp_path_factory):
    return train_prompts(backbone, shots, CONFIG, tmp_path_factory.mktemp("whole"), progress=False)


def weights(run):
    return (run.folder / "prompts.safetensors").read_bytes()


def test_published_step_sizes():
    rates = [BASE_TO_NOVEL.rate(epoch) for epoch in range(BASE_TO_NOVEL.epochs)]
    np.testing.assert_allclose(rates, [1e-5, 3.5e-3, 3.1658e-3, 2.2908e-3, 1.2092e-3], rtol=2e-5)
    assert [CROSS_DATASET.rate(epoch) for epoch in range(CROSS_DATASET.epochs)] == [1e-5, 2.6e-3]
    assert (BASE_TO_NOVEL.depth, CROSS_DATASET.depth, BASE_TO_NOVEL.batch_size) == (9, 3, 4)


def test_first_steps_are_those_of_plain_sgd(backbone, shots, tmp_path):
    """Two steps by hand, on images as they are: loss, momentum and decay as published."""
    config = replace(CONFIG, augment=False, epochs=1, warmup_epochs=0)
    found = train_prompts(backbone, shots, config, tmp_path, progress=False)
    order = np.random.default_rng([config.seed, 0, 0]).permutation(24)
    adapted = prompt_training.adapt(backbone, config.learned, config.seed)
    adapted.prompts.requires_grad_(True)
    texts = [config.text(name) for name in shots.classnames]
    velocity, losses = {}, []
    for batch in order.reshape(6, 4):
        images = backbone.normalize(shots.load(batch).images)
        words = torch.nn.functional.normalize(adapted.text_tower.encode(
            adapted.text_tower.pack(texts), adapted.prompts.text_prompts()), dim=-1)  # fmt: skip
        pictures = torch.nn.functional.normalize(adapted(images), dim=-1)
        logits = backbone.logit_scale * pictures @ words.T
        loss = -logits.log_softmax(-1)[range(4), shots.labels[batch]].mean()
        adapted.prompts.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in adapted.prompts.named_parameters():
                step = p.grad + config.weight_decay * p
                velocity[name] = config.momentum * velocity[name] + step if name in velocity else step
                p -= config.lr * velocity[name]
    for name, value in adapted.prompts.named_parameters():
        ours = found.backbone.prompts.state_dict()[name]
        torch.testing.assert_close(ours, value.detach(), rtol=1e-4, atol=1e-6)
    assert found.metrics[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("killed_at", [1, 5, 6, 7, 11, "finish"])
def test_a_killed_run_ends_with_the_same_bits(backbone, shots, whole, tmp_path, monkeypatch, killed_at):
    saved = prompt_training._Run._save

    def save(run):
        saved(run)
        if run.step == killed_at:
            raise Killed

    def finish(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if killed_at == "finish":
            patch.setattr(prompt_training.Stage, "finish", finish)
        patch.setattr(prompt_training._Run, "_save", save)
        with pytest.raises(Killed):
            train_prompts(backbone, shots, CONFIG, tmp_path, progress=False)
    again = train_prompts(backbone, shots, CONFIG, tmp_path, progress=False)
    assert weights(again) == weights(whole)
    assert again.metrics == whole.metrics
    assert not list(again.folder.glob("checkpoint*"))


def test_a_second_run_returns_the_first(backbone, shots, whole, monkeypatch):
    monkeypatch.setattr(prompt_training._Run, "go", None)
    at = backbone.at_block(2)
    again = train_prompts(at, shots, replace(CONFIG, cache_mb=0, workers=3), whole.folder.parent)
    assert again.folder == whole.folder
    assert again.backbone.block == 2
    assert again.metrics == whole.metrics
    assert [row["lr"] for row in whole.metrics] == [1e-5, 0.01]
    assert [row["step"] for row in whole.metrics] == [6, 12]


def test_another_seed_or_set_is_another_run(backbone, shots, images, whole):
    root = whole.folder.parent
    config = replace(CONFIG, epochs=1, warmup_epochs=0)
    found = {
        train_prompts(backbone, shots, config, root, progress=False).folder,
        train_prompts(backbone, shots, replace(config, seed=2), root, progress=False).folder,
        train_prompts(backbone, images.subset(range(1, 25)), config, root, progress=False).folder,
    }
    assert len({path.name for path in found}) == 3
    assert len({(path / "prompts.safetensors").read_bytes() for path in found}) == 3


def test_workers_and_memory_change_nothing(backbone, shots, whole, tmp_path):
    found = train_prompts(backbone, shots, replace(CONFIG, cache_mb=0), tmp_path / "a", progress=False)
    assert weights(found) == weights(whole)
    found = train_prompts(backbone, shots, replace(CONFIG, workers=1), tmp_path / "b", progress=False)
    assert weights(found) == weights(whole)


@pytest.mark.parametrize("method", ["maple", "coop", "vpt"])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_each_method_learns_the_shots(backbone, shots, tmp_path, method, precision):
    config = replace(
        CONFIG,
        method=method,
        precision=precision,
        epochs=6,
        lr=0.1,
        augment=False,
        template="a picture of a {}",
    )
    run = train_prompts(backbone, shots, config, tmp_path, progress=False)
    assert run.metrics[-1]["loss"] < run.metrics[1]["loss"]  # the first epoch is the warm-up
    assert all(value.dtype == torch.float32 for value in run.backbone.prompts.parameters())
    assert not any(value.requires_grad for value in run.backbone.parameters())
    card = json.loads((run.folder / "prompts.json").read_text())
    assert (card["method"], card["seed"], card["classnames"]) == (method, 1, list(shots.classnames))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_about_the_same(backbone, shots, whole, tmp_path, precision):
    """The published runs used fp16 without scaling the loss."""
    found = train_prompts(backbone, shots, replace(CONFIG, precision=precision), tmp_path, progress=False)
    start = prompt_training.adapt(backbone, CONFIG.learned, CONFIG.seed).prompts.state_dict()
    exact = whole.backbone.prompts.state_dict()
    assert all(np.isfinite(row["loss"]) for row in found.metrics)
    for name, value in found.backbone.prompts.state_dict().items():
        moved = (exact[name] - start[name]).norm()
        assert (value - exact[name]).norm() < 0.1 * moved, name
        assert not torch.equal(value, exact[name])


def test_a_killed_run_in_half_precision_ends_with_the_same_bits(backbone, shots, tmp_path, monkeypatch):
    config = replace(CONFIG, precision="bf16")
    whole = train_prompts(backbone, shots, config, tmp_path / "whole", progress=False)
    kill(monkeypatch, backbone, shots, config, tmp_path / "killed", at=7)
    again = train_prompts(backbone, shots, config, tmp_path / "killed", progress=False)
    assert weights(again) == weights(whole) and again.metrics == whole.metrics


def test_without_momentum_a_run_is_kept_and_goes_on_too(backbone, shots, tmp_path, monkeypatch):
    config = replace(CONFIG, momentum=0)
    whole = train_prompts(backbone, shots, config, tmp_path / "whole", progress=False)
    kill(monkeypatch, backbone, shots, config, tmp_path / "killed", at=5)
    again = train_prompts(backbone, shots, config, tmp_path / "killed", progress=False)
    assert weights(again) == weights(whole)


def test_the_manifest_tells_the_seconds_of_all_sessions(backbone, shots, tmp_path, monkeypatch):
    def seconds(root):
        (path,) = root.glob("*/manifest.json")
        return json.loads(path.read_text())["facts"]["training_seconds"]

    train_prompts(backbone, shots, CONFIG, tmp_path / "whole", progress=False)
    assert 0 < seconds(tmp_path / "whole") < 600
    clock = iter(range(10_000))
    with monkeypatch.context() as patch:
        patch.setattr(prompt_training.time, "monotonic", lambda: float(next(clock)))
        kill(monkeypatch, backbone, shots, CONFIG, tmp_path / "killed", at=7)
        first = next(clock)
        train_prompts(backbone, shots, CONFIG, tmp_path / "killed", progress=False)
    assert first / 2 < seconds(tmp_path / "killed") <= next(clock)


def kill(monkeypatch, backbone, shots, config, root, at):
    """Start a run that is killed right after the checkpoint of a step."""
    saved = prompt_training._Run._save

    def save(run):
        saved(run)
        if run.step == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prompt_training._Run, "_save", save)
        with pytest.raises(Killed):
            train_prompts(backbone, shots, config, root, progress=False)


def test_crops_depend_on_seed_and_step_alone(images):
    crops = Crops(images, 112, (0.08, 1.0), seed=1, keep_bytes=10**6)
    torch.manual_seed(3)
    first = crops.read([0, 5, 6])
    after = torch.rand(1)
    assert torch.equal(crops.read([0, 5, 6]), first)  # from memory, and whatever was drawn since
    assert torch.equal(Crops(images, 112, (0.08, 1.0), seed=1).read([0, 5, 6]), first)
    assert not torch.equal(crops.read([1, 5, 6]), first)
    assert not torch.equal(Crops(images, 112, (0.08, 1.0), seed=2).read([0, 5, 6]), first)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert first.shape == (2, 3, 112, 112) and first.dtype == torch.uint8


def test_a_whole_image_is_cropped_to_itself_or_its_mirror(images):
    plain = images.load([3]).images[0]
    assert torch.equal(Crops(images, 112, None, seed=1).read([0, 3])[0], plain)
    # no random aspect leaves room for another whole crop than the image itself
    found = [Crops(images, 112, (1.0, 1.0), seed=1).read([step, 3])[0] for step in range(8)]
    assert {torch.equal(image, plain) for image in found} == {True, False}
    assert all(torch.equal(image, plain) or torch.equal(image.flip(-1), plain) for image in found)


def test_the_undistorted_picture_is_cropped_where_the_set_has_one(images):
    class Wide(Held):
        def picture(self, index):
            return Image.new("RGB", (300, 100), (index, 0, 0))

    found = Crops(Wide(images), 112, (0.3, 0.5), seed=1).read([0, 3, 7])
    assert found.shape == (2, 3, 112, 112)
    assert found[:, 0].flatten(1).float().mean(1).tolist() == [3, 7]


def test_bad_input_is_refused_before_any_training(backbone, images, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_training._Run, "go", None)
    for fields, sentence in (
        ({"lr": 0}, "lr=0 must be positive"),
        ({"epochs": 2, "warmup_epochs": 2}, r"warmup_epochs=2 must be in 0..1"),
        ({"depth": 0}, "depth=0 has no prompts to learn"),
        ({"crop_scale": (0.5, 0.2)}, r"crop_scale=\(0.5, 0.2\) must be two shares"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"momentum": -0.1}, "momentum=-0.1 must not be negative"),
        ({"workers": -2}, "workers=-2 must not be negative"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must not be negative"),
        ({"precision": "int8"}, "precision='int8' is unknown; choose one of float32, bf16, fp16"),
    ):
        with pytest.raises(PatchSAEError, match=sentence):
            PromptTrainConfig(**fields)
    with pytest.raises(PatchSAEError, match="'held' has 3 images, fewer than batch_size=4"):
        train_prompts(backbone, images.subset(range(3)), CONFIG, tmp_path)
    with pytest.raises(PatchSAEError, match="depth=9 is more than"):
        train_prompts(backbone, images, replace(CONFIG, depth=9), tmp_path)


def test_a_loss_that_explodes_is_said(backbone, shots, tmp_path):
    config = replace(CONFIG, lr=1e30, warmup_epochs=0)
    with pytest.raises(PatchSAEError, match="the loss is not finite at step .*smaller lr"):
        train_prompts(backbone, shots, config, tmp_path, progress=False)


def test_a_damaged_checkpoint_is_refused(backbone, shots, whole, tmp_path):
    folder = tmp_path / whole.folder.name
    folder.mkdir()
    (folder / "checkpoint.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(PatchSAEError, match="is no checkpoint of this run"):
        train_prompts(backbone, shots, CONFIG, tmp_path, progress=False)
    tensors = load_file(whole.folder / "prompts.safetensors")
    save_tensors(folder / "checkpoint.safetensors", tensors, {"inputs": "other"})
    with pytest.raises(PatchSAEError, match="it is of another run"):
        train_prompts(backbone, shots, CONFIG, tmp_path, progress=False)
