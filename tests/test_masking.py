"""Masking sweeps against a model rerun for every mask, resumed, shared, and refused."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from tiny import tiny_backbone, tiny_images

from patchbook.scenes.embedded import SINGLE, SceneSet
from patchsae.clip.backbone import Backbone, zero_shot_logits, zero_shot_weights
from patchsae.latents.atlas import AtlasConfig, make_atlas
from patchsae.masking import sweep as masking
from patchsae.masking.masked_tokens import RELEASED_BIAS, Mode, bucket_tables, masked_tokens
from patchsae.masking.rankings import CLASS, PREDICTED, rankings
from patchsae.masking.sweep import Masker, MaskingConfig, all_sizes, curves, sweep
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.products import fast_float32
from patchsae.sae.cpu import by_token
from patchsae.sae.model import SAE, SAEConfig
from patchsae.sae.step import latent_lists
from patchsae.training.activations import Tokens

SIZES = (1, 3, 10, 128)
CONFIG = MaskingConfig(sizes=SIZES, random=2)


def tiny_sae(**config) -> SAE:
    sae = SAE(SAEConfig(d_in=32, expansion=4, **config), seed=1)
    sae.b_enc.data -= 0.5
    sae.b_dec.data += torch.linspace(-0.2, 0.3, 32)
    return sae


def scenes(per_class: int = 4) -> SceneSet:
    return SceneSet("masked", "test", range(0, 20, 2), (0, 1), per_class, SINGLE)


def atlas_of(root: Path, images=None, sae=None, backbone=None) -> xr.Dataset:
    images = images or tiny_images()
    config = AtlasConfig(k=2, empty_classes=True)
    return make_atlas(sae or tiny_sae(), backbone or tiny_backbone(), images, config, root, "tiny", 8,
                      progress=False)  # fmt: skip


@pytest.fixture(scope="module")
def atlas(tmp_path_factory) -> xr.Dataset:
    return atlas_of(tmp_path_factory.mktemp("atlas"))


@pytest.fixture(scope="module")
def text(backbone) -> torch.Tensor:
    return zero_shot_weights(backbone, scenes().classnames, "a picture of a {}")


def run(root: Path, atlas: xr.Dataset, config: MaskingConfig = CONFIG, **options) -> xr.Dataset:
    backbone = options.pop("backbone", None) or tiny_backbone()
    text = zero_shot_weights(backbone, scenes().classnames, "a picture of a {}")
    args = options.pop("images", scenes()), options.pop("text", text), options.pop("atlas", atlas)
    sae, sae_hash = options.pop("sae", None) or tiny_sae(), options.pop("sae_hash", "tiny")
    return sweep(sae, backbone, *args, config, root, sae_hash, batch_size=8, progress=False, **options)


@torch.no_grad()
def rerun(
    sae: SAE, backbone: Backbone, images, on: torch.Tensor, mode: Mode, tokens: Tokens
) -> torch.Tensor:
    """Embed images with a hook in open_clip's own forward pass; on [B, S] are the latents kept."""
    block, replaced = backbone.model.visual.transformer.resblocks[backbone.block - 1], backbone.token_kind

    def hook(module, inputs, output):
        f = sae.encode(output)
        x_hat = sae.decode(f * on[:, None], output)
        if mode == "add_error":
            x_hat = x_hat + output - sae.decode(f, output)
        if mode == "replace_bias":
            x_hat = x_hat + RELEASED_BIAS
        kinds = {"all": ("cls", "patch"), "cls": ("cls",), "patches": ("patch",)}[tokens]
        return torch.where(torch.from_numpy(np.isin(replaced, kinds))[:, None], x_hat, output)

    handle = block.register_forward_hook(hook)
    try:
        return backbone.model.encode_image(images)
    finally:
        handle.remove()


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
@pytest.mark.parametrize("mode", list(Mode))
def test_every_mask_equals_rerunning_the_whole_model(backbone, atlas, text, mode, tokens):
    images, sae = scenes(20), tiny_sae()  # 200 images
    config = MaskingConfig(sizes=SIZES, mode=mode, tokens=tokens, random=1)
    ranked = rankings(atlas, config.random)
    masker = Masker(sae, backbone, text, ranked, config)
    worst = 0.0
    for batch in images.batches(50):
        plain, masked = masker.logits(batch.images, batch.labels)
        pixels = backbone.normalize(batch.images)
        with torch.no_grad(), fast_float32():
            unmasked = zero_shot_logits(backbone, backbone.model.encode_image(pixels), text)
        assert plain.equal(unmasked)
        for g, ranking in enumerate(ranked):
            klass = {CLASS: batch.labels, PREDICTED: unmasked.argmax(-1)}.get(
                ranking.name, torch.zeros_like(batch.labels)
            )
            for j, k in enumerate(SIZES):
                on = torch.zeros(len(klass), sae.d_sae)
                on.scatter_(1, torch.from_numpy(ranking.order)[klass][:, :k], 1.0)
                for switch, mask in enumerate((on, 1 - on)):
                    expected = rerun(sae, backbone, pixels, mask, mode, tokens)
                    expected = zero_shot_logits(backbone, expected, text)
                    found = masked[:, g, switch, j]
                    worst = max(worst, (found - expected).abs().max().item())
                    assert found.argmax(-1).equal(expected.argmax(-1))
            if mode == "add_error":
                whole = masked[:, g, 0, -1]
                torch.testing.assert_close(
                    whole, unmasked, rtol=1e-5, atol=1e-5 * unmasked.abs().max().item()
                )
    assert worst < 1e-4


def test_with_the_error_added_all_on_is_the_original_to_the_last_bit(backbone):
    sae = tiny_sae()
    x = backbone.residual(backbone.normalize(scenes().load([0]).images))[0]
    lists = by_token(latent_lists(sae, x), len(x))
    order = np.random.default_rng(0).permutation(sae.d_sae)[None]
    found = masked_tokens(sae, x, lists, bucket_tables(order, SIZES), len(SIZES), Mode.ADD_ERROR)
    assert found.shape == (1, 2, 4, 50, 32) and found[0, 0, -1].equal(x)
    assert not found[0, 1, -1].equal(x)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("config", [{}, {"activation": "topk", "k": 9}, {"input_norm": "layer_norm"}],
                         ids=["relu", "topk", "layer_norm"])  # fmt: skip
@torch.no_grad()
def test_nested_reconstructions_equal_dense_ones_and_those_of_the_torch_path(mode, config):
    sae = tiny_sae(**config)
    x = torch.randn(13, 32, generator=torch.Generator().manual_seed(0)) * 2
    order = np.stack([np.random.default_rng(i).permutation(sae.d_sae) for i in range(3)])
    tables = bucket_tables(order, SIZES)
    lists = by_token(latent_lists(sae, x), len(x))
    found = masked_tokens(sae, x, lists, tables, len(SIZES), mode)
    f, x_hat = sae.encode(x), sae(x)
    for g in range(3):
        for j, k in enumerate(SIZES):
            on = torch.zeros(sae.d_sae)
            on[order[g, :k]] = 1
            for switch, mask in enumerate((on, 1 - on)):
                expected = sae.decode(f * mask, x)
                expected += {"add_error": x - x_hat, "replace_bias": RELEASED_BIAS, "replace": 0.0}[mode]
                torch.testing.assert_close(found[g, switch, j], expected, rtol=1e-4, atol=1e-5)
    if not config:
        base = (
            x if mode == "add_error" else sae.b_dec.expand_as(x) + RELEASED_BIAS * (mode == "replace_bias")
        )
        other = masking_nest(sae, base, lists, tables, mode)
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


def masking_nest(sae, base, lists, tables, mode):
    from patchsae.masking.masked_tokens import _nest

    return _nest(sae.W_dec, base, lists, tables, len(SIZES), mode == "add_error")


def test_a_sweep_keeps_ranks_and_predictions(tmp_path, backbone, atlas, text):
    result, images = run(tmp_path, atlas), scenes()
    assert dict(result.sizes) == {"image": 40, "ranking": 5, "switch": 2, "k": 4}
    batch = images.load(range(40))
    plain, masked = Masker(tiny_sae(), backbone, text, rankings(atlas, 2), CONFIG).logits(*batch[:2])
    np.testing.assert_array_equal(result.prediction, masked.argmax(-1))
    np.testing.assert_array_equal(result.original_prediction, plain.argmax(-1))
    order = (-masked).sort(dim=-1, stable=True).indices  # [N, G, 2, K, C]
    place = (order == batch.labels.view(-1, 1, 1, 1, 1)).int().argmax(-1)
    np.testing.assert_array_equal(result["rank"], place)
    expected = -masked.log_softmax(-1).gather(-1, batch.labels.view(-1, 1, 1, 1, 1).expand(*place.shape, 1))
    np.testing.assert_allclose(result.cross_entropy, expected[..., 0], rtol=1e-4)
    np.testing.assert_array_equal(result.label, images.labels)
    table = curves(result, draws=200)
    assert table.ranking.values.tolist() == [CLASS, PREDICTED, "dataset", "random"]
    right = result["rank"].values == 0
    np.testing.assert_allclose(table.accuracy.sel(ranking=CLASS), right[:, 0].mean(0))
    np.testing.assert_allclose(table.accuracy.sel(ranking="random"), right[:, 3:].mean((0, 1)))
    np.testing.assert_allclose(
        table.gain.sel(ranking="dataset"), right[:, 2].mean(0) - right[:, 3:].mean((0, 1)), atol=1e-12
    )
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
    # every latent on or off leaves nothing to choose: all rankings agree
    last = result.prediction.isel(k=-1)
    assert (last == last.isel(ranking=0)).all()


def test_the_true_and_the_predicted_class_differ_where_the_model_errs(tmp_path, atlas):
    result = run(tmp_path, atlas)
    right = (result.original_rank == 0).values
    assert 0 < right.sum() < 40
    pair = [result.cross_entropy.sel(ranking=name, switch="on").values for name in (CLASS, PREDICTED)]
    np.testing.assert_array_equal(pair[0][right], pair[1][right])
    assert (pair[0][~right, :3] != pair[1][~right, :3]).any()


def test_a_stopped_sweep_goes_on_and_a_finished_one_is_read(tmp_path, atlas, monkeypatch):
    monkeypatch.setattr(masking, "CHUNK_IMAGES", 16)
    whole = run(tmp_path / "whole", atlas)
    real, calls = Masker.logits, []

    def logits(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Masker, "logits", logits)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, atlas)
    (folder,) = tmp_path.glob("masking-masked-*")
    assert len(list(folder.glob("chunk-*"))) == 1 and not (folder / "manifest.json").exists()
    assert run(tmp_path, atlas).identical(whole)
    assert len(calls) == 4 + 3  # 40 images in batches of 8: two of them were saved
    assert not list(folder.glob("chunk-*"))
    monkeypatch.setattr(Masker, "logits", None)
    assert run(tmp_path, atlas).identical(whole)


def test_a_damaged_chunk_is_named(tmp_path, atlas, monkeypatch):
    monkeypatch.setattr(masking, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, atlas)
    monkeypatch.undo()
    (chunk,) = tmp_path.glob("masking-*/chunk-*")
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(PatchSAEError, match="chunk-00000000.safetensors' holds no part .* delete it"):
        run(tmp_path, atlas)


# what each of two processes does: a sweep in chunks of 16 images, noting the files that it wrote itself
SHARED = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_masking
from patchsae.masking import sweep as masking

root, write = Path(sys.argv[1]), masking.write_chunk

def note(path, *args):
    write(path, *args)
    with (root / f"rank-{{os.environ['RANK']}}").open("a") as notes:
        print(path.stem, file=notes)

masking.CHUNK_IMAGES, masking.write_chunk = 16, note
test_masking.run(root, test_masking.atlas_of(root))
"""


def test_two_processes_make_the_sweep_of_one(tmp_path, atlas, monkeypatch):
    whole = run(tmp_path / "one", atlas)
    script = tmp_path / "run.py"
    script.write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, script, tmp_path / "two"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "two").glob("masking-*/manifest.json"))) == 1
    written = [(tmp_path / "two" / f"rank-{rank}").read_text().split() for rank in range(2)]
    assert written == [["chunk-00000000", "chunk-00000032"], ["chunk-00000016"]]
    monkeypatch.setattr(masking, "_run", None)  # what is compared was made there
    assert run(tmp_path / "two", atlas).identical(whole)


def test_what_does_not_belong_together_is_refused_before_any_work(tmp_path, atlas, monkeypatch):
    monkeypatch.setattr(Masker, "logits", None)

    def refused(match: str, **options) -> None:
        with pytest.raises(PatchSAEError, match=match):
            run(tmp_path, options.pop("atlas", atlas), options.pop("config", CONFIG), **options)

    refused("was made with the SAE tiny, not other", sae_hash="other")
    trained_on = tiny_sae()
    trained_on.b_enc.data[3] += 1e-6
    refused("was made with other weights of tiny", sae=trained_on)
    refused("describes block 1, not 2", backbone=tiny_backbone().at_block(2))
    torch.manual_seed(5)
    other = tiny_backbone()
    other.model.visual.proj.data += 1
    refused("another backbone", backbone=other)
    names = [f"{name}?" if i == 3 else name for i, name in enumerate(atlas.klass.values)]
    refused(r"other class names \('.*\?' and", atlas=atlas.assign_coords(klass=names))
    refused("10 and 9 classes|9 and 10 classes", atlas=atlas.isel(klass=range(9)))
    empty = atlas.copy(deep=True)
    empty.class_images[4] = 0
    refused(
        f"class '{atlas.klass.values[4]}' .and 0 more. has no image in the atlas of 'tiny'", atlas=empty
    )
    refused("asks for 129 latents, but the SAE has 128", config=replace(CONFIG, sizes=(1, 129)))
    refused("text has 3 vectors", text=torch.ones(3, 16))
    shifted = scenes()
    shifted.labels = shifted.labels + 1
    refused("labels outside", images=shifted)
    assert not list(tmp_path.iterdir())
    for values, match in (
        ({"sizes": (5, 2)}, "must ascend"), ({"sizes": (0, 2)}, "from 1"),
        ({"mode": "swap"}, "mode='swap'"),
        ({"tokens": "some"}, "tokens='some'"), ({"random": -1}, "random=-1"),
    ):  # fmt: skip
        with pytest.raises(PatchSAEError, match=match):
            MaskingConfig(**values)


def test_sizes_end_with_all_latents():
    assert all_sizes((), 49_152) == (1, 2, 5, 10, 50, 100, 500, 1000, 2000, 49_152)
    assert all_sizes((), 64) == (1, 2, 5, 10, 50, 64)
    assert all_sizes((3, 7), 64) == all_sizes((3, 7, 64), 64) == (3, 7, 64)


def test_a_sweep_has_all_latents_on_and_off_without_being_asked(tmp_path, atlas):
    whole, short = (
        run(tmp_path / str(len(k)), atlas, replace(CONFIG, sizes=k)) for k in (SIZES, SIZES[:-1])
    )
    assert short.k.values.tolist() == list(SIZES) and short.identical(whole)


def test_weights_or_texts_that_are_not_finite_get_no_accuracy(tmp_path, atlas):
    sae = tiny_sae()
    sae.b_dec.data[0] = torch.nan
    with pytest.raises(PatchSAEError, match="has NaN or infinite values in b_dec"):
        run(tmp_path, atlas, sae=sae)
    text = torch.ones(10, 16)
    text[4, 2] = torch.nan
    with pytest.raises(PatchSAEError, match="what tiny answers has NaN or infinite values"):
        run(tmp_path, atlas, text=text)
    assert not list(tmp_path.glob("*/manifest.json"))


def test_chunks_of_fewer_images_are_no_sweep(tmp_path, atlas, monkeypatch):
    judge = masking._judge
    monkeypatch.setattr(masking, "_judge", lambda *a: {k: v[1:] for k, v in judge(*a).items()})
    with pytest.raises(PatchSAEError, match="hold 35 of the 40 images of 'masked'; delete that folder"):
        run(tmp_path, atlas)
    assert not list(tmp_path.glob("*/manifest.json"))
    with pytest.raises(PatchSAEError, match="batch_size=0 must be"):
        sweep(tiny_sae(), tiny_backbone(), scenes(), text, atlas, CONFIG, tmp_path, "tiny", batch_size=0)
