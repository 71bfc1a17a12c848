"""The small CLIP: its training arithmetic, its resumption, and its card against its weights."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patchsae.runs.stage import project_root

FOLDER = project_root() / "artefacts" / "small_clip"
sys.path.insert(0, str(FOLDER))
import evaluate as evaluation  # noqa: E402
import train as training  # noqa: E402

TINY = training.Recipe(phases=training.RECIPES["tiny"], batch=16)


@pytest.fixture
def model():
    torch.manual_seed(1)
    clip, tokenizer, normal = training.build()
    return clip.eval(), tokenizer, normal


def test_training_forwards_equal_open_clip(model):
    clip, tokenizer, _ = model
    images = torch.randn(3, 3, 112, 112)
    tokens = tokenizer(["a cat", "a flat picture of a hedgehog and a dog", "x", "ring, key", "egg"])
    with torch.no_grad():
        torch.testing.assert_close(training.image_tower(clip, images).embedding, clip.encode_image(images))
        torch.testing.assert_close(training.text_tower(clip, tokens), clip.encode_text(tokens))


def test_dropping_no_patch_changes_nothing(model):
    clip, _, _ = model
    images = torch.randn(2, 3, 112, 112)
    every = torch.arange(196).expand(2, -1)
    with torch.no_grad():
        whole, kept = training.image_tower(clip, images), training.image_tower(clip, images, every)
    torch.testing.assert_close(whole, kept)


def test_rescaling_the_stream_keeps_the_function(model):
    clip, _, _ = model
    with torch.no_grad():
        for block in clip.visual.transformer.resblocks:
            block.mlp.c_proj.weight *= 40  # a stream as large as Muon leaves it
        images = torch.randn(4, 3, 112, 112)
        before = clip.encode_image(images)
        factor = training.rescale_stream(clip, images)
        after = clip.encode_image(images)
    assert factor < 0.5
    assert torch.cosine_similarity(before, after).min() > 1 - 1e-4
    found = []
    hook = clip.visual.transformer.resblocks[10].register_forward_hook(lambda *a: found.append(a[2]))
    clip.encode_image(images)
    hook.remove()
    spread = (found[0] - found[0].mean((0, 1))).norm(dim=-1).mean()
    assert spread.item() == pytest.approx(128**0.5, rel=1e-3)


def test_a_stopped_run_is_resumed_to_the_same_weights(tmp_path, monkeypatch):
    whole = training.train(TINY, tmp_path / "whole", "cpu", None, evaluations=0)
    calls, real = [], training.paint

    def stop_at_the_fourth(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "paint", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        training.train(TINY, tmp_path / "cut", "cpu", None, every=0, evaluations=0)
    monkeypatch.setattr(training, "paint", real)
    resumed = training.train(TINY, tmp_path / "cut", "cpu", None, evaluations=0)
    assert len(calls) == 4
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    fresh = training.build()[0].state_dict()
    assert any(not torch.equal(fresh[k], v) for k, v in whole.state_dict().items())


def test_the_card_describes_the_weights():
    card = json.loads((FOLDER / "card.json").read_text())
    assert (FOLDER / "open_clip_model.safetensors").stat().st_size <= 16_000_000
    clip, tokenizer, normal = training.build()
    training.load_weights(clip, FOLDER / "open_clip_model.safetensors")
    n = 96
    found = evaluation.accuracy(clip.eval(), tokenizer, normal["mean"], normal["std"], n)
    for style, kinds in found.items():
        claimed = card["accuracy"][style]["trained"]["concept"]
        assert card["zero_shot_top1"][style] == claimed
        # n of the card's own scenes, of other concepts than the rest: five standard errors
        tolerance = 5 * (claimed * (1 - claimed) / n) ** 0.5
        assert abs(kinds["trained"]["concept"] - claimed) < tolerance, style


def test_phases_and_rates():
    phases = training.RECIPES["cpu"]
    total = sum(phase.images for phase in phases)
    assert training.phase_at(phases, 0) is phases[0]
    assert training.phase_at(phases, total - 1) is phases[-1]
    assert training.phase_at(phases, total) is None
    assert training.progress_at(phases, 0) == 0 and training.progress_at(phases, total) == pytest.approx(1)
    first = sum(phase.images for phase in phases[:-1])
    recipe = training.Recipe(phases=phases)
    # two cycles: the last phase begins anew
    assert training.rate_at(recipe, first // 4) == 1
    assert training.rate_at(recipe, first - 1) < 1e-3
    assert training.rate_at(recipe, first + phases[-1].images // 4) == phases[-1].restart
    assert training.rate_at(recipe, total) == 0


def test_a_mosaic_has_its_patches_tile_by_tile():
    tiles = torch.arange(8)[:, None, None, None].expand(8, 3, 56, 56)
    pictures = training.mosaic(tiles)
    assert pictures.shape == (2, 3, 112, 112)
    every = torch.arange(49).expand(2, 4, -1)
    where = training.mosaic_patches(every, 7)
    assert torch.equal(where.sort(1).values, torch.arange(196).expand(2, -1))
    shown = pictures[:, 0, ::8, ::8].flatten(1).gather(1, where)
    assert torch.equal(shown.view(2, 4, 49), torch.arange(8).view(2, 4, 1).expand(-1, -1, 49))


def test_the_loss_of_patches_falls_when_they_say_what_the_caption_says():
    names, nothing = torch.eye(4)[:3], torch.eye(4)[3]
    shown = torch.tensor([[0, -1, -1, -1], [1, 2, -1, -1]])
    right = torch.full((2, 50), 3)
    right[0, :8], right[1, :6], right[1, 6:12] = 0, 1, 2
    absent, mute, everywhere = right.clone(), torch.full((2, 50), 3), right.clone()
    absent[0, 20] = 2
    everywhere[0] = 0

    def loss(said):
        return training.patch_loss(10 * torch.eye(4)[said], names, nothing, shown).loss.item()

    assert loss(right) < 0.01
    for wrong in (absent, mute, everywhere):
        assert loss(wrong) > loss(right) + 0.05


def test_what_patches_leave_unsaid():
    draw = torch.Generator().manual_seed(0)
    noun = torch.randint(0, 6, (600,), generator=draw)
    meaning, silent = torch.randn(6, 8, generator=draw)[noun], (noun == 0).float()
    stream = meaning @ torch.randn(8, 16, generator=draw)
    stream[noun == 0] = 3.0  # whoever says nothing looks the same
    assert training.unsaid(stream, meaning, silent) < 0.01
    louder = stream - 1000.0 * silent[:, None]  # silent patches far off: no noun is said better for it
    assert training.unsaid(louder, meaning, silent) < 0.01
    noise = torch.randn(stream.shape, generator=draw)
    shares = [training.unsaid(stream + loud * noise, meaning, silent).item() for loud in (1, 4, 100)]
    assert 0.05 < shares[0] < shares[1] < shares[2] and shares[2] == pytest.approx(1, abs=0.02)
    only_silent = stream + noise * silent[:, None]
    assert 0.02 < training.unsaid(only_silent, meaning, silent) < shares[0]


def test_variance_in_one_direction_is_crowded():
    draw = torch.Generator().manual_seed(2)
    even = torch.randn(20_000, 16, generator=draw)
    assert training.crowded(even).item() == pytest.approx(1 / 4, rel=0.02)
    one = torch.outer(torch.randn(500, generator=draw), torch.randn(16, generator=draw)) + 7
    assert training.crowded(one).item() == pytest.approx(1)
    assert training.crowded(even * torch.tensor([5.0] + [1.0] * 15)) > 0.5


def test_the_gradient_of_the_unsaid_is_that_of_its_best_map():
    draw = torch.Generator().manual_seed(1)
    stream, meaning = torch.randn(200, 8, generator=draw), torch.randn(200, 5, generator=draw)
    silent, step = torch.rand(200, generator=draw), 0.01 * torch.randn(200, 8, generator=draw)
    stream.requires_grad_()
    training.unsaid(stream, meaning, silent).backward()
    with torch.no_grad():
        ahead, behind = (training.unsaid(stream + s * step, meaning, silent).item() for s in (1, -1))
    assert (ahead - behind) / 2 == pytest.approx((stream.grad * step).sum().item(), rel=0.01)


def test_two_processes_take_the_mean_of_their_gradients(tmp_path):
    phase = dataclasses.replace(training.PLAIN, images=32, batch=16, mosaics=4)
    recipe = training.Recipe(phases=(phase,), warmup=0.0)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import dataclasses, train, pathlib\n"
        "phase = dataclasses.replace(train.PLAIN, images=32, batch=16, mosaics=4)\n"
        "recipe = train.Recipe(phases=(phase,), warmup=0.0)\n"
        "train.train(recipe, pathlib.Path(sys.argv[2]), 'cpu', None, evaluations=0)"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        FOLDER,
        tmp_path / "two",
    ]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, timeout=600)
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    assert two["seen"] == 32 and two["world"] == 2

    torch.manual_seed(recipe.seed)
    clip, tokenizer, normal = training.build()
    training.smooth_positions(clip)
    head = training.Head(128, len(training.concepts()))
    parameters, weights = (
        [*clip.parameters(), *head.parameters()],
        (1.0, 1.0, *phase.patches, phase.unsaid, phase.unsaid),
    )
    for seen in (0, 16):
        parts = training.losses(
            clip,
            head,
            training.draw_batch(training.plan_batch(recipe, phase, seen, tokenizer), phase, normal, "cpu"),
            phase.patches,
        )
        names = ("contrastive", "head", "patches", "tiles", "unsaid", "crowded")
        (sum(w * parts[name] for name, w in zip(names, weights, strict=True)) / 2).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimiser in training.optimisers(clip, head, recipe):
        for group in optimiser.param_groups:
            group["lr"] *= phase.restart
        optimiser.step()
    clip.logit_scale.data.clamp_(0, 4.6052)
    start = training.build()[0].state_dict()
    for name, weight in clip.state_dict().items():
        moved = (weight - two["clip"][name]).abs().max()
        assert moved <= 2e-3 * weight.abs().max() + 1e-5, (name, moved)
    assert not torch.equal(start["visual.proj"], two["clip"]["visual.proj"])


def test_a_run_on_a_published_model_carries_its_card_on(tmp_path):
    recipe = training.Recipe(phases=training.RECIPES["tiny"], batch=16)
    run = tmp_path / "run"
    clip = training.train(recipe, run, "cpu", None, evaluations=0, start_from=FOLDER)
    rows = [{"images": 128, "seconds": 3, "contrastive": 1.0, "unsaid": 0.5}]
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {"rows": rows}, run / "checkpoint.pt")
    training.publish(clip, recipe, run, tmp_path, before=FOLDER, scenes=64)
    old, new = (json.loads((folder / "card.json").read_text()) for folder in (FOLDER, tmp_path))
    assert new["images_seen"] == old["images_seen"] + 32
    assert new["seconds"] >= old["seconds"]
    assert new["history"][-1] == {"phases": 1, "images": 32, "processes": 1}
    past, now = training.read_past(FOLDER), training.read_past(tmp_path)
    assert len(now.rows) == len(past.rows) + 1 and now.rows[-1]["images"] == old["images_seen"] + 32
    assert now.rows[0]["images"] == past.rows[0]["images"]


def test_folder_is_open_clips_own_layout():
    assert {p.name for p in Path(FOLDER).iterdir()} >= {
        "open_clip_config.json", "open_clip_model.safetensors", "card.json", "curve.csv"
    }  # fmt: skip
