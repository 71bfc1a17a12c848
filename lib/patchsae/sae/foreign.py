"""Other projects' checkpoint files: which layout one has, and its content as configuration and tensors.

Nothing here gives the content a meaning. Each refusal names the file and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchsae.runs.checks import check_weights
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.restricted_pickle import StandIn, plain_names, read_pickle
from patchsae.sae.model import CONFIG


class Project(StrEnum):
    """Whose layout a checkpoint has."""

    PATCHSAE = "patchsae"  # the authors' .pt with cfg and state_dict; Fry's are alike
    SAELENS = "saelens"  # cfg.json + sae_weights.safetensors
    SAEV = "saev"  # a line of json, then a state dict
    SPARSIFY = "sparsify"  # cfg.json + sae.safetensors
    PRISMA = "prisma"  # config.json + weights.pt or n_images_*.pt; earlier, one .pt as the authors'
    DICTIONARY_LEARNING = "dictionary_learning"  # config.json + ae.pt


class Checkpoint(NamedTuple):
    """A source's file as read, before it is given a meaning."""

    source: Project
    file: Path
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]


SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAFETENSORS = {Project.SAELENS: SAELENS_WEIGHTS, Project.SPARSIFY: "sae.safetensors"}
REQUIRED = object()

Layout = Mapping[str, tuple[str, tuple[str, ...]]]  # our tensor: its name and dimensions in the source


def open_checkpoint(path: Path, source: Project | str | None = None) -> Checkpoint:
    """Read a file or folder as some project publishes it; its own marks say which, or `source` does."""
    if not path.exists():
        raise PatchSAEError(f"There is no {path.absolute()}: correct the path.")
    found = _open(path, source)
    # one container, told by content
    pickled = {Project.PATCHSAE, Project.PRISMA, Project.DICTIONARY_LEARNING}
    if source not in (None, found.source) and not {source, found.source} <= pickled:
        raise PatchSAEError(f"{path} has the layout of {found.source}, not of {source}: name that source.")
    return found._replace(source=Project(source or found.source), state=plain_names(found.state))


def _open(path: Path, source: Project | str | None) -> Checkpoint:
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        folder = path if path.is_dir() else path.parent
        if (folder / CONFIG).is_file() and not (folder / SAELENS_CONFIG).is_file():
            raise PatchSAEError(f"{folder} is in this project's own format: read it with SAE.load.")
        for kind, name in SAFETENSORS.items():
            wanted = source in (None, kind) and (path.suffix != ".safetensors" or path.name == name)
            if wanted and (folder / name).is_file():
                file = folder / name
                return Checkpoint(kind, file, read_json(folder / SAELENS_CONFIG), _read_safetensors(file))
        if path.suffix == ".safetensors":
            names = " or ".join(SAFETENSORS.values())
            raise PatchSAEError(f"{path} is not called {names}: keep the name it was published under.")
        path = _only_checkpoint(folder)
    with path.open("rb") as stream:
        line = stream.readline(1 << 20) if stream.read(1) == b"{" else b""
    if line:
        header = _parse_json(path, b"{" + line)
        return Checkpoint(Project.SAEV, path, header, _mapping(path, read_pickle(path, 1 + len(line))))
    return _open_pickled(path)


def _open_pickled(path: Path) -> Checkpoint:
    content, beside = _mapping(path, read_pickle(path)), path.parent / "config.json"
    if "state_dict" in content:
        config = next((content[key] for key in ("cfg", "config") if key in content), None)
        config = vars(config) if isinstance(config, StandIn) else config
        if not isinstance(config, dict):
            raise PatchSAEError(f"{path} has a state_dict but no cfg: get the file as it was published.")
        prisma = "activation_fn_str" in config
        if prisma and beside.is_file():  # as Prisma does: the file beside is the corrected one
            config = read_json(beside)
        kind = Project.PRISMA if prisma else Project.PATCHSAE
        return Checkpoint(kind, path, config, _mapping(path, content["state_dict"]))
    if not beside.is_file():
        raise PatchSAEError(
            f"{path} holds no cfg and has no config.json beside it: keep the two files of a published SAE "
            "in one folder."
        )
    config = read_json(beside)
    kind = Project.DICTIONARY_LEARNING if "trainer" in config else Project.PRISMA
    return Checkpoint(kind, path, config, content)


def _only_checkpoint(folder: Path) -> Path:
    found = sorted(folder.glob("*.pt"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:5])
        raise PatchSAEError(f"{folder} holds {len(found)} checkpoints ({names}): name one of the files.")
    nested = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
    hint = f"name one of its folders ({', '.join(nested[:5])})" if nested else "give the folder of one SAE"
    raise PatchSAEError(f"{folder} holds no SAE of a known layout ({', '.join(Project)}): {hint}.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a published file of names and values.

    Raises
    ------
    PatchSAEError : it is missing, or no JSON of that kind.
    """
    if not path.is_file():
        raise PatchSAEError(f"There is no {path}: keep the files of a published SAE in one folder.")
    return _parse_json(path, path.read_bytes())


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PatchSAEError(f"{path} holds no valid JSON ({error}): fetch the file again.") from error
    return _mapping(path, value)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise PatchSAEError(f"{path} is damaged ({error}): fetch the file again.") from error


def _mapping(path: Path, value: object) -> dict:
    if not isinstance(value, dict):
        raise PatchSAEError(
            f"{path} holds a {type(value).__name__} where an SAE has named values: give the file of an SAE."
        )
    return value


def choose(c: Checkpoint, name: str, meanings: Mapping[Any, Any], default: Any = REQUIRED) -> Any:
    """Look up what the configuration's field `name` means, or refuse a value that is not in `meanings`."""
    value = c.config.get(name, default)
    if value is REQUIRED:
        raise PatchSAEError(f"The configuration of {c.file} has no {name}: get the files as published.")
    if not isinstance(value, (str, bool, int, type(None))) or value not in meanings:
        known = " or ".join(str(key) for key in meanings if key is not None)
        raise PatchSAEError(
            f"{c.file} has {name}={str(value):.60}, which PatchSAE's SAE does not compute: use one with "
            f"{name}={known}."
        )
    return meanings[value]


def number(c: Checkpoint, name: str, kind: type = float, default: Any = REQUIRED) -> Any:
    """Read the configuration's field `name` as a number of type `kind`, or refuse it."""
    value = c.config.get(name, default)
    if value is REQUIRED or isinstance(value, bool) or not isinstance(value, (int, kind)):
        what = "is missing" if value is REQUIRED else f"is {str(value):.60}"
        raise PatchSAEError(
            f"The configuration of {c.file} is damaged, as {name} {what} where a number belongs: get the "
            "files as published."
        )
    return kind(value)


def inner(c: Checkpoint, name: str) -> Checkpoint:
    """Narrow the configuration to the group of fields called `name`."""
    group = c.config.get(name)
    if not isinstance(group, dict):
        raise PatchSAEError(f"The configuration of {c.file} lacks the group {name}: get it as published.")
    return c._replace(config=group)


def tensors(c: Checkpoint, layout: Layout, ignore: Collection[str] = ()) -> dict[str, Tensor]:
    """Give the source's tensors our names and orientation, in float32, after checking every shape.

    `layout` maps our name to the source's name and dimensions there; matrices become [d_sae, d_in]. A
    tensor that is neither in `layout` nor in `ignore` is refused, because the source would have used it.
    """
    names = {theirs: dimensions for theirs, dimensions in layout.values()}
    if missing := sorted(names.keys() - c.state.keys()):
        raise PatchSAEError(
            f"{c.file} lacks {', '.join(missing)}, which files of {c.source} have: name its source, or "
            "fetch it again."
        )
    if unknown := sorted(map(str, c.state.keys() - names.keys() - set(ignore))):
        raise PatchSAEError(
            f"{c.file} also holds {', '.join(unknown[:5])}, which a plain SAE has no use for: PatchSAE "
            "computes no gates, skip connections or transcoders; use a plain SAE."
        )
    for name in names:
        _check_dense(c.file, name, c.state[name])
    theirs, dimensions = layout["W_dec"]
    # not strict: a tensor of another rank leaves a size unknown, and the comparison below names it
    sizes = dict(zip(dimensions, c.state[theirs].shape, strict=False)) | _declared_sizes(c)
    for name, dimensions in names.items():
        expected, found = [sizes.get(d) for d in dimensions], list(c.state[name].shape)
        if found != expected:
            raise PatchSAEError(
                f"{c.file} has {name} of shape {found}, not {expected}: the tensors and the configuration "
                "belong to different SAEs, so fetch both again."
            )
    found = {
        ours: (c.state[theirs].T if dimensions == ("d_in", "d_sae") else c.state[theirs]).float()
        for ours, (theirs, dimensions) in layout.items()
    }
    # after the conversion: what float64 holds may be infinite in float32
    check_weights(c.file, {layout[ours][0]: value for ours, value in found.items()})
    return found


def _check_dense(file: Path, name: str, value: object) -> None:
    dense = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    if not dense or not value.is_floating_point():
        raise PatchSAEError(f"{file} holds no dense tensor of real numbers as {name}: fetch it again.")


def _declared_sizes(c: Checkpoint) -> dict[str, int]:
    """Find d_in and d_sae by any of their names, without those that are missing, null or 0."""

    def first(*names: str) -> int | None:
        return next((number(c, name, int) for name in names if c.config.get(name)), None)

    d_in = first("d_in", "d_model", "d_vit", "activation_dim")
    factor = first("expansion_factor", "exp_factor")
    d_sae = first("d_sae", "num_latents", "dict_size") or (d_in and factor and d_in * factor)
    return {name: size for name, size in (("d_in", d_in), ("d_sae", d_sae)) if size}
