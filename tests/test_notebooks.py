"""The notebooks themselves, executed by the runner at a small size of each scale."""

import ast
import json
import re
from pathlib import Path

import miniature
import nbformat
import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from test_prompt_files import official_state, save_official

from patchbook.chapters.published import TABLE_2
from patchbook.collecting import labels
from patchbook.lessons import lessons_of
from patchbook.parameters import check_parameters
from patchbook.run import run_notebook
from patchsae.adaptation.prompts import PromptConfig, adapt
from patchsae.clip.backbone import load_backbone
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root

DEFINING = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda
NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))


def text_of(notebook: Path) -> str:
    """Join everything the cells printed or displayed as text."""
    outputs = [out for cell in nbformat.read(notebook, 4).cells for out in cell.get("outputs", ())]
    data = [out.get("data", {}) for out in outputs]
    shown = [d.get("text/markdown") or d.get("text/plain", "") for d in data]
    return "\n".join([out.get("text", "") for out in outputs] + shown)


def pages_of(notebook: Path) -> str:
    """Join everything the cells displayed as a page."""
    outputs = [out for cell in nbformat.read(notebook, 4).cells for out in cell.get("outputs", ())]
    return "\n".join(out.get("data", {}).get("text/html", "") for out in outputs)


def targets(notebook: Path) -> list[str]:
    return labels(nbformat.read(notebook, 4))


def figures_of(notebook: Path) -> int:
    """Count the figures of an executed notebook, or of the page that was made of it."""
    outputs = [out for cell in nbformat.read(notebook, 4).cells for out in cell.get("outputs", ())]
    forms = [out.get("data", {}) for out in outputs]
    return sum(
        "image/png" in data or '<figure class="drawn"' in "".join(data.get("text/html", ""))
        for data in forms
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs_and_with_parameters(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert not any(cell.get("outputs") for cell in cells)
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in cells) == 1
    with pytest.raises(PatchSAEError, match="has no parameter 'sead'.*'seed'"):
        check_parameters(notebook, {"sead": "1"})
    with pytest.raises(PatchSAEError, match="'seed'.*takes int.*'many'"):
        check_parameters(notebook, {"seed": "many"})


LONGEST_CELL, LONGEST_NOTEBOOK = 20, 150
WORDS = 1700  # of prose; details are folded, and counted


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_for_reading(notebook):
    """What computes is in a room, what decides in patchbook.chapters: a cell calls, and defines nothing."""
    cells = nbformat.read(notebook, 4).cells
    code = [c for c in cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", ())]
    lengths = {cell.id: len(cell.source.splitlines()) for cell in code}
    assert max(lengths.values()) <= LONGEST_CELL, lengths
    every = sum(len(c.source.splitlines()) for c in cells if c.cell_type == "code")
    assert every <= LONGEST_NOTEBOOK
    for cell in code:
        defined = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, DEFINING)]
        assert not defined, f"{cell.id} defines something: move it to the library"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapters_open_with_a_title_and_end_with_a_section(notebook):
    cells = nbformat.read(notebook, 4).cells
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    # what was learned is put below the title, so that the title stands alone
    assert re.fullmatch(r"# \d\. .+\n\n\*Paper .+\*", cells[0].source)
    assert cells[-1].cell_type == "markdown"
    headings = re.findall(r"^#+ (.+)$", "\n".join(prose), flags=re.MULTILINE)
    assert headings[-1] in ("What remains open", "What this run says")
    assert sum(len(text.split()) for text in prose) <= WORDS
    terms = re.findall(r"{term}`(?:[^`<]*<)?([^`>]+)>?`", "\n".join(prose))
    assert len(terms) == len(set(terms)) > 4, "a term is linked once"


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


@pytest.fixture(scope="module")
def chapters(html) -> dict[str, Path]:
    """Return the executed notebooks of the book by name."""
    return {path.stem: path for path in (project_root() / "book" / "notebooks").glob("*.ipynb")}


def test_every_notebook_is_a_chapter_and_leaves_no_dead_widget(chapters):
    assert set(chapters) == {path.stem for path in NOTEBOOKS}
    for path in chapters.values():
        assert "application/vnd.jupyter.widget" not in path.read_text()


def test_every_chapter_opens_with_three_lessons_of_its_own(chapters):
    for path in (chapters[source.stem] for source in NOTEBOOKS):
        opening = nbformat.read(path, 4).cells[1]
        found = lessons_of(path)
        assert opening.source.startswith("## What we learned") and len(found) == 3
        assert [one.rank for one in found] == [1, 2, 3]
        assert all(one.text in opening.source and one.label in targets(path) for one in found)
        assert not re.search(r"\bnan\b|\{\}", opening.source)


COUNTED = re.compile(r"([\d,]+) images, ([\d,]+) tokens")
TABLE = re.compile(r"<table.*?</table>", flags=re.DOTALL)


def test_tables_have_captions_and_numbers_for_people(chapters):
    for path in (chapters[source.stem] for source in NOTEBOOKS if source.stem != "07_explorer"):
        found = TABLE.findall(pages_of(path))
        assert found
        for table in found:
            assert "<caption>" in table or "aria-label" in table, path
            cells = re.findall(r">([^<]+)<", table)
            wrong = [c for c in cells if re.search(r"\d\.\d{7,}|^-|\d{3}\.000|^[a-z]+_[a-z_]+$|\bnan\b", c)]
            assert not wrong, (path.stem, wrong[:5])


def test_all_chapters_describe_the_sae_of_the_first(chapters):
    names = {re.search(r"1,024 latents, from (sae-\w+)", text_of(path))[1]
             for name, path in chapters.items() if name not in ("01_training", "06_appendix")}  # fmt: skip
    assert len(names) == 1


def test_training_shows_what_is_kept(chapters):
    shown = text_of(chapters["01_training"])
    assert "1,024 latents on 128 dimensions" in shown
    kept = re.search(r"All concepts\*\*: ([\d.]+) % .* ([\d.]+) % through the SAE", " ".join(shown.split()))
    assert 0 <= float(kept[2]) <= 100 and float(kept[1]) > 10
    assert "CLS reconstructed by the SAE" in shown and "paper: −0.077" in shown
    assert figures_of(chapters["01_training"]) == 5


def test_statistics_counts_tokens_and_mass(chapters):
    shown = text_of(chapters["02_statistics"])
    images, tokens = (int(number.replace(",", "")) for number in COUNTED.search(shown).groups())
    assert images >= 200 and tokens == 197 * images and "activation mass inside objects" in shown
    # and one for each latent that is at home in five data sets
    assert figures_of(chapters["02_statistics"]) >= 7


def test_localization_scores_masks_against_controls(chapters):
    shown = text_of(chapters["03_localization"])
    assert re.search(r"scenes of \d+ classes scored", shown) and "left out" in shown
    assert "best latent of the class" in shown and "AP, difference" in shown
    assert "Shared among the ten strongest latents" in shown and "expected if words and things" in shown
    assert figures_of(chapters["03_localization"]) >= 5


def test_masking_compares_rankings_on_both_halves_of_all_data_sets(chapters):
    shown = text_of(chapters["04_masking"])
    assert "identity mask (all on)" in shown and "class (predicted)" in shown and "minus random" in shown
    assert "All latents on keep" in shown and "clear at k =" in shown
    assert shown.count("Silhouettes") >= 3 and "novel" in shown  # overview, base, novel
    assert figures_of(chapters["04_masking"]) >= 6


def test_adaptation_compares_both_models_on_all_data_sets(chapters):
    shown = text_of(chapters["05_adaptation"])
    assert "197 tokens × 128" in shown and "199 tokens × 128" in shown
    assert "through SAE" in shown and "membership" in shown and "low-to-high" in shown
    assert (
        shown.count("Silhouettes") >= 4 and "sd over seeds" in shown and "image tokens alone (VPT)" in shown
    )
    assert "LoRA − CLIP" in shown and "mapping − stream" in shown and "LoRA gains" in shown
    assert "if MaPLe ranks the latents" in shown
    assert "Beyond the paper" in shown and "Pairs never seen gain" in shown
    assert figures_of(chapters["05_adaptation"]) >= 10


def test_appendix_runs_every_row_of_table_2_and_matches_seeds(chapters):
    shown = text_of(chapters["06_appendix"])
    # on one backbone two rows of the table are the same run
    assert "14 rows, 13 different autoencoders" in shown
    for name in TABLE_2:
        assert name in shown
    assert (
        "17570.57" in shown
        and "go the paper's way" in shown
        and "at most 0 in 12 of 12 rows in the paper" in shown
    )
    assert "dimensions permuted" in shown and "two seeds match at" in shown
    assert "FVU of PCA at this L0" in shown and "goals are reached by every autoencoder" in shown
    assert figures_of(chapters["06_appendix"]) == 4


def test_statistics_at_the_paper_scale_and_full_size(tmp_path, imagenet):
    """Full-size random ViT-B/16."""
    out = tmp_path / "02.ipynb"
    values = {
        "scale": "paper", "data": str(imagenet), "model": "ViT-B-16-quickgelu", "images": 4,
        "expansion": 1, "atlas_images": 8, "k": 2, "dataset_images": 2,
        "results": str(tmp_path / "results"),
    }  # fmt: skip
    run_notebook(project_root() / "notebooks" / "02_statistics.ipynb", out, values)
    shown = text_of(out)
    assert "197 tokens × 768" in shown and "8 images, 1,576 tokens" in shown
    assert "has no object masks" in shown


VISION = {"image_size": 112, "patch_size": 16, "layers": 4, "width": 32, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> dict[str, str]:
    """Make data sets in the official layouts, a tiny CLIP, and MaPLe's files for it as published."""
    root = tmp_path_factory.mktemp("photographs")
    torch.manual_seed(0)
    clip = CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)
    folder = root / "tiny_clip"
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    # the published files hold the CLIP in half precision, and are refused where it is another one
    weights = {key: value.half().float() for key, value in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    backbone = load_backbone(str(folder), block=3)
    sketch = root / "data" / "imagenet-sketch" / "images"
    for wnid in miniature.WNIDS:
        for number in range(2):
            miniature.photo(sketch / wnid / f"sketch_{number}.JPEG")
    for number, name in enumerate(("imagenet", "eurosat", "dtd")):
        miniature.benchmark(root / "data", name)
        tuned = adapt(backbone, PromptConfig(depth=3), seed=number)
        learner = root / "maple" / name / "base" / "seed1" / "MultiModalPromptLearner"
        learner.mkdir(parents=True)
        save_official(learner / "model.pth.tar-5", official_state(tuned, 2))
    return {"model": str(folder), "data": str(root / "data"), "prompts": str(root / "maple")}


PAPER = {
    "02_statistics": {"atlas_images": 12, "k": 2, "dataset_images": 100},
    "03_localization": {
        "atlas_images": 12, "k": 2, "blocks": [1, 3], "block_images": 6, "block_atlas_images": 6,
        "words": 2, "word_images": 2,
    },
    "04_masking": {
        "rank_images": 0, "sizes": [1, 5, 128], "half_images": 0, "test_images": 0, "variant_images": 0,
        "random": 1, "references": 2,
    },
    "05_adaptation": {
        "rank_images": 0, "sizes": [1, 5, 128], "half_images": 0, "table_images": 0,
        "novel_images": 0, "k": 2,
        "own_sae_images": 6, "own_rank_images": 2, "own_atlas_images": 12,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_chapters_at_the_paper_scale(tmp_path, photographs, imagenet, name):
    """Everything but the sizes is official: layouts, split files, class names, templates, checkpoints."""
    results = {
        "scale": "paper",
        "block": 3,
        "images": 6,
        "expansion": 4,
        "results": str(tmp_path / "results"),
    }
    values = photographs | results | PAPER[name]
    if name != "05_adaptation":
        del values["prompts"]
    if name == "03_localization":  # it wants many short names
        values["data"] = str(imagenet)
    out = tmp_path / f"{name}.ipynb"
    run_notebook(project_root() / "notebooks" / f"{name}.ipynb", out, values)
    shown = text_of(out)
    assert "128 latents" in shown and "50 tokens × 32" in shown
    if name == "02_statistics":
        assert "12 images, 600 tokens" in shown and figures_of(out) >= 4
    if name == "03_localization":
        assert "has no object masks; these scores" in shown and "expected if words and things" in shown
    for title in ("ImageNet", "EuroSAT", "DTD") if name in ("04_masking", "05_adaptation") else ():
        assert title in shown
    if name == "05_adaptation":
        assert "52 tokens × 32" in shown  # with two learned ones
        assert "tiny_clip+maple" in shown and "Flowers" in shown and "paper: CLIP %" in shown
        assert "Nothing but MaPLe was found" in shown


@pytest.fixture(scope="module")
def two_clips(tmp_path_factory) -> dict[str, str]:
    """Make tiny CLIPs of the depth and patch size of ViT-B/16 and of ViT-L/14."""
    root, parts = tmp_path_factory.mktemp("clips"), {}
    towers = {"model": ("tiny_b16", 16, 12, 32), "large_model": ("tiny_l14", 14, 24, 48)}
    for part, (name, patch, layers, width) in towers.items():
        vision = VISION | {"patch_size": patch, "layers": layers, "width": width}
        torch.manual_seed(0)
        clip = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT)
        folder = root / name
        folder.mkdir()
        config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}}
        (folder / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": {}}))
        save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
        parts[part] = str(folder)
    return parts


def test_table_2_at_the_paper_scale_on_two_models(tmp_path, photographs, two_clips):
    """The printed factors; no cache; the large model at the block that the released code counts to."""
    values = {
        "scale": "paper", "data": photographs["data"], "large_block": 23, "expansion": 4, "images": 6,
        "row_images": 12, "cls_images": 24, "different_images": None, "test_images": 0,
        "atlas_images": 12, "contrast_images": 6, "match_latents": 100, "jobs": 1,
        "results": str(tmp_path / "results"),
    }  # fmt: skip
    out = tmp_path / "06.ipynb"
    run_notebook(project_root() / "notebooks" / "06_appendix.ipynb", out, values | two_clips)
    shown = " ".join(text_of(out).split())
    # nothing of it is a run of the embedded scale twice: B/16 and L/14 are two models
    assert "14 rows, 14 different autoencoders" in shown
    for name in TABLE_2:
        assert name in shown
    assert "L/14 by tiny_l14, B/16 by tiny_b16" in shown
    assert re.search(r"λ × 10, here\) 23 cls L/14 8e[-−]4 4 T geom\.", shown)
    assert re.search(r"expansion / 2, here\) 23 cls L/14 8e[-−]5 2 T geom\.", shown)
    assert re.search(r"block 5, here\) 5 all B/16 8e[-−]5 4 T geom\.", shown)
    assert "it is still nearer" in shown and "chapter 1" in shown and figures_of(out) == 3
    assert not list((tmp_path / "results").glob("activations-*"))


def test_a_folder_that_is_not_imagenet_is_named(tmp_path):
    from patchbook.scales import scale

    backbone = load_backbone(str(project_root() / "artefacts" / "small_clip"), block=11)
    with pytest.raises(PatchSAEError, match="parameter data"):
        scale("paper").sets(backbone, "")
    with pytest.raises(PatchSAEError, match="imagenet/images/train"):
        scale("paper").sets(backbone, str(tmp_path))
    with pytest.raises(PatchSAEError, match="scale='huge'"):
        scale("huge")
