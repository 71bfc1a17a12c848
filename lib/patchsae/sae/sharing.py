"""An autoencoder given to others: its model card, and the way to the Hugging Face hub and back.

python -m patchsae.sae.sharing push FOLDER hf:organisation/name
python -m patchsae.sae.sharing pull hf:organisation/name FOLDER
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.hub import CARD_PAGE, fetch, front_matter, hub_name, send
from patchsae.runs.stage import write_atomic
from patchsae.sae.model import CONFIG, SAE, WEIGHTS

CARD = "card.json"
SHARED = (WEIGHTS, CONFIG, CARD)
"""The files that are shared: weights and configuration, and the card where there is one."""
PAPER = "https://openreview.net/forum?id=imT03YXlG2"
MEASURES = {
    "fvu": "fraction of variance unexplained",
    "fvu_pca": "the same of as many principal components as latents are active",
    "l0": "active latents per token",
    "cosine": "cosine of a token with its reconstruction",
    "dead_share": "share of latents that never fire",
    "cosine_with_start": "mean cosine of a decoder row with its random start",
    "accuracy": "zero-shot accuracy of the model as it is",
    "accuracy_through_sae": "the same through the reconstruction",
}


def model_card(folder: str | Path, licence: str | None = None) -> str:
    """Return the model card of a saved autoencoder, in the hub's form: YAML front matter and a page.

    Everything in it comes from `sae.json` and, where there is one, `card.json`: nothing is typed by hand.

    Parameters
    ----------
    folder : as `SAE.save` writes it
    licence : of the weights, as the hub names it ('mit', 'cc-by-4.0'); by default the card's, or 'other'

    Raises
    ------
    PatchSAEError : a file is missing or damaged.
    """
    folder = Path(folder)
    sae = SAE.load(folder)
    card = _read(folder / CARD)
    name = str(card.get("name", folder.resolve().name))
    licence = licence or str(card.get("licence", {}).get("weights", "other")).lower()
    base = card.get("backbone", {}).get("name")
    head = front_matter(
        license=licence,
        library_name="patchsae",
        tags=["sparse-autoencoder", "interpretability", "clip", "vision-transformer"],
        base_model=base if base and "/" in base else None,
        pipeline_tag="feature-extraction",
    )
    try:
        return head + "\n".join(_page(sae, name, card)) + "\n"
    except (KeyError, TypeError, ValueError) as error:
        raise PatchSAEError(
            f"'{folder / CARD}' is of another form ({error!r}); write it anew, or remove it."
        ) from error


def push(folder: str | Path, to: str, licence: str | None = None, private: bool = False) -> str:
    """Give a saved autoencoder to others: to the hub as `hf:organisation/name`, or into a folder.

    Sent are the weights, the configuration, the card if there is one, and the model card made from them.

    Returns
    -------
    the address, or the folder

    Raises
    ------
    PatchSAEError : the folder holds no readable SAE; the hub refuses; the target is the folder itself.
    """
    folder = Path(folder).expanduser()
    page = model_card(folder, licence)
    files: dict[str, Path | bytes] = {name: folder / name for name in SHARED if (folder / name).is_file()}
    hub = hub_name(to)
    if hub:
        return send(hub, files | {CARD_PAGE: page.encode()}, "Autoencoder from PatchSAE", private)
    target = _other_folder(Path(to).expanduser(), folder)
    for name, source in files.items():
        write_atomic(target / name, lambda temporary, source=source: shutil.copyfile(source, temporary))
    write_atomic(target / CARD_PAGE, lambda temporary: temporary.write_text(page, "utf-8"))
    return str(target)


def pull(source: str, folder: str | Path) -> Path:
    """Bring an autoencoder that `push` gave, from the hub or a folder, into a folder, and check it.

    What is there is replaced only by something that was read whole.

    Raises
    ------
    PatchSAEError : it cannot be fetched, is damaged, or has weights that are not finite.
    """
    hub = hub_name(source)
    found = fetch(hub, (*SHARED, CARD_PAGE)) if hub else Path(source).expanduser()
    SAE.load(found)
    folder = _other_folder(Path(folder).expanduser(), found)
    for name in (*SHARED, CARD_PAGE):
        if (found / name).is_file():
            here = found / name
            write_atomic(folder / name, lambda temporary, here=here: shutil.copyfile(here, temporary))
    return folder


def _other_folder(folder: Path, source: Path) -> Path:
    if folder.exists() and folder.resolve() == source.resolve():
        raise PatchSAEError(f"'{folder}' is the folder that is read: give another to write to.")
    return folder


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # of JSON and of UTF-8
        raise PatchSAEError(f"'{path}' is damaged ({error}); write it again, or remove it.") from error
    if not isinstance(found, dict):
        raise PatchSAEError(f"'{path}' is no table of names and values; write it again, or remove it.")
    return found


def _page(sae: SAE, name: str, card: Mapping[str, Any]) -> list[str]:
    config, images, model = sae.config, card.get("images", {}), card.get("backbone", {})
    where = f" after block {card['block']}" if "block" in card else ""
    of = f" of `{model['name']}`" if "name" in model else ""
    lines = ["", f"# {name}", ""]
    lines += [f"A sparse autoencoder of the tokens{where}{of}, made with PatchSAE."]
    if "about" in card:
        lines += [f"Its recipe: {card['about']}."]
    lines += ["", "## Use", "", "```python", "import patchsae as ps", ""]
    lines += [f"clip = ps.load_clip(MODEL, block={card.get('block', 'BLOCK')})  # the model named above"]
    lines += ['lens = ps.load_sae("FOLDER or hf:organisation/name", clip)', "```", ""]
    lines += ["## What it is", "", "| | |", "|---|---|"]
    k = f", k = {config.k}" if config.k else ""
    rows = {
        "width of a token": f"{config.d_in:,}",
        "latents": f"{sae.d_sae:,}",
        "activation": f"{config.activation}{k}",
        "weight of the L1 penalty": f"{config.l1:g}",
        "ghost gradients": "yes" if config.ghost else "no",
        "input normalisation": str(config.input_norm),
        "weights of the model, fingerprint": f"`{str(model.get('fingerprint', ''))[:16]}`" if model else "",
    }
    lines += [f"| {key} | {value} |" for key, value in rows.items() if value]
    if images:
        lines += ["", "## Trained on", ""]
        lines += [
            f"{images['seen']:,} images, {images['different']:,} different ones, of `{images['name']}` "
            f"(fingerprint `{images['fingerprint']}`); {card['tokens']:,} tokens; seed {card['seed']}; "
            f"{card['seconds']:,.0f} seconds. The recipe is in `{CARD}`, under `train`."
        ]
    if measured := card.get("measured"):
        lines += [
            "",
            "## Measured",
            "",
            f"On {measured['images']:,} images that it was not trained on.",
            "",
        ]
        lines += ["| measure | value |", "|---|---|"]
        known = {key: what for key, what in MEASURES.items() if key in measured}
        lines += [f"| {what} | {measured[key]:.4g} |" for key, what in known.items()]
    lines += ["", "## Limits", ""]
    lines += [
        "It reads the tokens of this model at this block alone. A latent is a direction, and not every one "
        "stands for something that a person can name. Compare whatever you find with an autoencoder of "
        "random weights."
    ]
    if licence := card.get("licence"):
        lines += ["", "## Licence", ""]
        lines += [f"Weights: {licence['weights']}. The images that it was trained on: {licence['images']}."]
    lines += ["", "## Source", ""]
    lines += [
        "The method: Lim, Choi, Choo and Schneider, [*Sparse autoencoders reveal selective remapping of "
        f"visual concepts during adaptation*]({PAPER}), ICLR 2025."
    ]
    return [re.sub(r"\s+$", "", line) for line in lines]
