"""A kind of result whose numbers changed has a new version: golden numbers of each, from a tiny run.

    python tests/test_versions.py

writes them anew, after the version of the module that changed was raised.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_ablation import CLS, save_model, sweep_of
from test_masking import CONFIG as MASKS
from test_masking import atlas_of, tiny_sae
from test_masking import run as run_masking
from test_prompt_training import CONFIG as PROMPTS
from tiny import CONFIG, tiny_backbone, tiny_images
from tiny_explorer import make_parts, tuned

from patchbook.chapters import ablation
from patchsae.adaptation import prompt_training, remapping
from patchsae.clip.backbone import zero_shot_weights
from patchsae.explorer import blocks
from patchsae.explorer.packing import unpack
from patchsae.latents import atlas
from patchsae.masking import sweep as masking
from patchsae.runs.stage import write_json
from patchsae.sae.model import SAEConfig
from patchsae.training import activations
from patchsae.training import trainer as training

GOLDEN = Path(__file__).parent / "golden" / "versions.json"
SHORT = replace(CONFIG, images=24)  # ten steps: processors agree on them


def summary(arrays: Mapping[str, object]) -> dict[str, float]:
    """Reduce arrays to their size, mean and spread, and how they are ordered."""
    found = {}
    for name, values in arrays.items():
        x = np.asarray(values, np.float64).ravel()
        x = x[np.isfinite(x)]
        weights = np.cos(np.arange(x.size))
        found[name] = (
            [x.size, *(float(v) for v in (x.mean(), x.std(), (weights * x).sum()))] if x.size else [0]
        )
    return found


def of_activations(root: Path) -> dict:
    images, kept = tiny_images(), activations.Tokens.ALL
    cache = activations.Activations(images, tiny_backbone(), kept, cache=root)
    return {"tokens": torch.cat(list(cache.read([range(4), range(4, 8)]))).numpy()}


def of_training(root: Path) -> dict:
    sae = SAEConfig(d_in=32, expansion=4, l1=1e-3)
    trained = training.train_sae(tiny_images(), tiny_backbone(), sae, SHORT, root, progress=False)
    weights = {name: value.numpy() for name, value in trained.sae.state_dict().items()}
    return weights | {key: [row[key] for row in trained.metrics] for key in ("mse", "l0", "fvu")}


def of_atlas(root: Path) -> dict:
    found = atlas_of(root)
    # an activation at the edge of a bin is in either, by rounding
    found["histogram"] = found.histogram.cumsum("bin")
    return {str(name): found[name].values for name in found.data_vars if found[name].dtype.kind in "iufb"}


def of_masking(root: Path) -> dict:
    found = run_masking(root, atlas_of(root), MASKS)
    return {str(name): found[name].values for name in found.data_vars}


def of_remapping(root: Path) -> dict:
    plain, other, images = tiny_backbone(), tuned(1), tiny_images().subset(range(16))
    texts = tuple(zero_shot_weights(one, images.classnames, "a {}") for one in (plain, other))
    mixed = remapping.mix_models(tiny_sae(), "tiny", plain, other, images, texts, root, progress=False)
    return {part: np.stack(list(rows.values())) for part, rows in mixed._asdict().items()}


def of_prompts(root: Path) -> dict:
    shots = tiny_images().subset(range(8))
    config = replace(PROMPTS, epochs=1, warmup_epochs=0)
    made = prompt_training.train_prompts(tiny_backbone(), shots, config, root, progress=False)
    weights = load_file(next(made.folder.glob("prompts.safetensors")))
    return {name: value.float().numpy() for name, value in weights.items()} | {
        "loss": [row["loss"] for row in made.metrics]
    }


def of_ablation(root: Path) -> dict:
    sweep = sweep_of(save_model(root), root, l1=5e-4)  # not the scale's, which may change
    images, test = tiny_images(), tiny_images().subset(range(24))
    sweep = replace(sweep, cls_train=replace(sweep.cls_train, images=48))
    rows = ablation.run_rows({"cls": CLS}, sweep, {CLS.tokens: images}, test, root, progress=False)
    return {k: [v] for k, v in rows["cls"]._asdict().items() if isinstance(v, float) and k != "seconds"}


def of_explorer(root: Path) -> dict:
    folder, found = make_parts(root).folder, {}
    for file in sorted(folder.glob("*.js")):
        # the model in the page is judged by what it computes; of two equal neighbours either may be first
        if file.stem.startswith(("engine", "tower-", "words-", "near-")):
            continue
        for place, packed in arrays_in(blocks.read_block(folder, file.stem)):
            found[f"{file.stem}/{place}"] = unpack(packed)
    return found


def arrays_in(value: object, place: str = "") -> Iterator[tuple[str, dict]]:
    """Yield every packed array of a block by its place."""
    if isinstance(value, dict) and set(value) == {"t", "b"}:
        yield place, value
        return
    inside = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, part in inside:
        yield from arrays_in(part, f"{place}/{key}")


KINDS: dict[str, tuple[object, Callable[[Path], dict]]] = {
    "activations": (activations, of_activations),
    "training": (training, of_training),
    "atlas": (atlas, of_atlas),
    "masking": (masking, of_masking),
    "remapping": (remapping, of_remapping),
    "prompt_training": (prompt_training, of_prompts),
    "ablation": (ablation, of_ablation),
    "explorer": (blocks, of_explorer),
}


def changes(told: Mapping, found: Mapping) -> list[str]:
    """Name what is not the same, to the rounding by which processors differ."""
    names = sorted(set(told) ^ set(found))
    for name in sorted(set(told) & set(found)):
        # the spread says how large a rounding of the weighted sum is
        scale = max([1e-6, *(abs(v) for v in told[name][1:3])]) if len(told[name]) > 1 else 1.0
        loose = np.array([0, 1, 1, 10])[: len(told[name])] * 2e-3 * scale
        if (
            len(told[name]) != len(found[name])
            or (np.abs(np.subtract(told[name], found[name])) > loose).any()
        ):
            names.append(name)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_change_only_with_the_version(kind, tmp_path):
    module, run = KINDS[kind]
    told = json.loads(GOLDEN.read_text("utf-8"))[kind]
    assert told["version"] == module.VERSION, f"write the golden numbers anew: python {__file__}"
    changed = changes(told["numbers"], summary(run(tmp_path)))
    assert not changed, (
        f"{', '.join(changed)} changed: raise VERSION of {module.__name__}, or results made before are "
        f"taken for the new code's; then python {__file__}"
    )


def test_a_change_of_a_hundredth_is_seen():
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(size=50), "b": np.array([3])}
    told = summary(values)
    assert changes(told, summary(values)) == []
    assert changes(told, summary(values | {"a": values["a"] * 1.01})) == ["a"]
    assert changes(told, summary(values | {"a": values["a"][::-1]})) == ["a"]
    assert changes(told, summary({"a": values["a"], "c": [1]})) == ["b", "c"]


def main() -> None:
    numbers = {}
    for kind, (module, run) in KINDS.items():
        with tempfile.TemporaryDirectory() as root:
            numbers[kind] = {"version": module.VERSION, "numbers": summary(run(Path(root)))}
    write_json(GOLDEN, numbers)
    print(f"{len(numbers)} kinds in {GOLDEN}")


if __name__ == "__main__":
    sys.exit(main())
