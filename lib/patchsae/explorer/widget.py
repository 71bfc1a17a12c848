"""The explorer as an object of a notebook: live with a kernel, and as a page that needs none."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import anywidget
import numpy as np
import torch
import traitlets
from PIL import Image
from torch import Tensor

from patchsae.explorer.answers import TEMPLATE, Answerer, Change, class_vectors
from patchsae.explorer.blocks import INDEX, read_block, read_index
from patchsae.explorer.data import activations_of
from patchsae.explorer.gallery import Shown, activation_block, picture_block
from patchsae.explorer.packing import pack
from patchsae.images.files import resize_and_crop
from patchsae.images.reading import UnreadableImage, read_image
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root, write_atomic
from patchsae.sae.model import SAE

STATIC = Path(__file__).parent / "static"
SOURCE = "\n".join(  # one module, for neither anywidget nor a page from disk could load a second
    (STATIC / name).read_text(encoding="utf-8")
    for name in (
        "numbers.js",
        "engine.js",
        "charts.js",
        "elements.js",
        "latents.js",
        "naming.js",
        "address.js",
        "answering.js",
        "board.js",
        "card.js",
        "frame.js",
        "explorer.js",
    )  # fmt: skip
)
PAGES = (".html", ".htm")
KEPT = 24  # residual streams, and class vectors, that a live explorer keeps at hand


class Explorer(anywidget.AnyWidget):
    """Show a folder of blocks; with an SAE and models, also any image of the user's.

    Parameters
    ----------
    folder : what `write_blocks` returned
    sae, sae_hash, models : what the blocks were made with; without them only the gallery can be picked

    A mistake of the user's (a file that is no image, one of more than 100 megapixels, an SAE that is not
    the blocks') becomes a message in the widget, which goes on working. Raises PatchSAEError for a folder
    without blocks.
    """

    _esm = SOURCE
    _css = STATIC / "explorer.css"
    index = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        folder: str | Path,
        sae: SAE | None = None,
        sae_hash: str = "",
        models: Sequence[Shown] = (),
    ):
        self.folder, self.sae, self.models = Path(folder), sae, tuple(models)
        index = read_index(folder)
        notices, live = list(index["notices"]), sae is not None
        if live and (problem := self._misfit(index, sae_hash)):
            notices, live = [*notices, problem], False
        super().__init__(index=index | {"live": live, "notices": notices, "own": []})
        self._own: dict[int, Tensor] = {}
        self._streams: dict[tuple[int, int], Tensor] = {}
        self._texts: dict[tuple, Tensor] = {}
        self.on_msg(self._answer)

    def _misfit(self, index: dict[str, Any], sae_hash: str) -> str:
        if sae_hash != index["sae"] or self.sae.fingerprint() != index["weights"]:
            return (
                f"These pages describe {index['sae']}, not the {sae_hash or 'SAE'} given: only the gallery "
                f"can be picked; make the blocks with this SAE to open other images."
            )
        given = [[model.title, model.backbone.fingerprint()] for model in self.models]
        if given != [list(pair) for pair in zip(index["models"], index["backbones"], strict=True)]:
            return (
                f"The models given are not those of the pages ({', '.join(index['models'])}): only the "
                f"gallery can be picked; give the same models to open other images."
            )
        return ""

    def block(self, name: str) -> Any:
        """Return a block, computed for the user's images and read for all others.

        Raises PatchSAEError for a name that there is none of.
        """
        kind, *numbers = name.split("-")
        number = int(numbers[0]) if numbers and numbers[0].isdecimal() else -1
        if number in self._own and kind == "image":
            return picture_block(Image.fromarray(self._own[number].permute(1, 2, 0).numpy()))
        if number in self._own and kind == "acts":
            model = int(numbers[1])
            tokens = self._tokens(number, model)
            return activation_block(activations_of(self.sae, self.models[model].backbone, tokens)[0])
        if number in self._own and kind == "answers":
            return {"models": [], "order": pack(np.zeros(0, np.int64))}  # asked for one by one
        return read_block(self.folder, name)

    def add(self, source: str | Path | bytes, title: str = "", note: str = "") -> int:
        """Take an image of the user's, by path or by content, and pick it; return its number.

        Raises PatchSAEError for what is no image, or larger than 100 megapixels.
        """
        if not self.index["live"]:
            raise PatchSAEError("this explorer has no models: make it with sae, sae_hash and models.")
        picture, title = read_picture(source, title)
        frame = self.models[0].backbone.frame
        number = len(self.index["gallery"]) + len(self._own)
        self._own[number] = resize_and_crop(picture, frame)
        width, height = picture.size
        fitted = f"{frame.done} {frame.size} × {frame.size} as the model takes them"
        text = f"{title}: {width} × {height} pixels, {fitted}{note}."
        caption = {"title": title, "set": "your images"}
        self.index = self.index | {"own": [*self.index["own"], caption]}  # for views opened later
        self.send({"added": {"number": number, "caption": caption, "note": text}})
        return number

    def _tokens(self, number: int, model: int) -> Tensor:
        """Return the residual stream [1, T, d] of a picture; the last KEPT are at hand."""
        if (number, model) not in self._streams:
            pixels, backbone = self._own.get(number), self.models[model].backbone
            if pixels is None:
                uri = self.block(f"image-{number}")["picture"]
                picture, _ = read_picture(base64.b64decode(uri.partition(",")[2]))
                pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            if len(self._streams) >= KEPT:
                self._streams.pop(next(iter(self._streams)))
            with torch.no_grad():
                self._streams[number, model] = backbone.residual(backbone.normalize(pixels[None]))
        return self._streams[number, model]

    def answer(
        self, image: int, model: int, change: Change | None = None, names: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Return what a model answers to a picture under a change: its first classes and their shares.

        names : classes to choose from; by default those of the picture's set, for a picture of the user's
            those of the first set

        Raises
        ------
        PatchSAEError : there are no models here, no such picture or model, fewer than two classes, or a
            change that `Answerer` refuses.
        """
        if not self.index["live"]:
            raise PatchSAEError("this explorer has no models: make it with sae, sae_hash and models.")
        captions = [*self.index["gallery"], *self.index["own"]]
        if not (0 <= image < len(captions) and 0 <= model < len(self.models)):
            raise PatchSAEError(f"there is no picture {image} or no model {model}.")
        caption, templates = captions[image], (TEMPLATE,)
        group, label = caption.get("group", 0), -1 if names else caption.get("label", -1)
        if not names:
            names = self.block("names")["classes"][group]
            templates = self.index["groups"][group]["templates"]
        if len(names) < 2:
            raise PatchSAEError("there is one class to choose from: type two names or more.")
        key = (model, *names, *templates)
        if key not in self._texts:
            vectors = class_vectors(self.models[model].backbone, list(names), list(templates))
            self._texts = {**self._texts, key: vectors} if len(self._texts) < KEPT else {key: vectors}
        answerer = Answerer(self.sae, self.models[model].backbone)
        found = answerer(self._tokens(image, model), self._texts[key], [change or Change()], label)
        return {
            "classes": [names[k] for k in found.klass[0]],
            "share": [float(p) for p in found.share[0]],
            "true": None if label < 0 else float(found.true[0]),
        }

    def _asked(self, content: dict[str, Any]) -> dict[str, Any]:
        gains = {int(s): float(gain) for s, gain in content.get("gains", [])}
        patch = content.get("patch")
        change = Change(gains, float(content.get("rest", 1)), None if patch is None else int(patch))
        names = [str(name) for name in content.get("names") or []]
        return self.answer(int(content["image"]), int(content["model"]), change, names)

    def _answer(self, _: Any, content: dict[str, Any], buffers: Sequence[memoryview]) -> None:
        name = content.get("want")
        try:
            if "answer" in content:
                self.send({"answered": content["answer"], "data": self._asked(content)})
            elif name is not None:
                self.send({"block": name, "data": self.block(str(name))})
            elif "path" in content:
                self.add(str(content["path"]))
            elif "upload" in content:
                self.add(bytes(buffers[0]), str(content["upload"]), str(content.get("note", "")))
        except Exception as error:  # an error in a callback would end in the log, unseen
            text = str(error) if isinstance(error, PatchSAEError) else f"{type(error).__name__}: {error}"
            if "answer" in content:
                self.send({"answered": content["answer"], "failed": text})
            else:
                self.send({"problem": text} if name is None else {"block": name, "failed": text})

    def html(self, base: str = "") -> str:
        """Return the explorer as part of a page.

        base : where the folder of blocks lies, seen from the page and with '/' at its end; by default
            `_static/explorer/` of the book, where book/build.py brings it
        """
        of_kernel = ("sae", "weights", "backbones")  # a page compares nothing, and these may hold a path
        index = {key: value for key, value in self.index.items() if key not in of_kernel}
        index |= {"live": False, "own": []}
        blocks = f'data-base="{escape(base)}"' if base else f'data-blocks="{escape(self._place())}"'
        needs = "needs JavaScript" if base else "runs in the rendered book, or live in JupyterLab"
        parts = {
            "index": _script(index),
            "source": _script(SOURCE),
            "start": (STATIC / "page.js").read_text(encoding="utf-8").strip(),
            "style": (STATIC / "explorer.css").read_text(encoding="utf-8"),
        }
        return (
            f"<style>{parts['style']}</style>\n"
            f'<div class="patchsae-explorer" {blocks}>'
            f"<p>The explorer {needs}.</p></div>\n"
            f"<script>{parts['start']}({parts['index']}, {parts['source']});</script>"
        )

    def _place(self) -> str:
        """Return where the build of a book finds the blocks."""
        folder = self.folder.resolve()
        try:
            return folder.relative_to(project_root()).as_posix()
        except (PatchSAEError, ValueError):  # there is no book here, or the results are elsewhere
            return folder.as_posix()

    def save(self, path: str | Path) -> Path:
        """Write a page that opens from disk without a network or a kernel; return its path.

        What it loads is copied to `<stem>_files` beside it: move both together. Images that were added
        live are not in it.

        Raises
        ------
        PatchSAEError : the path is no name of a page, or cannot be written; the blocks have gone.
        """
        path, name = page_path(path), self.index["folder"]
        beside = path.with_name(f"{path.stem}_files")
        files = sorted(self.folder.glob("*.js"))
        if not files:
            raise PatchSAEError(f"{self.folder} holds no blocks any more: make them again, then save.")
        for file in files:
            read_block(self.folder, file.stem)  # the page runs it, and `results/` may be anybody's
            target = beside / name / file.name
            if not target.is_file() or target.read_bytes() != file.read_bytes():
                write_atomic(target, partial(shutil.copyfile, file))
        title = f"Latents of {' and '.join(self.index['models'])}"
        document = Template((STATIC / "document.html").read_text(encoding="utf-8")).substitute(
            title=escape(title), explorer=self.html(base=f"{quote(beside.name)}/")
        )
        write_atomic(path, lambda temporary: temporary.write_text(document, encoding="utf-8"))
        for other in beside.iterdir():
            copied = re.fullmatch("explorer-[0-9a-f]{12}", other.name) and not (other / INDEX).exists()
            if copied and other.name != name:  # what an earlier page of this name loaded
                shutil.rmtree(other, ignore_errors=True)
        return path

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return data | {"text/html": self.html()}, metadata


def page_path(path: str | Path) -> Path:
    """Return where a page will be saved; raises PatchSAEError for what is no name of a page."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in PAGES or path.is_dir():
        raise PatchSAEError(f"'{path}' is no name of a page: give a file that ends in .html.")
    return path


def _script(value: Any) -> str:
    """Write a value as JavaScript that cannot end the script it stands in."""
    return json.dumps(value).replace("</", "<\\/").replace("<!--", "<\\!--")


def read_picture(source: str | Path | bytes, title: str = "") -> tuple[Image.Image, str]:
    """Decode an image in RGB and name it.

    A photo is turned as its EXIF data say, as browsers show it. Raises PatchSAEError for a missing file,
    what is no image, more than 100 megapixels, and a strip more than 100 times as long as wide.
    """
    by_content = isinstance(source, bytes)
    title = title or ("uploaded image" if by_content else Path(source).name)
    if not by_content and not Path(source).expanduser().is_file():
        raise PatchSAEError(f"There is no file {Path(source).expanduser().absolute()}: correct the path.")
    try:
        content = io.BytesIO(source) if by_content else Path(source).expanduser()
        return read_image(content, title, upright=True), title
    except UnreadableImage as error:
        raise PatchSAEError(
            f"{title} is no image that can be read ({type(error.__cause__).__name__}): choose a PNG or "
            "JPEG file."
        ) from error
