"""Prompts on disk: ours come back as they were, MaPLe's own only if every key is the expected one."""

import copy
import os

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from tiny import tiny_backbone

from patchsae.adaptation.prompt_files import (
    MissingPrompts,
    find_prompts,
    load_official,
    load_prompts,
    prompts_folder,
    read_card,
    save_prompts,
)
from patchsae.adaptation.prompts import AdaptedBackbone, PromptConfig, Prompts, adapt
from patchsae.clip.backbone import Backbone, load_backbone
from patchsae.images.benchmark_table import BENCHMARKS
from patchsae.runs.errors import PatchSAEError

NAMES = ("cat", "hot_air balloon", "dog")
DEEP = "prompt_learner.compound_prompts_text."


class ConstantWarmupScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Dassl's: it holds another scheduler, so a file of it names classes that are no tensors."""

    def __init__(self, optimizer, successor):
        self.successor, self.warmup_epoch, self.cons_lr = successor, 1, 1e-5
        super().__init__(optimizer)

    def get_lr(self):
        return [self.cons_lr for _ in self.base_lrs]


def official_state(adapted, classes: int = 3) -> dict[str, torch.Tensor]:
    """Write down a state dict as facts.md §1.3 lists it: names, shapes, types and order."""
    prompts, model = adapted.prompts, adapted.model
    state = {"prompt_learner.ctx": prompts.ctx.half()}
    words = model.token_embedding(adapted.tokenize(["a photo of a cat."] * classes)).half()
    state["prompt_learner.token_prefix"] = words[:, :1]
    state["prompt_learner.token_suffix"] = words[:, 1 + len(prompts.ctx) :]
    state |= {f"{DEEP}{i}": p.float() for i, p in enumerate(prompts.compound_prompts_text)}
    state |= {f"prompt_learner.proj.{k}": v.half() for k, v in prompts.proj.state_dict().items()}
    for i, linear in enumerate(prompts.compound_prompt_projections):
        for key, value in linear.state_dict().items():
            state[f"prompt_learner.compound_prompt_projections.{i}.{key}"] = value.float()
    for key, value in model.state_dict().items():
        # convert_weights halves what multiplies; norms, embeddings and positions stay as they are
        value = value.half() if value.ndim == 2 or "conv1" in key or "attn" in key else value
        if key == "logit_scale":
            state[key] = value
        elif key.startswith("visual."):
            state["image_encoder." + key.removeprefix("visual.")] = value
        elif key != "token_embedding.weight":
            state["text_encoder." + key] = value
    return {key: value.detach().clone() for key, value in state.items()}


def save_official(path, state, epoch=5):
    learned = [torch.nn.Parameter(v.float()) for k, v in state.items() if k.startswith("prompt_learner.c")]
    optimizer = torch.optim.SGD(learned, lr=0.0035, momentum=0.9, weight_decay=5e-4)
    for parameter in learned:
        parameter.grad = torch.ones_like(parameter)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epoch)
    scheduler = ConstantWarmupScheduler(optimizer, cosine)
    optimizer.step()
    content = {
        "state_dict": state,
        "epoch": epoch,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "val_result": None,
    }
    torch.save(content, path)
    return path


def scrambled(plain, depth, **fields):
    adapted = adapt(plain, PromptConfig(depth=depth, **fields), seed=1)
    torch.manual_seed(5)
    for parameter in adapted.prompts.parameters():
        parameter.data.normal_(std=0.1)
    return adapted


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "layers": 4, "width": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 4}
    clip = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    return Backbone(clip, 1, name="small", tokenizer=lambda: tokenizer)


@pytest.fixture(scope="module")
def maple(plain):
    return scrambled(plain, 3)


@pytest.fixture(scope="module")
def state(maple):
    return official_state(maple)


def test_prompts_come_back_as_they_were(plain, tmp_path):
    for number, (method, depth) in enumerate((("maple", 3), ("maple", 1), ("coop", 1), ("vpt", 4))):
        folder = tmp_path / str(number)
        adapted = scrambled(plain, depth, method=method, n_ctx=2, context="a sketch of a")
        save_prompts(folder, adapted, NAMES, 4, "abc")
        again = load_prompts(folder, plain.at_block(3))
        assert again.block == 3
        assert again.at_block(1).fingerprint() == adapted.fingerprint()
        assert torch.equal(again.class_weights(NAMES), adapted.class_weights(NAMES))
        card = read_card(folder)
        assert card.config == adapted.prompts.config
        assert (card.classnames, card.seed, card.source) == (NAMES, 4, "abc")
        assert card.backbone == plain.at_block(0).fingerprint()
        keys = load_file(folder / "prompts.safetensors").keys()
        assert keys == adapted.prompts.state_dict().keys()


def test_our_files_are_refused_where_they_do_not_fit(plain, maple, tmp_path):
    save_prompts(tmp_path, maple, NAMES, 1, "abc")
    with pytest.raises(PatchSAEError, match="were not learned on this tiny"):
        load_prompts(tmp_path, tiny_backbone())
    weights, whole = tmp_path / "prompts.safetensors", load_file(tmp_path / "prompts.safetensors")
    for change, sentence in (
        ({"ctx": None}, r"ctx is absent in the file and should be \[2, 24\]"),
        ({"extra": torch.ones(1)}, r"extra is \[1\] in the file and should be absent"),
        ({"ctx": torch.ones(3, 24)}, r"ctx is \[3, 24\] in the file and should be \[2, 24\]"),
        ({"proj.bias": torch.full((32,), torch.nan)}, "NaN or infinite values in proj.bias"),
    ):
        tensors = {key: value for key, value in (whole | change).items() if value is not None}
        save_file(tensors, weights)
        with pytest.raises(PatchSAEError, match=sentence):
            load_prompts(tmp_path, plain)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(PatchSAEError, match=r"prompts.safetensors cannot be read"):
        load_prompts(tmp_path, plain)
    card = tmp_path / "prompts.json"
    card.write_text(card.read_text().replace('"depth": 3', '"deep": 3'))
    with pytest.raises(PatchSAEError, match="is no card of prompts.*depth"):
        load_prompts(tmp_path, plain)
    with pytest.raises(PatchSAEError, match="is no card of prompts.*No such file"):
        load_prompts(tmp_path / "nowhere", plain)


def test_an_official_file_gives_the_prompts_in_it(plain, maple, state, tmp_path):
    path = save_official(tmp_path / "model.pth.tar-5", state)
    found = load_official(path, plain)
    own = maple.prompts.state_dict()
    assert found.prompts.config == PromptConfig(depth=3)
    for key, value in found.prompts.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state["prompt_learner." + key].float())
        torch.testing.assert_close(value, own[key], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.class_weights(NAMES), maple.class_weights(NAMES), rtol=0, atol=1e-3)
    assert load_official(path, plain, depth=3).fingerprint() == found.fingerprint()


def test_half_precision_backbones_recognise_their_own_file(plain, state, tmp_path):
    path = save_official(tmp_path / "model.pth.tar-5", state)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(plain)
        half.model.to(dtype)
        assert load_official(path, half).dtype == dtype


def test_an_official_file_of_another_depth_is_refused(plain, state, tmp_path):
    path = save_official(tmp_path / "model.pth.tar-2", state)
    with pytest.raises(PatchSAEError, match=rf"has depth 3 \({DEEP}1\), not 9: ask for depth=3"):
        load_official(path, plain, depth=9)
    deeper = official_state(scrambled(plain, 4)) | {f"{DEEP}7": state[f"{DEEP}0"]}
    with pytest.raises(PatchSAEError, match="depth=9 is more than the 4 blocks"):
        load_official(save_official(path, deeper), plain)


@pytest.mark.parametrize("key", [
    "prompt_learner.ctx", "prompt_learner.proj.weight", f"{DEEP}0", "prompt_learner.token_prefix",
    "prompt_learner.token_suffix", "prompt_learner.compound_prompt_projections.1.bias",
    "image_encoder.proj", "image_encoder.transformer.resblocks.2.mlp.c_fc.weight",
    "text_encoder.positional_embedding", "text_encoder.text_projection", "logit_scale",
])  # fmt: skip
def test_every_key_counts(plain, state, tmp_path, key):
    path = tmp_path / "model.pth.tar-5"
    missing = {k: v for k, v in state.items() if k != key}
    with pytest.raises(PatchSAEError, match=rf"{key}( is absent in the file|: give)"):
        load_official(save_official(path, missing), plain)
    renamed = {k.replace(key, "module." + key): v for k, v in state.items()}
    with pytest.raises(PatchSAEError, match=key):
        load_official(save_official(path, renamed), plain)
    other = state | {key: torch.zeros(5, 7)}
    with pytest.raises(PatchSAEError, match=rf"{key} is \[5, 7\] in the file and should be"):
        load_official(save_official(path, other), plain)


# as docs/RUN.md of MaPLe's repository lists them
PUBLISHED = (
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft",
    "sun397", "dtd", "eurosat", "ucf101",
)  # fmt: skip


@pytest.mark.parametrize("name, theirs", [*zip(BENCHMARKS, PUBLISHED, strict=True)])
def test_published_files_are_found_under_their_name_and_ours(plain, maple, state, tmp_path, name, theirs):
    with pytest.raises(MissingPrompts, match=rf"for '{name}' with seed 2.*{theirs}/base/seed2/Multi"):
        find_prompts(tmp_path, name, plain, seed=2)
    for folder in {theirs, name}:
        learner = tmp_path / f"at {folder}" / folder / "base/seed2/MultiModalPromptLearner"
        learner.mkdir(parents=True)
        save_official(learner / "model.pth.tar-5", state)
        assert find_prompts(tmp_path / f"at {folder}", name, plain, seed=2).prompts.config.depth == 3
    save_prompts(prompts_folder(tmp_path, name, 2), maple, NAMES, 2, "abc")
    assert find_prompts(tmp_path, name, plain, seed=2).fingerprint() == maple.fingerprint()


def test_damaged_prompts_are_not_missing(plain, maple, tmp_path):
    folder = prompts_folder(tmp_path, "dtd", 1)
    save_prompts(folder, maple, NAMES, 1, "abc")
    for damage in (lambda: (folder / "prompts.safetensors").write_bytes(b"x"),
                   (folder / "prompts.json").unlink):  # fmt: skip
        damage()
        with pytest.raises(PatchSAEError) as found:
            find_prompts(tmp_path, "dtd", plain)
        assert not isinstance(found.value, MissingPrompts) and str(folder) in str(found.value)
    learner = tmp_path / "eurosat/base/seed1/MultiModalPromptLearner"
    learner.mkdir(parents=True)
    (learner / "model.pth.tar-5").write_bytes(b"half a file")
    with pytest.raises(PatchSAEError) as found:
        find_prompts(tmp_path, "eurosat", plain)
    assert not isinstance(found.value, MissingPrompts)


@pytest.mark.parametrize("key", ["ctx", "token_prefix", "token_suffix", "proj.bias"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 24)])
def test_tensors_of_no_length_are_named(plain, state, tmp_path, key, shape):
    other = state | {f"prompt_learner.{key}": torch.zeros(shape)}
    with pytest.raises(
        PatchSAEError, match=rf"prompt_learner.{key} is \[{', '.join(map(str, shape))}\] in"
    ):
        load_official(save_official(tmp_path / "model.pth.tar-5", other), plain)


def test_keys_too_many_are_refused(plain, state, tmp_path):
    path = tmp_path / "model.pth.tar-5"
    for extra in ("prompt_learner.extra", "text_encoder.token_embedding.weight", f"{DEEP}2"):
        with pytest.raises(PatchSAEError, match=extra.replace(f"{DEEP}2", "compound_prompt_projections.2")):
            load_official(save_official(path, state | {extra: torch.zeros(2, 24)}), plain)


@pytest.mark.parametrize("key", [
    "image_encoder.class_embedding", "image_encoder.transformer.resblocks.3.ln_2.bias",
    "text_encoder.ln_final.weight", "logit_scale", "prompt_learner.token_prefix",
])  # fmt: skip
def test_another_clip_is_refused(plain, state, tmp_path, key):
    other = state | {key: state[key] + 0.01}
    with pytest.raises(PatchSAEError, match=f"was trained on another CLIP than small: {key} differs"):
        load_official(save_official(tmp_path / "model.pth.tar-5", other), plain)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_malicious_file_does_not_run(plain, state, tmp_path):
    path, marker = tmp_path / "model.pth.tar-5", tmp_path / "ran"
    for content in (
        {"state_dict": state, "scheduler": Evil(marker)},
        {"state_dict": state | {"prompt_learner.ctx": Evil(marker)}},
        Evil(marker),
    ):
        torch.save(content, path)
        with pytest.raises(PatchSAEError, match="would call|cannot be read safely|can be read safely"):
            load_official(path, plain)
        assert not marker.exists()


def test_what_is_no_checkpoint_of_maple_is_refused(plain, state, tmp_path):
    path = tmp_path / "model.pth.tar-5"
    with pytest.raises(PatchSAEError, match="There is no file .*model.pth.tar-5"):
        load_official(path, plain)
    for content, sentence in (
        (state, "has no 'state_dict'"),
        ([1], "has no 'state_dict'"),
        ({"state_dict": {"prompt_learner.ctx": 3}}, "holds no weights at 'prompt_learner.ctx'"),
        ({"state_dict": {}}, "lacks prompt_learner.ctx"),
    ):
        torch.save(content, path)
        with pytest.raises(PatchSAEError, match=sentence):
            load_official(path, plain)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(PatchSAEError, match="cannot be read|can be read safely"):
        load_official(path, plain)


def test_full_size_official_files(tmp_path):
    torch.manual_seed(0)
    plain = load_backbone("ViT-B-16-quickgelu", block=11)
    for depth, epoch in ((9, 5), (3, 2)):
        adapted = AdaptedBackbone(plain, Prompts(PromptConfig(depth=depth), 512, 768, seed=2))
        state = official_state(adapted, classes=50)
        shapes = {key: list(value.shape) for key, value in state.items()}
        assert shapes["prompt_learner.token_suffix"] == [50, 74, 512]
        assert shapes["image_encoder.positional_embedding"] == [197, 768]
        assert shapes[f"prompt_learner.compound_prompt_projections.{depth - 2}.weight"] == [768, 512]
        path = save_official(tmp_path / f"model.pth.tar-{epoch}", state, epoch)
        found = load_official(path, plain, depth=depth)
        assert (found.n_tokens, found.prompts.config.depth) == (199, depth)
        for key, value in found.prompts.state_dict().items():
            assert torch.equal(value, state["prompt_learner." + key].float())
        path.unlink()
