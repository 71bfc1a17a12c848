"""Model cards, in the hub's form, of what the repository ships: `python -m patchbook.model_cards`.

Each is made from the `card.json` beside it, and a test compares the two.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from patchbook.shipped import read_index, shelf
from patchsae.clip.files import CONFIG
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.hub import CARD_PAGE, front_matter
from patchsae.runs.stage import project_root, write_atomic
from patchsae.sae.sharing import CARD, model_card

PARTS = {
    "trained": "drawings that it was trained on",
    "untrained": "drawings held out, of concepts that it knows in other styles",
    "novel": "concepts held out altogether, told from each other",
}


def small_clip() -> Path:
    """Return the folder of the small CLIP."""
    return project_root() / "artefacts" / "small_clip"


def clip_card(folder: Path) -> str:
    """Return the model card of the small CLIP, from its `card.json` and the configuration beside it.

    Raises
    ------
    PatchSAEError : one of both is missing or damaged.
    """
    card, config = _read(folder / CARD), _read(folder / CONFIG)["model_cfg"]
    vision, text = config["vision_cfg"], config["text_cfg"]
    side = vision["image_size"] // vision["patch_size"]
    head = front_matter(
        license="mit",
        library_name="open_clip",
        tags=["clip", "vision-transformer", "pictograms", "zero-shot-image-classification"],
        pipeline_tag="zero-shot-image-classification",
        language="en",
    )
    lines = ["", "# The small CLIP of PatchSAE", ""]
    lines += [
        "A CLIP of open_clip's own architecture, trained by this project from nothing, on scenes composed "
        "from two sets of pictograms. It lets the whole book run on two processor cores.",
    ]
    lines += ["", "## Use", "", "```python", "import patchsae as ps", ""]
    lines += ['clip = ps.load_clip("artefacts/small_clip", block=11)', "```", ""]
    lines += ["## What it is", "", "| | |", "|---|---|"]
    lines += [
        f"| parameters | {card['parameters']:,} |",
        f"| image | {vision['image_size']} px, {side} × {side} patches and CLS |",
        f"| image tower | {vision['layers']} blocks of width {vision['width']} |",
        f"| text tower | {text['layers']} blocks of width {text['width']} |",
        f"| vocabulary | {text['vocab_size']:,}, of which a text has {text['context_length']} |",
        f"| embedding | {config['embed_dim']} |",
    ]
    lines += ["", "## Trained on", ""]
    lines += [
        f"{card['images_seen']:,} scenes in {len(card['recipe']['phases'])} phases, of "
        f"{card['concepts']['trained']} of {card['concepts']['all']} concepts; seed {card['seed']}. The "
        f"recipe and its history are in `{CARD}`; `make clip` follows it. The book's data card says what "
        "the scenes show and what was held out.",
    ]
    lines += [
        "",
        "## Measured",
        "",
        "Zero-shot accuracy at naming the concept of a scene's first object.",
        "",
    ]
    styles = list(card["accuracy"])
    lines += [f"| on | {' | '.join(styles)} | chance |", "|---|" + "---|" * (len(styles) + 1)]
    for part, what in PARTS.items():
        measured = [card["accuracy"][style][part] for style in styles]
        cells = [f"{one['concept']:.1%}" for one in measured]
        lines += [f"| {what} | {' | '.join(cells)} | {measured[0]['chance']:.1%} |"]
    lines += ["", "## Limits", ""]
    lines += [
        "It knows pictograms and nothing else: it is no model of photographs, and what holds for it need "
        "not hold for a CLIP of the world. It is made to study a method where the truth is known.",
    ]
    lines += ["", "## Licence", ""]
    lines += [
        "Weights: MIT. The drawings that it was trained on: OpenMoji, CC BY-SA 4.0, and Twemoji, CC BY "
        "4.0. No drawing is in this folder.",
    ]
    return head + "\n".join(lines) + "\n"


def cards() -> dict[Path, str]:
    """Return what every model card of the repository has to say, by its path."""
    made = {small_clip() / CARD_PAGE: clip_card(small_clip())}
    return made | {shelf() / name / CARD_PAGE: model_card(shelf() / name) for name in read_index()}


def main(argv: list[str] | None = None) -> int:
    """Write the model cards of the repository; return 0, or 2 where a file is damaged."""
    parser = argparse.ArgumentParser(
        prog="python -m patchbook.model_cards",
        description="Write the model cards of artefacts/, each from the card.json beside it.",
    )
    parser.parse_args(argv)
    try:
        for path, text in cards().items():
            write_atomic(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
            print(path)
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PatchSAEError(f"'{path}' cannot be read ({error}); take it from git.") from error


if __name__ == "__main__":
    sys.exit(main())
