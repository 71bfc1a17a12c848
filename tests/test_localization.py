"""Maps, soft masks and renderings against dense and pixel-by-pixel computations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_backbone, tiny_images

from patchsae.latents.maps import (
    Upsampling,
    covered_pixels,
    fired,
    image_means,
    latent_maps,
    masked_images,
    mass_inside,
    patch_cover,
    patch_tokens,
    render,
    soft_mask,
    upsample,
)
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, SAEConfig

B, P, D = 5, 12, 16


@pytest.fixture(scope="module", params=[{}, {"activation": "topk", "k": 3}], ids=["relu", "topk"])
def sae(request) -> SAE:
    sae = SAE(SAEConfig(d_in=D, expansion=4, **request.param), seed=2)
    with torch.no_grad():
        sae.b_enc -= 1.2
        sae.b_enc[7] = -1e3  # a dead latent
    return sae


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    x = torch.randn(B, P, D, generator=torch.Generator().manual_seed(0))
    x[2] = 0  # an image that leaves most latents silent
    return x


@torch.no_grad()
def test_rows_hold_every_active_entry_and_no_other(sae, x):
    dense, found = sae.encode(x).numpy(), fired(sae, x)
    rebuilt = np.zeros_like(dense)
    row = np.repeat(np.arange(len(found.image)), np.diff(found.start))
    rebuilt[found.image[row], found.patch, found.latent[row]] = found.value
    np.testing.assert_allclose(rebuilt, dense, rtol=1e-5, atol=1e-6)
    pairs = list(zip(found.latent, found.image, strict=True))
    assert pairs == sorted(set(pairs)) and len(pairs) == (dense.max(1) > 0).sum()
    assert 7 not in found.latent
    assert all((np.diff(patches) > 0).all() for patches in np.split(found.patch, found.start[1:-1]))


@torch.no_grad()
def test_maps_of_chosen_latents_equal_the_dense_encoding(sae, x):
    wanted = [9, 7, 0, 9]
    maps = latent_maps(sae, x, wanted)
    assert maps.shape == (B, 4, P) and not maps[:, 1].any()
    np.testing.assert_allclose(maps, sae.encode(x)[..., wanted].transpose(1, 2), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_image_means_equal_the_dense_ones(sae, x):
    found = image_means(fired(sae, x), B, P, sae.d_sae)
    np.testing.assert_allclose(found, sae.encode(x).mean(1), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_masked_images_multiply_each_patch_by_its_activation():
    backbone, images = tiny_backbone(), tiny_images().load(range(3)).images
    sae = SAE(SAEConfig(d_in=32, expansion=2))
    tokens = patch_tokens(backbone, images)
    assert tokens.shape == (3, 49, 32)
    f = sae.encode(tokens)[..., 5]
    shown = masked_images(sae, backbone, images, 5)
    for image, picture, row in zip(images, shown, f, strict=True):
        weight = (row / f.max()).view(7, 7).repeat_interleave(16, 0).repeat_interleave(16, 1)
        expected = (image.permute(1, 2, 0) * weight[..., None]).numpy()
        np.testing.assert_allclose(picture, expected, atol=0.51)


def test_a_silent_sae_has_no_rows(x):
    sae = SAE(SAEConfig(d_in=D, expansion=2))
    with torch.no_grad():
        sae.b_enc -= 1e3
    found = fired(sae, x)
    assert len(found.image) == 0 and found.start.tolist() == [0]
    assert not latent_maps(sae, x, [0, 1]).any() and not image_means(found, B, P, sae.d_sae).any()


@pytest.mark.parametrize(("size", "grid"), [(112, (14, 14)), (50, (3, 7)), (9, (9, 9))])
def test_enlarging_is_torchs(size, grid):
    patch_map = torch.rand(grid[0] * grid[1], generator=torch.Generator().manual_seed(1))
    table = patch_map.view(1, 1, *grid)
    near = F.interpolate(table, (size, size), mode="nearest")[0, 0]
    smooth = F.interpolate(table, (size, size), mode="bilinear")[0, 0]
    np.testing.assert_array_equal(upsample(patch_map, grid, size), near)
    np.testing.assert_array_equal(upsample(patch_map, grid, size, Upsampling.BILINEAR), smooth)


def test_soft_masks_lie_between_0_and_1():
    patch_map = torch.tensor([0.0, 1.0, 4.0, 2.0])
    for mode in Upsampling:
        mask = soft_mask(patch_map, (2, 2), 8, mode)
        assert mask.shape == (8, 8) and mask.min() == 0 and mask.max() == 1
    assert soft_mask(patch_map, (2, 2), 8, peak=8.0).max() == 0.5
    assert soft_mask(patch_map, (2, 2), 8, peak=2.0)[7, 7] == 1  # stronger than the peak is no more than 1
    assert not soft_mask(torch.zeros(4), (2, 2), 8).any()


def test_renderings():
    image = np.full((8, 8, 3), 200, np.uint8)
    mask = soft_mask(torch.tensor([0.0, 1.0, 4.0, 2.0]), (2, 2), 8)
    shown = render(image, mask)
    assert shown.dtype == np.uint8
    assert [shown[0, 0, 0], shown[0, 7, 1], shown[7, 0, 2], shown[7, 7, 0]] == [0, 50, 200, 100]


@pytest.mark.parametrize(("height", "width", "grid"), [(8, 8, (2, 2)), (11, 13, (3, 4))])
def test_cover_counts_the_pixels_of_each_patch(height, width, grid):
    masks = torch.rand(3, height, width, generator=torch.Generator().manual_seed(2)) < 0.4
    count, size = np.zeros((3, *grid)), np.zeros(grid)
    for y in range(height):
        for x in range(width):
            cell = y * grid[0] // height, x * grid[1] // width
            count[(slice(None), *cell)] += masks[:, y, x].numpy()
            size[cell] += 1
    np.testing.assert_array_equal(covered_pixels(masks, grid), count.reshape(3, -1))
    np.testing.assert_allclose(patch_cover(masks, grid), (count / size).reshape(3, -1), rtol=1e-6)


@torch.no_grad()
def test_mass_inside_splits_by_the_mask(sae, x):
    cover = torch.rand(B, P, generator=torch.Generator().manual_seed(3))
    cover[1] = 0
    f = sae.encode(x).double()  # [B, P, S]
    found = mass_inside(fired(sae, x), cover, sae.d_sae)
    np.testing.assert_allclose(found.total, f.sum((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found.inside, torch.einsum("bps,bp->s", f, cover.double()), rtol=1e-5)
    np.testing.assert_allclose(found.expected, cover.double().mean(1) @ f.sum(1), rtol=1e-5)
    assert found.total[7] == 0


def test_bad_requests_are_named(sae, x):
    with pytest.raises(PatchSAEError, match="latents must lie in 0..63; got 3..64"):
        latent_maps(sae, x, [3, 64])
    with pytest.raises(PatchSAEError, match="13 values does not fit 3×4 patches; leave out"):
        upsample(torch.zeros(13), (3, 4), 12)
