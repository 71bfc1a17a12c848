"""A page with nothing but the model in it, opened from disk, and what is asked of it from Python."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchsae.explorer.weights import STATIC

PAGE = """<!doctype html><meta charset="utf-8"><title>the model</title>
<script>
window.got = {};
window.patchsaeExplorer = { receive: (folder, name, data) => window.got[name](data) };
</script>
<script type="module">SOURCE
const load = (name, decode) => new Promise((done, failed) => {
  const script = document.createElement("script");
  script.src = `FOLDER/${name}.js`;
  window.got[name] = (data) => done(decode(data));
  script.onload = () => failed(new Error("The data of this page is damaged."));
  script.onerror = () => failed(new Error("The data of this page is not beside it."));
  document.head.append(script);
});
window.told = [];
window.start = () => (window.engine = startEngine(load, (text) => window.told.push(text)));
window.text = (array) => {
  let bytes = "";
  const whole = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  for (const b of whole) bytes += String.fromCharCode(b);
  return btoa(bytes);
};
window.typed = (value) => ArrayBuffer.isView(value) ? { type: value.constructor.name, text: text(value) }
  : Array.isArray(value) || value === null || typeof value !== "object" ? value
  : Object.fromEntries(Object.entries(value).map(([key, inside]) => [key, typed(inside)]));
window.file = (content, name) => new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name);
start();
</script>"""
TYPES = {"Float32Array": "<f4", "Uint32Array": "<u4", "Uint8ClampedArray": "u1"}
ASK = "async ([call, ...given]) => typed(await engine[call](...given))"
OPEN = "async ([key, content, name]) => typed(await engine.picture(key, file(content, name)))"
REFUSED = (
    "([key, content, name]) => engine.picture(key, file(content, name)).then(() => '', (e) => e.message)"
)


def write_page(folder: Path) -> Path:
    """Write the page beside a folder of blocks; return its path."""
    source = "\n".join((STATIC / name).read_text("utf-8") for name in ("numbers.js", "engine.js"))
    path = folder.parent / "engine.html"
    path.write_text(PAGE.replace("SOURCE", source).replace("FOLDER", folder.name), "utf-8")
    return path


class Asked:
    """The model of a page that is open."""

    def __init__(self, page):
        self.page = page
        page.set_default_timeout(120_000)
        page.wait_for_function("() => window.engine")

    def __call__(self, call: str, *given: Any) -> Any:
        return _read(self.page.evaluate(ASK, [call, *given]))

    def open(self, key: Any, content: bytes, name: str = "picture.png") -> Any:
        """Give a picture by its content."""
        return _read(self.page.evaluate(OPEN, [key, base64.b64encode(content).decode(), name]))

    def refused(self, content: bytes, name: str) -> str:
        """Give what is no picture; return what is said of it."""
        return self.page.evaluate(REFUSED, ["refused", base64.b64encode(content).decode(), name])


def png(pixels: np.ndarray) -> bytes:
    """Encode pixels uint8 [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _read(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"type", "text"}:
        return np.frombuffer(base64.b64decode(value["text"]), TYPES[value["type"]])
    return {key: _read(inside) for key, inside in value.items()} if isinstance(value, dict) else value
