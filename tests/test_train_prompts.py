"""The command that learns prompts, at either scale, stopped and started again."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from miniature import benchmark
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file

from patchbook.scales import scale
from patchbook.scenes.embedded import embedded_dataset
from patchbook.train_prompts import main
from patchsae.adaptation import prompt_training
from patchsae.adaptation.prompt_files import find_prompts, read_card
from patchsae.adaptation.prompts import Method
from patchsae.adaptation.weights import LR, Change
from patchsae.clip.backbone import load_backbone
from patchsae.images.benchmark_sets import open_benchmark
from patchsae.images.few_shot import read_manifest

VISION = {"image_size": 48, "patch_size": 16, "layers": 11, "width": 32, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}


class Killed(BaseException):
    """Stop a run as a kill would."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Make a tiny CLIP as a folder."""
    folder = tmp_path_factory.mktemp("clip")
    model = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    save_file(CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in ("eurosat", "caltech-101"):
        benchmark(root, name)
    return root


@pytest.fixture
def run(tmp_path, clip, data):
    """Return a function that learns prompts of the miniatures."""

    def learn(*more, prompts="prompts"):
        where = ["--prompts", str(tmp_path / prompts), "--work", str(tmp_path / f"work of {prompts}")]
        small = ["--depth", "3", "--shots", "2", "--batch", "2", "--epochs", "2", "--quiet"]
        paper = ["--scale", "paper", "--data", str(data), "--model", str(clip)]
        return main([*paper, *where, *small, *more])

    return learn


def test_prompts_of_a_benchmark_folder_are_found_by_the_notebooks_function(tmp_path, run, clip, data):
    assert run("--seed", "1", "2") == 0
    plain = load_backbone(str(clip), block=3)
    for name in ("eurosat", "caltech-101"):
        found = [find_prompts(tmp_path / "prompts", name, plain, seed) for seed in (1, 2)]
        assert found[0].fingerprint() != found[1].fingerprint() and found[0].n_tokens == plain.n_tokens + 2
        folder = tmp_path / "prompts" / "maple" / name / "seed2"
        dataset = open_benchmark(name, data, plain.image_size)
        card = read_card(folder)
        assert card.classnames == dataset.base().classnames and card.seed == 2
        assert card.config.template == dataset.template
        assert (
            np.bincount(read_manifest(folder / "manifest.json", dataset).train.labels).tolist() == [2] * 3
        )
        assert len((folder / "metrics.csv").read_text().splitlines()) == 3  # header, two epochs


def test_methods_and_settings_reach_the_run(tmp_path, run, clip):
    assert run("--dataset", "eurosat", "--method", "vpt", "--half", "--crop-scale", "0.4", "0.9") == 0
    plain = load_backbone(str(clip), block=3)
    tuned = find_prompts(tmp_path / "prompts", "eurosat", plain, method=Method.VPT)
    assert tuned.prompts.config.method is Method.VPT and tuned.prompts.config.depth == 3
    weights = load_file(tmp_path / "prompts/vpt/eurosat/seed1/prompts.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float16"}
    (manifest,) = (tmp_path / "work of prompts").glob("prompts-*/manifest.json")
    recipe = json.loads(manifest.read_text())["inputs"]["train"]
    assert recipe["crop_scale"] == [0.4, 0.9] and recipe["batch_size"] == 2 and recipe["lr"] == 0.0035


def test_weights_are_adapted_by_the_same_command(tmp_path, clip, data):
    where = ["--prompts", str(tmp_path / "prompts"), "--work", str(tmp_path / "work of prompts")]
    small = ["--shots", "2", "--batch", "2", "--epochs", "2", "--quiet", "--dataset", "eurosat"]
    paper = ["--scale", "paper", "--data", str(data), "--model", str(clip)]
    assert main([*paper, *where, *small, "--method", "lora", "--rank", "3"]) == 0
    plain = load_backbone(str(clip), block=3)
    tuned = find_prompts(tmp_path / "prompts", "eurosat", plain, method=Change.LORA)
    assert tuned.what.rank == 3 and tuned.n_tokens == plain.n_tokens and "{}" in tuned.what.template
    (manifest,) = (tmp_path / "work of prompts").glob("prompts-*/manifest.json")
    assert json.loads(manifest.read_text())["inputs"]["train"]["lr"] == LR[Change.LORA]


def test_what_is_there_is_left_alone(tmp_path, run, capsys, monkeypatch):
    assert run("--dataset", "eurosat") == 0
    card = tmp_path / "prompts/maple/eurosat/seed1/prompts.json"
    before = card.stat().st_mtime_ns
    monkeypatch.setattr(prompt_training._Run, "go", None)
    assert run("--dataset", "eurosat") == 0
    assert f"{card.parent}: there already; delete it" in capsys.readouterr().out
    assert card.stat().st_mtime_ns == before


def test_a_killed_command_goes_on_to_the_same_bits(tmp_path, run, monkeypatch):
    assert run("--dataset", "eurosat", prompts="whole") == 0
    saved = prompt_training._Run._save

    def save(run):
        saved(run)
        if run.step == 1:  # of the first step there always is a checkpoint
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prompt_training._Run, "_save", save)
        with pytest.raises(Killed):
            run("--dataset", "eurosat")
    assert not (tmp_path / "prompts").exists()
    steps, take = [], prompt_training._Run._take
    monkeypatch.setattr(prompt_training._Run, "_take", lambda r, *a: steps.append(r.step) or take(r, *a))
    assert run("--dataset", "eurosat") == 0
    assert steps == [1, 2, 3]
    ours, whole = (tmp_path / p / "maple/eurosat/seed1/prompts.safetensors" for p in ("prompts", "whole"))
    assert ours.read_bytes() == whole.read_bytes()


def test_prompts_of_an_embedded_set(tmp_path):
    where = ["--prompts", str(tmp_path), "--work", str(tmp_path / "work")]
    small = ["--shots", "1", "--epochs", "2", "--precision", "bf16", "--depth", "2", "--quiet"]
    assert main(["--dataset", "silhouettes", "--seed", "3", *where, *small]) == 0
    tuned = find_prompts(tmp_path, "silhouettes", scale("embedded").backbone(), 3)
    assert tuned.prompts.config.template == embedded_dataset("silhouettes").template
    (manifest,) = (tmp_path / "work").glob("prompts-*/manifest.json")
    assert json.loads(manifest.read_text())["inputs"]["train"]["crop_scale"] == [0.5, 1.0]


@pytest.mark.parametrize("arguments, sentence", [
    (["--scale", "huge"], "scale='huge' is unknown"),
    (["--scale", "paper"], "--scale paper needs --data"),
    (["--scale", "paper", "--data", "EMPTY"], "holds none of the eleven benchmarks"),
    (["--scale", "paper", "--data", "EMPTY", "--dataset", "dtd"], "DATASETS.md#dtd"),
    (["--dataset", "eurosat"], "dataset='eurosat' is unknown; choose one of concepts"),
    (["--method", "lora", "--depth", "3"], "--depth means nothing for --method lora: leave it out"),
    (["--rank", "3"], "--rank means nothing for --method maple: leave it out"),
    (["--method", "lora", "--rank", "0"], "rank=0 must be a whole number"),
    (["--method", "cocoop"], "--method 'cocoop' is unknown; choose one of maple, coop, vpt, lora, full"),
    (["--dataset", "silhouettes", "--shots", "0"], "shots=0 must be a whole number of at least 1"),
    (["--dataset", "silhouettes", "--seed", "-1"], "seed=-1 must not be negative"),
    (["--dataset", "silhouettes", "--lr", "nan"], "lr=nan must be positive"),
    (["--dtype", "int8"], "dtype 'int8' is unknown|dtype torch.int8 is unknown"),
])  # fmt: skip
def test_bad_input_ends_in_one_sentence(tmp_path, clip, capsys, arguments, sentence):
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / "empty") if word == "EMPTY" else word for word in arguments]
    assert main(["--model", str(clip), "--prompts", str(tmp_path), *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and re.search(sentence, told[0])


def test_help_is_there_at_once():
    code = "import sys, patchbook.train_prompts; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "False\n"  # a worker that decodes images imports it too
    command = [sys.executable, "-m", "patchbook.train_prompts", "--help"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0 and "--precision" in told.stdout
