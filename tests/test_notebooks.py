"""The notebooks themselves, executed by the runner at a small size of each scale."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from patchsae.errors import PatchSAEError
from patchsae.run import check_parameters, run_notebook
from patchsae.stage import project_root

NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))


def text_of(notebook: Path) -> str:
    """Join everything the cells printed or displayed as text."""
    outputs = [out for cell in nbformat.read(notebook, 4).cells for out in cell.get("outputs", ())]
    data = [out.get("data", {}) for out in outputs]
    shown = [d.get("text/markdown") or d.get("text/plain", "") for d in data]
    return "\n".join([out.get("text", "") for out in outputs] + shown)


def figures_of(notebook: Path) -> int:
    outputs = [out for cell in nbformat.read(notebook, 4).cells for out in cell.get("outputs", ())]
    return sum("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs_and_with_parameters(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert not any(cell.get("outputs") for cell in cells)
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in cells) == 1
    with pytest.raises(PatchSAEError, match="has no parameter 'sead'.*'seed'"):
        check_parameters(notebook, {"sead": "1"})
    with pytest.raises(PatchSAEError, match="'seed'.*takes int.*'many'"):
        check_parameters(notebook, {"seed": "many"})


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """Make a folder of exactly ImageNet's layout: 1000 folders of wnids, two images in each of val."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, images in (("train", 1), ("val", 2)):
        for label in range(1000):
            folder = root / "imagenet" / "images" / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{label}_{number}.JPEG")
    return root


def test_the_chapters_at_the_embedded_scale(tmp_path):
    small = {"images": 1024, "expansion": 4, "results": str(tmp_path / "results")}
    first = tmp_path / "01.ipynb"
    run_notebook(
        project_root() / "notebooks" / "01_training.ipynb", first,
        small | {"test_images": 32, "benchmark_images": 8, "ghost_images": 128},
    )  # fmt: skip
    shown = text_of(first)
    assert "512 latents on 128 dimensions, 201,728 tokens seen" in shown
    kept = re.search(r"All concepts\*\*: ([\d.]+) % .* ([\d.]+) % through the SAE", " ".join(shown.split()))
    assert 0 <= float(kept[2]) <= 100 and float(kept[1]) > 10
    assert "CLS reconstructed by the SAE" in shown and "paper: −0.077" in shown
    assert figures_of(first) == 4
    second = tmp_path / "02.ipynb"
    run_notebook(
        project_root() / "notebooks" / "02_statistics.ipynb", second,
        small | {"atlas_images": 200, "mask_images": 32, "dataset_images": 12},
    )  # fmt: skip
    shown = text_of(second)
    assert "200 images, 39,400 tokens" in shown and "activation mass inside objects" in shown
    assert figures_of(second) >= 7  # and one for each latent that is at home in five data sets
    assert "application/vnd.jupyter.widget" not in first.read_text() + second.read_text()
    # the SAE of the first notebook was found, not trained again
    assert len(list((tmp_path / "results").glob("sae-*"))) == 1
    third = tmp_path / "03.ipynb"
    run_notebook(
        project_root() / "notebooks" / "03_localization.ipynb", third,
        small | {
            "atlas_images": 200, "classes": 6, "class_images": 4, "blocks": [2, 11], "block_images": 64,
            "block_atlas_images": 40, "words": 6, "word_images": 4,
        },
    )  # fmt: skip
    shown = text_of(third)
    assert "scenes of 6 classes scored" in shown and "left out" in shown
    assert "best latent of the class" in shown and "AP, difference [95 %]" in shown
    assert "Shared among the ten strongest latents" in shown and "expected if words and things" in shown
    assert figures_of(third) >= 5
    # and the SAE and atlas of the notebooks before, beside two small SAEs
    assert len(list((tmp_path / "results").glob("sae-*"))) == 3


def test_statistics_and_localization_at_the_paper_scale(tmp_path, imagenet):
    """Full-size random ViT-B/16."""
    out = tmp_path / "02.ipynb"
    values = {
        "scale": "paper", "data": str(imagenet), "model": "ViT-B-16-quickgelu",
        "images": 16, "expansion": 1, "atlas_images": 24, "k": 2, "results": str(tmp_path / "results"),
    }  # fmt: skip
    run_notebook(project_root() / "notebooks" / "02_statistics.ipynb", out, values | {"dataset_images": 4})
    shown = text_of(out)
    assert "197 tokens × 768" in shown and "24 images, 4,728 tokens" in shown
    assert "has no object masks" in shown
    out = tmp_path / "03.ipynb"
    few = {"blocks": [2, 11], "block_images": 16, "block_atlas_images": 8, "words": 3, "word_images": 2}
    run_notebook(project_root() / "notebooks" / "03_localization.ipynb", out, values | few)
    shown = text_of(out)
    assert "has no object masks; these scores" in shown and "expected if words and things" in shown
    assert figures_of(out) >= 3


def test_a_folder_that_is_not_imagenet_is_named(tmp_path):
    from patchsae.backbone import load_backbone
    from patchsae.scales import scale

    backbone = load_backbone(str(project_root() / "artefacts" / "small_clip"), block=11)
    with pytest.raises(PatchSAEError, match="parameter data"):
        scale("paper").sets(backbone, "")
    with pytest.raises(PatchSAEError, match="imagenet/images/train"):
        scale("paper").sets(backbone, str(tmp_path))
    with pytest.raises(PatchSAEError, match="scale='huge'"):
        scale("huge")
