"""Vision transformers of timm, without text: cut exactly, framed as timm frames, from folder to page."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import patchsae as ps
from patchsae.clip.timm_models import TimmSource, find_timm
from patchsae.images.files import resize_and_crop
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.products import fast_float32
from patchsae.training.activations import Tokens, token_columns

# isort: split
import timm
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

KINDS = {  # one of each kind, random and small: kinds of token before the patches, side in patches
    "vit_small_patch14_dinov2": ({"img_size": 56, "depth": 3}, ["cls"], 4),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 42, "depth": 2}, ["cls", *["register"] * 4], 3),
    "vit_small_patch16_dinov3": ({"img_size": 64, "depth": 3}, ["cls", *["register"] * 4], 4),
    "vit_base_patch16_siglip_224": ({"img_size": 48, "depth": 2}, [], 3),
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 2}, ["cls"], 4),
    "vit_small_patch16_rope_mixed_224": ({"img_size": 48, "depth": 2}, ["cls"], 3),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 2}, ["cls", "register"], 2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders as timm itself writes them for the hub."""
    root, made = tmp_path_factory.mktemp("timm"), {}
    for name, (arguments, _, _) in KINDS.items():
        torch.manual_seed(len(made))
        model = timm.create_model(name, num_classes=0, **arguments).eval()
        save_for_hf(model, root / name, safe_serialization=True)
        made[name] = root / name, model
    return made


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_exact_and_framed_as_timm_frames(folders, name):
    (folder, model), (_, first, side) = folders[name], KINDS[name]
    clip = ps.load_clip(folder, block=1)
    assert clip.token_kind.tolist() == first + ["patch"] * side**2 and clip.grid == (side, side)
    assert not clip.has_text and clip.name == name and clip.d_model == model.embed_dim
    data = resolve_model_data_config(model) | {"input_size": (3, clip.image_size, clip.image_size)}
    theirs = create_transform(**data)
    for size in ((90, 61), (33, 80)):
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        ours = clip.normalize(resize_and_crop(picture, clip.frame)[None])
        torch.testing.assert_close(ours[0], theirs(picture), rtol=0, atol=1e-6)
    images = torch.randn(2, 3, clip.image_size, clip.image_size)
    with torch.no_grad():
        with fast_float32():
            whole = clip.model.encode_image(images)  # where weights lie in memory decides the last bit
        torch.testing.assert_close(whole, model(images), rtol=1e-5, atol=1e-5)
        for block, tokens in clip.residuals(images, range(clip.n_blocks + 1)).items():
            assert torch.equal(clip.at_block(block).finish(tokens), whole), block
    assert clip.embed_dim == whole.shape[1]


def test_registers_are_no_tokens_of_an_autoencoder(folders):
    clip = ps.load_clip(folders["vit_small_patch14_reg4_dinov2"][0], block=1)
    assert token_columns(clip, Tokens.ALL).tolist() == [0, *range(5, 14)]
    assert token_columns(clip, Tokens.PATCHES).tolist() == list(range(5, 14))
    siglip = ps.load_clip(folders["vit_base_patch16_siglip_224"][0], block=1)
    assert token_columns(siglip, Tokens.ALL).tolist() == list(range(9))
    with pytest.raises(PatchSAEError, match="tokens='cls' leaves none"):
        token_columns(siglip, Tokens.CLS)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_everything_but_zero_shot_works_without_text(folders, name, tmp_path):
    clip = ps.load_clip(folders[name][0], block=1)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    photos = ps.open_images(tmp_path / "photos", clip)
    with pytest.warns(UserWarning, match="hardly anything was learned"):
        lens = ps.train(clip, photos, tmp_path, progress=False, expansion=1, token_batch=32)
    found = ps.describe(lens, photos, tmp_path, progress=False)
    ps.show(found, int(found.atlas.image_frequency.values.argmax()))
    page = ps.explore(lens, photos, tmp_path, gallery=2, progress=False).save(tmp_path / "page.html")
    assert page.is_file()
    for ask in (lambda: clip.encode_text("a dog"), lambda: clip.logit_scale, lambda: clip.tokenize("a")):
        with pytest.raises(PatchSAEError, match="has no text, so it cannot be asked for classes"):
            ask()


def test_a_file_is_read_under_timms_own_names_and_a_wrong_one_is_refused(folders, tmp_path, monkeypatch):
    folder, model = folders["vit_small_patch14_dinov2"]
    arguments = KINDS["vit_small_patch14_dinov2"][0]
    monkeypatch.setattr(
        "patchsae.clip.files.find_timm",
        lambda name, file: TimmSource("own", "vit_small_patch14_dinov2", file, arguments=arguments),
    )
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "whole.pth")
    own = ps.load_clip("timm:own", tmp_path / "whole.pth", block=1)
    assert torch.equal(own.model.visual.trunk.norm.weight, model.norm.weight)
    deep = load_file(folder / "model.safetensors")
    more = {
        key.replace(".1.", ".9.", 1): v.clone() for key, v in deep.items() if key.startswith("blocks.1.")
    }
    deep |= more
    save_file(deep, tmp_path / "deep.safetensors")
    with pytest.raises(PatchSAEError, match="deep.safetensors does not fit own: it has blocks.9"):
        ps.load_clip("timm:own", tmp_path / "deep.safetensors", block=1)
    part = load_file(folder / "model.safetensors")
    del part["blocks.1.norm1.weight"], part["norm.bias"]
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(PatchSAEError, match=r"part.safetensors does not fit own: it lacks .* and 1 others"):
        ps.load_clip("timm:own", tmp_path / "part.safetensors", block=1)
    part["pos_embed"] = torch.zeros(1, 17, 7)
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(PatchSAEError, match=r"does not fit own \(RuntimeError"):
        ps.load_clip("timm:own", tmp_path / "part.safetensors", block=1)


def test_names_and_tags_are_those_of_timm():
    name = "vit_small_patch14_dinov2"
    for given in ((f"timm:{name}.lvd142m",), (f"timm:{name}", "lvd142m"), (f"timm:timm/{name}.lvd142m",)):
        source = find_timm(*given)
        assert source.hub == "timm/vit_small_patch14_dinov2.lvd142m" and source.has_weights
        assert source.name == f"{name}.lvd142m"
    assert not find_timm(f"timm:{name}").has_weights
    for given, match in (
        (("timm:vit_smal_patch14_dinov2",), "is no model of timm: is it 'timm:vit_small_patch14_dinov2'"),
        ((f"timm:{name}.nonsense",), "has no weights 'nonsense', only lvd142m"),
        ((f"timm:{name}", "nonsense"), "give a file or one of the tags lvd142m"),
        ((f"timm:{name}.lvd142m", "lvd142m"), "names its weights: drop pretrained"),
    ):
        with pytest.raises(PatchSAEError, match=match) as raised:
            find_timm(*given)
        assert "\n" not in str(raised.value)


def test_what_cannot_be_cut_is_one_sentence(tmp_path, folders):
    for name, pretrained in (("timm:resnet18", None), ("RN50", None), ("timm:beit_base_patch16_224", None)):
        with pytest.raises(PatchSAEError, match="has no stream of tokens to cut: choose a vision"):
            ps.load_clip(name, pretrained, block=1)
    folder = folders["vit_small_patch14_dinov2"][0]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {"depht": 2}}))
    with pytest.raises(PatchSAEError, match="has no model.safetensors"):
        ps.load_clip(tmp_path, block=1)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(PatchSAEError, match="cannot be built"):
        ps.load_clip(tmp_path, block=1)
    with pytest.raises(PatchSAEError, match="has its own weights: drop pretrained='openai'"):
        ps.load_clip(folder, "openai", block=1)
