import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchsae.clip import backbone as library
from patchsae.clip.backbone import Backbone, load_backbone, zero_shot_logits, zero_shot_weights
from patchsae.clip.files import find_clip
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.products import fast_float32

# isort: split
import open_clip
from open_clip.model import convert_weights_to_fp16
from open_clip.transformer import Transformer
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
SMALL_CLIP = ROOT / "artefacts" / "small_clip"
MERGES = 200

SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 112, "patch_size": 8, "width": 64, "layers": 12, "head_width": 32,
    },
    "text_cfg": {
        "context_length": 20, "vocab_size": 512 + MERGES + 2, "width": 64, "heads": 2, "layers": 2,
    },
}  # fmt: skip


def small_model(seed=0, **vision) -> nn.Module:
    torch.manual_seed(seed)
    return open_clip.CLIP(**{**SMALL, "vision_cfg": {**SMALL["vision_cfg"], **vision}})


@pytest.fixture
def small() -> Backbone:
    return Backbone(small_model(), 11, name="small")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder as `make clip` writes it: fp16 weights and a shortened vocabulary."""
    place = tmp_path / "tiny_clip"
    place.mkdir()
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    config = {"model_cfg": SMALL, "preprocess_cfg": preprocess}
    (place / "open_clip_config.json").write_text(json.dumps(config))
    state = {key: value.half().contiguous() for key, value in small_model().state_dict().items()}
    save_file(state, place / "open_clip_model.safetensors")
    whole = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.open(whole, "rt", encoding="utf-8").read().split("\n")[: MERGES + 1]
    with gzip.open(place / "bpe_simple_vocab.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return place


def pictures(backbone: Backbone, n=2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 3, backbone.image_size, backbone.image_size), generator=generator)
    return backbone.normalize(images.to(torch.uint8))


@fast_float32()
def assert_exact(backbone: Backbone, blocks, n=2) -> None:
    images = pictures(backbone, n)
    with torch.no_grad():
        whole = backbone.model.encode_image(images, normalize=False)
        several = backbone.residuals(images, blocks)
        for block in blocks:
            cut = backbone.at_block(block)
            tokens = cut.residual(images)
            assert tokens.shape == (n, backbone.n_tokens, backbone.d_model)
            assert torch.equal(cut.finish(tokens), whole), f"block {block}"
            assert torch.equal(cut(images), whole)
            assert torch.equal(several[block], tokens)
    assert whole.shape[-1] == backbone.embed_dim


# -- the cut --------------------------------------------------------------------------------------


def test_full_size_vit_is_exact():
    torch.manual_seed(0)
    backbone = load_backbone("ViT-B-16-quickgelu", block=11)
    assert (backbone.n_tokens, backbone.d_model, backbone.n_blocks) == (197, 768, 12)
    assert (backbone.grid, backbone.image_size, backbone.embed_dim) == ((14, 14), 224, 512)
    assert_exact(backbone, (0, 1, 6, 11, 12), n=1)


def test_siglip_is_exact_and_has_patches_only():
    torch.manual_seed(0)
    backbone = load_backbone("ViT-B-16-SigLIP", block=11)
    assert set(backbone.token_kind) == {"patch"} and backbone.n_tokens == 196
    assert backbone.logit_bias == -10 and backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    assert_exact(backbone, (0, 1, 6, 11, 12), n=1)


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"pool_type": "none"},
        {"attentional_pool": True, "attn_pooler_queries": 4},
        {"attentional_pool": "cascade", "attn_pooler_queries": 4, "width": 32},
        {"output_tokens": True, "no_ln_pre": True},
        {"patch_dropout": 0.5},
        {"qk_norm": True, "ls_init_value": 0.1},
    ],
    ids=str,
)
def test_every_kind_of_open_clip_tower_is_exact(vision):
    backbone = Backbone(small_model(**vision), 11)
    backbone.train()  # stays in eval mode
    if not vision.get("output_tokens"):
        return assert_exact(backbone, (0, 1, 6, 11, 12))
    images = pictures(backbone)
    with fast_float32():
        assert torch.equal(backbone(images), backbone.model.visual(images)[0])


def test_sequence_first_transformer_is_exact():
    model = small_model()
    blocks = Transformer(width=64, layers=12, heads=2, batch_first=False)
    model.visual.transformer = blocks
    assert_exact(Backbone(model, 3), (0, 1, 6, 11, 12))


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_half_precision_is_exact_and_keeps_the_scale(folder, dtype):
    backbone = load_backbone(folder, block=11, dtype=dtype)
    assert backbone.dtype in (torch.float16, torch.bfloat16)
    assert backbone.logit_scale == load_backbone(folder, block=11).logit_scale
    assert_exact(backbone, (0, 11))
    assert backbone.encode_text("a cat").dtype == backbone.dtype


def test_small_clip_of_the_repository_is_exact():
    if not (SMALL_CLIP / "open_clip_model.safetensors").is_file():
        pytest.skip("artefacts/small_clip has no weights yet (make clip)")
    backbone = load_backbone(SMALL_CLIP, block=11)
    assert_exact(backbone, (0, 1, 6, 11, 12))
    assert backbone.encode_text(["a red apple", "a dog"]).shape == (2, backbone.embed_dim)


def test_token_kinds_and_sizes(small):
    kinds = small.token_kind
    assert len(kinds) == small.n_tokens == 1 + 14 * 14
    assert kinds[0] == "cls" and (kinds[1:] == "patch").all() and isinstance(kinds, np.ndarray)


def test_cutting_elsewhere_shares_the_weights(small):
    other = small.at_block(np.int64(2))
    assert (other.block, small.block) == (2, 11)
    assert other.model is small.model
    assert not any(p.requires_grad for p in small.parameters())


def test_a_changed_token_changes_the_answer_and_carries_a_gradient(small):
    images = pictures(small)
    tokens = small.residual(images).requires_grad_()
    small.finish(tokens).sum().backward()
    assert tokens.grad.abs().sum() > 0
    with torch.no_grad():
        assert not torch.equal(small.finish(torch.zeros_like(tokens)), small(images))


def test_normalize_is_torchvisions(folder):
    from torchvision.transforms.functional import normalize, to_tensor

    backbone = load_backbone(folder, block=1)
    assert backbone.mean == (0.5, 0.4, 0.3) and backbone.std == (0.2, 0.2, 0.2)
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    expected = normalize(to_tensor(pixels), backbone.mean, backbone.std)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    assert torch.equal(backbone.normalize(images)[0], expected)


def test_fingerprint_follows_weights_block_name_and_activation(folder, tmp_path):
    one = load_backbone(folder, block=11)
    moved = tmp_path / "elsewhere" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    assert one.fingerprint() == load_backbone(moved, block=11).fingerprint()
    prints = [one.fingerprint(), one.at_block(10).fingerprint()]
    prints.append(Backbone(small_model(), 11).fingerprint())
    prints.append(Backbone(small_model(seed=1), 11).fingerprint())
    prints.append(Backbone(small_model(), 11, name="other").fingerprint())
    prints.append(Backbone(small_model(), 11, config={"quick_gelu": False}).fingerprint())
    with torch.no_grad():
        one.model.visual.proj[0, 0] += 1
    prints.append(one.fingerprint())
    prints.append(one.to(torch.bfloat16).fingerprint())
    assert len(set(prints)) == len(prints)


# -- files ----------------------------------------------------------------------------------------


@fast_float32()
def test_folder_gives_the_model_that_was_saved(folder):
    backbone = load_backbone(folder, block=11)
    reference = small_model().half().float().eval().requires_grad_(False)
    images = pictures(backbone)
    tokens = backbone.tokenize(["a photo of a cat", "dogs"])
    assert tokens.shape == (2, 20) and tokens.dtype == torch.long
    assert tokens.max() == SMALL["text_cfg"]["vocab_size"] - 1  # end of text
    with torch.no_grad():
        assert torch.equal(backbone(images), reference.encode_image(images))
        expected = reference.encode_text(tokens, normalize=True)
        assert torch.equal(backbone.encode_text(["a photo of a cat", "dogs"]), expected)
    assert backbone.name == folder.name and "block 11 of 12" in repr(backbone)
    assert_exact(backbone, (0, 1, 6, 11, 12))
    assert load_backbone(f"local-dir:{folder}", block=11).fingerprint() == backbone.fingerprint()


def openai_archive(model: nn.Module, path: Path) -> None:
    """Write a TorchScript archive with the keys, shapes and types of OpenAI's ViT-B-16.pt."""
    convert_weights_to_fp16(model)
    size = model.visual.image_size[0]
    numbers = {"input_resolution": size, "context_length": 77, "vocab_size": 49408}
    root = nn.Module()
    for key, value in {**model.state_dict(), **numbers}.items():
        *parents, leaf = key.split(".")
        place = root
        for name in parents:
            if name not in place._modules:
                place.add_module(name, nn.Module())
            place = place._modules[name]
        place.register_buffer(leaf, torch.as_tensor(value))
    torch.jit.save(torch.jit.script(root), str(path))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_openai_archive_loads_from_a_file(tmp_path):
    file = tmp_path / "ViT-B-16.pt"
    torch.manual_seed(3)
    direct = load_backbone("ViT-B-16-quickgelu", block=11)
    openai_archive(direct.model, file)
    stored = torch.jit.load(str(file)).state_dict()
    assert len(stored) == 305 and stored["visual.proj"].dtype == torch.float16
    assert stored["visual.positional_embedding"].shape == (197, 768)
    assert stored["token_embedding.weight"].shape == (49408, 512)
    del stored

    direct.float()
    loaded = load_backbone("ViT-B-16-quickgelu", file, block=11)
    assert loaded.fingerprint() == direct.fingerprint()
    images = pictures(direct, 1)
    with torch.no_grad():
        logits = [
            zero_shot_logits(b, b(images), b.encode_text(["a cat", "a dog"])) for b in (direct, loaded)
        ]
    assert torch.equal(*logits)
    with pytest.raises(PatchSAEError, match="wrong GELU: use the model ViT-B-16-quickgelu"):
        load_backbone("ViT-B-16", file, block=11)
    file.unlink()


def test_plain_state_dicts_and_safetensors_load(tmp_path):
    torch.manual_seed(4)
    direct = load_backbone("ViT-S-32-alt", block=2)
    state = direct.model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        loaded = load_backbone("ViT-S-32-alt", tmp_path / name, block=2)
        assert loaded.fingerprint() == direct.fingerprint()


def test_compat_declares_only_what_cannot_load():
    code = (
        "import patchsae.runs.compat as c, torchvision, torch;"
        "c.declare_torchvision_operators();"  # a second time: nothing to do
        "from torchvision import extension as e;"
        "assert hasattr(torch.ops.torchvision, 'nms');"
        "assert c._compiled_operators_load() == bool(e._has_ops())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "lib")


def test_torchs_compiler_is_loaded_when_it_is_asked_for():
    code = (
        "import sys, torch; real = torch.compiler.disable;"
        "import patchsae.clip.backbone, patchsae.clip.timm_models, torchvision;"
        "assert 'torch._dynamo' not in sys.modules;"
        "assert torch.compiler.disable is real;"
        "assert torchvision.ops.roi_align.__globals__['is_compile_supported']('cpu') in (True, False);"
        "assert sys.modules['torch._dynamo.utils'].__file__;"
        "double = torch.compile(lambda x: 2 * x, backend='eager');"
        "assert double(torch.ones(1)) == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "lib")


# -- zero-shot classification ---------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_zero_shot_weights_against_a_loop(folder, renormalize, batch_size):
    backbone = load_backbone(folder, block=11)
    names = ["cat", "dog", "brace {x}", "cat", "red apple"]
    templates = ["a photo of a {}.", "the {}", "many {} here"]
    rows = []
    for name in names:
        prompts = [backbone.encode_text(t.replace("{}", name), normalize=False) for t in templates]
        mean = sum(p[0] / p[0].norm() for p in prompts) / len(prompts)
        rows.append(mean / mean.norm() if renormalize else mean)
    ours = zero_shot_weights(backbone, names, templates, renormalize, batch_size=batch_size)
    torch.testing.assert_close(ours, torch.stack(rows), atol=1e-6, rtol=1e-5)
    assert torch.equal(ours[0], ours[3]) or batch_size == 5  # equal names: equal rows, both kept
    assert (ours.norm(dim=-1) < 0.9999).any() != renormalize

    embeddings = torch.randn(4, backbone.embed_dim)
    cosine = F.normalize(embeddings, dim=-1) @ ours.T
    logits = zero_shot_logits(backbone, 3 * embeddings, ours)
    torch.testing.assert_close(logits, backbone.logit_scale * cosine, atol=1e-5, rtol=1e-5)


def test_zero_shot_weights_are_open_clips(folder):
    backbone = load_backbone(folder, block=11)
    names, templates = ["cat", "dog"], library.OPENAI_IMAGENET_TEMPLATES
    theirs = open_clip.build_zero_shot_classifier(
        backbone.model, backbone.tokenize, names, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    ours = zero_shot_weights(backbone, names, templates, progress=True)
    torch.testing.assert_close(ours, theirs.T, atol=1e-6, rtol=1e-5)


def test_logit_bias_is_added():
    model = open_clip.CLIP(**SMALL, init_logit_bias=-10.0)
    backbone = Backbone(model, 11)
    eye = torch.eye(backbone.embed_dim)
    expected = backbone.logit_scale * eye - 10
    torch.testing.assert_close(zero_shot_logits(backbone, eye, eye), expected)


def test_openai_templates_are_strings():
    templates = library.OPENAI_IMAGENET_TEMPLATES
    assert len(templates) == 80 and all(t.count("{}") == 1 for t in templates)
    assert templates[0] == "a bad photo of a {}."


# -- bad input: one sentence with the remedy ------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        (13, "block 13 is outside 0..12 of small: count blocks from 1"),
        (-2, "block -2 is outside 0..12 of small"),
        ("11", "block is '11': give a whole number in 0..12"),
        (True, "block is True"),
        (1.0, "block is 1.0"),
    ],
)
def test_bad_block(small, block, sentence):
    for cut in (small.at_block, lambda b: small.residuals(pictures(small), [b])):
        with pytest.raises(PatchSAEError, match=sentence):
            cut(block)


def test_model_that_is_not_square():
    with pytest.raises(PatchSAEError, match="small takes 64×112 images: choose a square model"):
        Backbone(small_model(image_size=(64, 112)), 11, name="small")


def test_bad_shapes(small):
    with pytest.raises(PatchSAEError, match="takes .B, 3, 112, 112.: resize or crop"):
        small.residual(torch.zeros(1, 3, 224, 224))
    with pytest.raises(PatchSAEError, match="pass them through `normalize` first"):
        small.residual(torch.zeros(1, 3, 112, 112, dtype=torch.uint8))
    with pytest.raises(PatchSAEError, match="normalize takes uint8"):
        small.normalize(torch.zeros(1, 3, 112, 112))
    with pytest.raises(PatchSAEError, match="resize or crop"):
        small.normalize(torch.zeros(3, 112, 112, dtype=torch.uint8))
    with pytest.raises(PatchSAEError, match="takes .B, 197, 64.: pass every token"):
        small.finish(torch.zeros(1, 196, 64))
    with pytest.raises(PatchSAEError, match="small has no tokenizer"):
        small.tokenize("a cat")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "ViT-B16-quickgelu"}, "'ViT-B16-quickgelu' is neither .* is it .*ViT-B-16-quick"),
        ({"name": "vit-b-16-QuickGELU"}, "is it ViT-B-16-quickgelu"),
        ({"name": "xyzzy"}, "is it a name from open_clip.list_models"),
        ({"name": "no/such/folder"}, "There is no folder /.*no/such/folder: correct the path"),
        ({"name": "local-dir:nowhere/x"}, "There is no folder /.*nowhere/x"),
        ({"pretrained": "openia"}, "has no weights 'openia': .* tags openai, .*metaclip_400m"),
        ({"pretrained": "missing/w.pt"}, "no weights file /.*missing/w.pt: correct the path"),
        ({"pretrained": "w.safetensors"}, "There is no weights file"),
        ({"name": "RN50"}, "image tower of RN50 is a ModifiedResNet, .*choose a vision trans"),
        ({"name": "ViT-B-16", "pretrained": "openai"}, "wrong GELU: use the model ViT-B-16-quick"),
        ({"block": 13}, "block 13 is outside 0..12 of ViT-B-32-quickgelu"),
        ({"device": "nonsense"}, "device 'nonsense' is not available .*: use 'cpu'"),
        ({"dtype": "float17"}, "dtype 'float17' is unknown: use float32"),
        ({"dtype": torch.int8}, "dtype torch.int8 is unknown"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, sentence, monkeypatch):
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", pytest.fail)
    arguments = {"name": "ViT-B-32-quickgelu", "block": 11, **arguments}
    with pytest.raises(PatchSAEError, match=sentence) as caught:
        load_backbone(**arguments)
    assert "\n" not in str(caught.value)


def test_no_network(monkeypatch):
    def unreachable(entry):
        raise ConnectionError("name resolution failed\nmore")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", unreachable)
    sentence = "'openai' of ViT-B-32-quickgelu could not be fetched .*pass pretrained=<file>"
    with pytest.raises(PatchSAEError, match=sentence):
        load_backbone("ViT-B-32-quickgelu", "openai", block=11)


def spoil_folder(folder: Path, how: str) -> None:
    config, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    vocabulary = folder / "bpe_simple_vocab.txt.gz"
    if how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "not json":
        config.write_text("{")
    elif how == "unknown field":
        config.write_text(json.dumps({"model_cfg": {**SMALL, "wings": 2}}))
    elif how == "another width":
        config.write_text(json.dumps({"model_cfg": {**SMALL, "embed_dim": 48}}))
    elif how == "broken vocabulary":
        vocabulary.write_bytes(b"no gzip")
    elif how == "another vocabulary":
        with gzip.open(vocabulary, "wt", encoding="utf-8") as file:
            file.write("#version\nt h\nh e")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no weights", "tiny_clip has no open_clip_model.safetensors: correct the path"),
        ("no config", "tiny_clip has no open_clip_config.json: correct the path"),
        ("truncated weights", "open_clip_model.safetensors holds no weights that can be read"),
        ("not json", "tiny_clip/open_clip_config.json cannot be built .*: correct it"),
        ("unknown field", "open_clip_config.json cannot be built .*wings"),
        ("another width", r"does not fit tiny_clip: text_projection is \[64, 32\] in the file and"),
        ("broken vocabulary", "tokenizer of .*bpe_simple_vocab.txt.gz cannot be loaded"),
        ("another vocabulary", "bpe_simple_vocab.txt.gz has 516 entries, the model 714"),
    ],
)
def test_spoiled_folder(folder, how, sentence):
    spoil_folder(folder, how)
    with pytest.raises(PatchSAEError, match=sentence) as caught:
        load_backbone(folder, block=11).tokenize("a cat")
    assert "\n" not in str(caught.value)


def test_folder_beside_pretrained(folder):
    with pytest.raises(PatchSAEError, match="has its own weights: drop pretrained='openai'"):
        load_backbone(folder, "openai", block=11)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("bomb-went-off"),)


@pytest.mark.parametrize("content", ["bomb", "text", "empty", "other model"])
def test_file_that_holds_no_fitting_weights(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    file, sentence = tmp_path / "w.pt", "w.pt holds no weights that can be read safely"
    if content == "bomb":
        torch.save({"state_dict": Bomb()}, file)
    elif content == "other model":
        torch.save(small_model().state_dict(), file)
        sentence = r"w.pt does not fit ViT-S-32-alt: positional_embedding is \[20, 64\] in the file"
    else:
        file.write_text("hello" * (content == "text"))
    with pytest.raises(PatchSAEError, match=sentence):
        load_backbone("ViT-S-32-alt", file, block=2)
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize(
    ("classnames", "templates", "sentence"),
    [
        ([], ["a {}"], r"classnames is \[\]: give a list"),
        ("cat", ["a {}"], "classnames is 'cat': give a list"),
        (["cat"], [], "templates is empty"),
        (["cat"], ["a photo"], "template 'a photo' has no place for the class name"),
        (["cat"], [len], "has no place for the class name"),
    ],
)
def test_bad_class_names(small, classnames, templates, sentence):
    with pytest.raises(PatchSAEError, match=sentence):
        zero_shot_weights(small, classnames, templates)


@pytest.mark.parametrize("name", ["visual.proj", "visual.transformer.resblocks.3.ln_1.bias", "logit_scale"])
def test_one_number_that_is_not_finite_is_refused(folder, name):
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    state[name].view(-1)[0] = torch.nan
    save_file(state, file)
    with pytest.raises(PatchSAEError, match=f"{file} has NaN or infinite values in {name}: fetch it again"):
        load_backbone(folder, block=1)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model.", "visual"])
def test_what_wrappers_put_before_the_names_of_weights_is_removed(tmp_path, prefix):
    torch.manual_seed(4)
    direct = load_backbone("ViT-S-32-alt", block=2)
    state = direct.model.state_dict()
    if prefix == "visual":  # only the image tower was compiled
        names = {name: name.replace("visual.", "visual._orig_mod.") for name in state}
    else:
        names = {name: prefix + name for name in state}
    content = {"epoch": np.int64(3), "best": np.float64(71.2), "curve": np.zeros(3), "out": Path("runs")}
    torch.save(content | {"state_dict": {names[name]: w for name, w in state.items()}}, tmp_path / "w.pt")
    loaded = load_backbone("ViT-S-32-alt", tmp_path / "w.pt", block=2)
    assert loaded.fingerprint() == direct.fingerprint()


def test_the_layout_of_transformers_is_named(tmp_path):
    state = {
        "text_model.a": torch.zeros(1),
        "vision_model.b": torch.zeros(1),
        "logit_scale": torch.zeros(()),
    }
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(PatchSAEError, match="w.pt has the layout of transformers, not open_clip's: fetch"):
        load_backbone("ViT-S-32-alt", tmp_path / "w.pt", block=2)


def test_random_weights_are_said():
    with pytest.warns(UserWarning, match="ViT-S-32-alt has random weights"):
        load_backbone("ViT-S-32-alt", block=2)


def test_a_file_that_may_be_tuned_from_openais_is_asked_for_its_gelu(tmp_path, recwarn):
    torch.manual_seed(0)
    config = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "vocab_size": 49408}}
    for name, quick in (("Case-16", False), ("Case-16-quickgelu", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config | {"quick_gelu": quick}))
    open_clip.add_model_config(tmp_path)
    try:
        torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "tuned.pt")
        load_backbone("Case-16-quickgelu", tmp_path / "tuned.pt", block=1)
        assert not [str(w.message) for w in recwarn if "GELU" in str(w.message)]
        with pytest.warns(UserWarning, match="does not say which GELU .* use the model Case-16-quickgelu"):
            load_backbone("Case-16", tmp_path / "tuned.pt", block=1)
    finally:
        for name in ("Case-16", "Case-16-quickgelu"):
            open_clip.factory._MODEL_CONFIGS.pop(name, None)
        open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path)


@pytest.mark.parametrize("prefix", ["hf:", "hf-hub:"])
def test_a_model_of_the_hub_is_its_folder_under_its_own_name(folder, monkeypatch, prefix):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(folder))
    backbone = load_backbone(f"{prefix}laion/tiny", block=11)
    assert backbone.name == "laion/tiny" and backbone.tokenize("a cat").shape == (1, 20)
    own = load_backbone(folder, block=11).model.state_dict()
    assert all(torch.equal(w, own[name]) for name, w in backbone.model.state_dict().items())

    def unreachable(name, **options):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(PatchSAEError, match="'laion/tiny' could not be fetched from the Hugging Face hub"):
        load_backbone(f"{prefix}laion/tiny", block=11)


@pytest.mark.parametrize(("theirs", "ours"), [("ViT-L/14@336px", "ViT-L-14-336"), ("ViT-B/16", "ViT-B-16")])
def test_openais_own_names_are_known(theirs, ours):
    assert find_clip(theirs, "openai").name == ours
