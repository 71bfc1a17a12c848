"""Attacks on all that is read: seeded mutations, hostile pickles, disks that fail, power that goes.

Each attack returns a tally: `garbage` counts what was believed though wrong, `traceback` what ended
in anything but one sentence (`PatchSAEError`); both must be 0.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from PIL import Image
from safetensors.torch import save_file

from patchsae.explorer.blocks import check_block
from patchsae.images.reading import read_image
from patchsae.runs.disk import remove, storing
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.restricted_pickle import read_pickle
from patchsae.runs.stage import Stage
from patchsae.runs.tensors import load_tensors, save_tensors
from patchsae.runs.verify import verify_results
from patchsae.sae.importers import import_sae
from patchsae.sae.model import SAE, SAEConfig
from patchsae.training.activations import Shards, _opened
from patchsae.training.trainer import read_metrics, write_metrics


class Tally(Counter):
    """How often what came of an attack, and the first of what must not."""

    def __init__(self):
        super().__init__(tried=0, refused=0, right=0, garbage=0, traceback=0)
        self.examples: list[str] = []

    def add(self, outcome: str, example: str = "") -> None:
        self["tried"] += 1
        self[outcome] += 1
        if outcome in ("garbage", "traceback") and len(self.examples) < 5:
            self.examples.append(f"{outcome}: {example}"[:300])

    def attempt(self, read: Callable[[], bool], example: str) -> None:
        """Call a reader that tells whether what it read is right."""
        try:
            self.add("right" if read() else "garbage", example)
        except PatchSAEError as error:
            said = str(error)
            self.add(
                "traceback" if "\n" in said or "Traceback" in said else "refused", f"{example}: {said}"
            )
        except Exception as error:  # whatever it is, a person would have seen a traceback
            self.add("traceback", f"{example}: {type(error).__name__}: {error}")


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return content with something changed, never the same."""
    data = bytearray(content)
    kind = draw.choice(("flip", "flip", "cut", "zeros", "number", "insert", "swap"))
    at = draw.randrange(len(data)) if data else 0
    if draw.random() < 0.3:
        at = min(at, 64) if data else 0  # headers decide most
    match kind:
        case "cut":
            del data[at:]
        case "zeros":
            data[at : at + draw.randint(1, 64)] = bytes(draw.randint(1, 64))
        case "number":
            data[at : at + 4] = struct.pack("<I", draw.choice((0, 1, 2**31 - 1, 2**32 - 1, 10**9)))
        case "insert":
            data[at:at] = draw.randbytes(draw.randint(1, 16))
        case "swap":
            data = data[at:] + data[:at]
    if kind == "flip" or data == content:
        data = bytearray(content or b"\0")
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data) if data != content else bytes(data) + b"\0"


def images(count: int, seed: int, folder: Path) -> Tally:
    """Mutated pictures of every format: each is refused, or becomes an RGB picture within the limits."""
    draw, tally, seeds = random.Random(seed), Tally(), []
    noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    for suffix in ("jpg", "png", "gif", "webp", "bmp", "tif", "ppm", "tga", "avif", "jp2"):
        with io.BytesIO() as held, contextlib.suppress(KeyError, OSError, ValueError):
            Image.fromarray(noise).save(held, Image.registered_extensions()[f".{suffix}"])
            seeds.append((suffix, held.getvalue()))
    for name, array in {
        "g16": noise[..., 0].astype(np.uint16) * 257,
        "f32": noise[..., 0] / np.float32(255),
    }.items():
        with io.BytesIO() as held:
            Image.fromarray(array).save(held, "TIFF")
            seeds.append((name, held.getvalue()))
    for number in range(count):
        suffix, content = seeds[number % len(seeds)]
        changed = mutated(content, draw)

        def read(changed=changed) -> bool:
            picture = read_image(io.BytesIO(changed), "picture")
            return picture.mode == "RGB" and picture.width * picture.height <= 100e6

        tally.attempt(read, f"{suffix} {number}")
    return tally


def checkpoints(count: int, seed: int, folder: Path) -> Tally:
    """Mutated autoencoders of four layouts: each is refused, or is finite and of one piece."""
    draw, tally = random.Random(seed), Tally()
    sae = SAE(SAEConfig(6, 2.0))
    weights = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    weights = {name: value.detach().contiguous() for name, value in weights.items()}
    sae.save(folder / "own")
    (folder / "lens").mkdir()
    save_file(weights, folder / "lens" / "sae_weights.safetensors")
    (folder / "lens" / "cfg.json").write_text(json.dumps({"d_in": 6, "d_sae": 12}))
    theirs = {
        "encoder.weight": weights["W_enc"].T.contiguous(), "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(), "bias": weights["b_dec"],
    }  # fmt: skip
    for name, content in {
        "authors": {"cfg": {"d_in": 6, "l1_coefficient": 1e-3}, "state_dict": weights},
        "learning": theirs,
    }.items():
        (folder / name).mkdir()
        torch.save(content, folder / name / "sae.pt")
    (folder / "learning" / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        if path.parent.name != "own":
            assert import_sae(path.parent).d_sae == 12  # or nothing would be tried
    for number in range(count):
        path = files[number % len(files)]
        content = path.read_bytes()
        path.write_bytes(mutated(content, draw))

        def read(path=path) -> bool:
            own = path.parent.name == "own"
            found = SAE.load(path.parent) if own else import_sae(path.parent)
            finite = all(bool(value.isfinite().all()) for value in found.state_dict().values())
            return finite and found.W_dec.shape == (found.config.d_sae, found.config.d_in)

        try:
            tally.attempt(read, f"{path.relative_to(folder)} {number}")
        finally:
            path.write_bytes(content)
    return tally


class Remade(Exception):
    """Tell that a stage was not trusted, and would be made again."""


def make_result(stage: Stage) -> None:
    """Make a result of all that stages consist of: tensors, a table, a labelled dataset."""
    for number in range(3):
        part = stage.path / f"part-{number:04d}.safetensors"
        if not part.exists():
            save_tensors(part, {"x": torch.arange(40.0) + number}, {"number": number})
    found = [load_part(stage.path / f"part-{number:04d}.safetensors") for number in range(3)]
    SAE(SAEConfig(6, 2.0)).save(stage.path)
    write_metrics(stage.path, [{"step": step, "mse": step / 7} for step in range(20)])
    data = xr.Dataset({"count": (("part", "latent"), np.stack(found)), "share": ("latent", found[0] / 3)})
    with storing(stage.path):
        data.to_zarr(stage.path / "x.zarr", mode="w", consolidated=False, zarr_format=2)
    stage.finish("x.zarr", "sae.*", "metrics.csv")
    remove(*stage.path.glob("part-*"))


def load_part(path: Path) -> np.ndarray:
    """Read one part as stages do."""
    try:
        tensors, _ = load_tensors(path)
    except ValueError as error:
        raise PatchSAEError(f"'{path}' is damaged ({error}); delete it.") from error
    return tensors["x"].numpy()


def read_result(root: Path, make: Callable[[Stage], None] = make_result) -> tuple[object, ...]:
    """Make the result, or find it; return all that is in it."""
    stage = Stage.open(root, "tried", {"seed": 1}, version=1)
    stage.once(lambda: make(stage))
    data = xr.open_zarr(stage.path / "x.zarr", consolidated=False).load()
    values = tuple(data[name].values.tobytes() for name in sorted(data.data_vars))
    return *values, SAE.load(stage.path).fingerprint(), read_metrics(stage.path)


def stages(count: int, seed: int, folder: Path) -> Tally:
    """Mutated and lost files of a finished result, a cache, a checkpoint and a page's blocks."""
    draw, tally, root = random.Random(seed), Tally(), folder / "results"
    whole = read_result(root)
    (made,) = root.glob("tried-*")
    held = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    saved = save_tensors(folder / "checkpoint.safetensors", {"w": torch.arange(64.0)}, {"step": 3})
    shards = Shards(folder, "tried", (3, 2, 4))
    shards.write(0, torch.arange(24.0).view(3, 2, 4).half())
    block = folder / "explorer-0" / "image-0.js"
    block.parent.mkdir()
    block.write_text('patchsaeExplorer.receive("explorer-0","image-0",{"a":1});\n', encoding="utf-8")
    others = {path: path.read_bytes() for path in (saved, shards.path(0), block)}

    def again(_: Stage) -> None:
        raise Remade

    def finished() -> bool:
        try:
            return read_result(root, again) == whole
        except Remade:
            return True  # not believed, and made anew

    def checkpoint() -> bool:
        try:
            tensors, facts = load_tensors(saved)
        except ValueError as error:
            raise PatchSAEError(f"'{saved}' is damaged ({str(error).splitlines()[0]}).") from error
        return facts == {"step": 3} and torch.equal(tensors["w"], torch.arange(64.0))

    def shard() -> bool:
        _opened.cache_clear()
        if not shards.whole(0):
            raise PatchSAEError("the shard is not whole, and is made anew.")
        return torch.equal(shards.read([0, 1, 2]), torch.arange(24.0).view(3, 2, 4).half())

    def script() -> bool:
        try:
            return isinstance(check_block(block), (dict, list, int, float, str, bool, type(None)))
        except ValueError as error:
            raise PatchSAEError(f"'{block}' is no block ({error}).") from error

    readers = {saved: checkpoint, shards.path(0): shard, block: script}
    for number in range(count):
        path = draw.choice([*held, *others]) if number % 3 else draw.choice(list(held))
        content = (held | others)[path]
        if path in held and draw.random() < 0.2:
            path.unlink()
            what = "lost"
        elif path == block and draw.random() < 0.5:
            path.write_bytes(content + draw.choice((b"alert(1)", b"//\n;evil()", b"</script><script>x()")))
            what = "script"
        else:
            path.write_bytes(mutated(content, draw))
            what = "mutated"
        tally.attempt(readers.get(path, finished), f"{path.name} {what} {number}")
        path.write_bytes(content)
    assert verify_results(root) == [] and finished()
    return tally


def pickles(count: int, seed: int, folder: Path) -> Tally:
    """Pickles that call something when they are loaded: nothing is ever run."""
    draw, tally, mark = random.Random(seed), Tally(), folder / "ran"

    class Evil:
        def __init__(self, call: Callable, *arguments: object):
            self.call = call, arguments

        def __reduce__(self) -> tuple:
            return self.call

    calls = [
        (os.system, f"touch {mark}"), (exec, f"open({str(mark)!r}, 'w')"),
        (eval, f"open({str(mark)!r}, 'w')"),
        (open, str(mark), "w"), (__import__, "antigravity"), (getattr, os, "system"),
        (os.mkdir, str(mark)), (shutil.rmtree, str(folder / "nothing")), (print, "ran"),
    ]  # fmt: skip
    for number in range(count):
        call, *arguments = draw.choice(calls)
        inside = Evil(call, *arguments)
        shape = draw.choice(
            (lambda x: x, lambda x: {"state_dict": x}, lambda x: {"cfg": x, "state_dict": {}})
        )
        path = folder / f"evil.{draw.choice(('pt', 'pth', 'bin'))}"
        try:
            if draw.random() < 0.5:
                torch.save(shape(inside), path)
            else:
                path.write_bytes(pickle.dumps(shape(inside), protocol=draw.randint(2, 5)))
        except Exception:  # what cannot be pickled attacks nobody
            continue

        def read(path=path) -> bool:
            read_pickle(path)
            return not mark.exists()

        tally.attempt(read, f"{call.__name__} {number}")
        if mark.exists():
            tally.add("garbage", f"{call.__name__} ran")
            mark.rmdir() if mark.is_dir() else mark.unlink()
    return tally


OPERATIONS = (("mkstemp", tempfile), ("fsync", os), ("replace", os), ("mkdir", os), ("unlink", os))


@contextlib.contextmanager
def each_operation(
    before: Callable[[str, tuple], None], after: Callable[[str, tuple], None]
) -> Iterator[None]:
    """Call functions around every operation by which data reach the disk."""
    real = {name: getattr(module, name) for name, module in OPERATIONS}

    def wrapped(name: str) -> Callable:
        def call(*arguments, **options):
            before(name, arguments)
            answer = real[name](*arguments, **options)
            after(name, arguments)
            return answer

        return call

    for name, module in OPERATIONS:
        setattr(module, name, wrapped(name))
    try:
        yield
    finally:
        for name, module in OPERATIONS:
            setattr(module, name, real[name])


def count_operations(folder: Path) -> int:
    """Count the operations that making the result takes."""
    seen = Counter()
    with each_operation(lambda name, _: seen.update([name]), lambda *_: None):
        read_result(folder)
    return sum(seen.values())


def failing_disks(folder: Path, every: int = 1) -> Tally:
    """Let every single operation fail in three ways; then go on with a disk that works again."""
    tally, whole = Tally(), read_result(folder / "whole")
    total = count_operations(folder / "counted")
    for number in (errno.ENOSPC, errno.EIO, errno.EROFS):
        for at in range(0, total, every):
            root, left = folder / f"{number}-{at}", [at]

            def fail(*_: object, left=left, number=number) -> None:
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(number, os.strerror(number))

            def run(root=root, fail=fail) -> bool:
                with each_operation(fail, lambda *_: None):
                    return read_result(root) == whole

            tally.attempt(run, f"{os.strerror(number)} at operation {at}")
            tally.attempt(lambda root=root: read_result(root) == whole, f"after operation {at}")
            shutil.rmtree(root, ignore_errors=True)
    return tally


class PowerLost(BaseException):
    """End a run in the middle."""


class Durable:
    """What of a folder would be there after a loss of power: content and names that were synced."""

    def __init__(self):
        self.content: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.folders: set[int] = set()

    def note(self, name: str, arguments: tuple) -> None:
        if name != "fsync":
            return
        place = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
        inode = place.stat().st_ino
        if place.is_dir():
            self.folders.add(inode)
            self.names[inode] = {path.name: path.lstat().st_ino for path in place.iterdir()}
            self.folders |= {path.stat().st_ino for path in place.iterdir() if path.is_dir()}
        else:
            self.content[inode] = place.read_bytes()

    def rebuild(self, inode: int, target: Path) -> None:
        """Write what outlasted below a folder; a name without content is an empty file."""
        target.mkdir(parents=True, exist_ok=True)
        for name, inner in self.names.get(inode, {}).items():
            if inner in self.folders:
                self.rebuild(inner, target / name)
            else:
                (target / name).write_bytes(self.content.get(inner, b""))


def power_losses(folder: Path, every: int = 1) -> Tally:
    """Lose power before every single operation, and all that was not synced with it; then go on."""
    tally, whole = Tally(), read_result(folder / "whole")
    for at in range(0, count_operations(folder / "counted") + 1, every):
        root, durable, left = folder / f"{at}", Durable(), [at]
        root.mkdir()

        def cut(*_: object, left=left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise PowerLost

        with contextlib.suppress(PowerLost), each_operation(cut, durable.note):
            read_result(root)
        after = folder / f"{at}-after"
        durable.rebuild(root.stat().st_ino, after)
        # a writer of zarr's that has been cut off may still be putting its own files away
        shutil.rmtree(root, ignore_errors=True)
        tally.attempt(lambda after=after: read_result(after) == whole, f"before operation {at}")
        shutil.rmtree(after, ignore_errors=True)
    return tally
