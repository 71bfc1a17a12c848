"""Make `import torchvision` work beside a torch without CUDA.

torchvision's wheels are compiled against CUDA builds of torch. Beside a CPU build the compiled
operators cannot load, and `import torchvision` (hence open_clip and timm) stops with "operator
torchvision::nms does not exist". Only its Python transforms are needed here, and they ask for no
more than that two operators be declared. Import this module before open_clip, timm or torchvision.
(Tried with torch 2.13.0, torchvision 0.28.0, open_clip_torch 3.3.0 and timm 1.0.31.)

Both also load torch's compiler, two seconds of every start, only to mark a few functions that it is to
leave alone. Nothing is compiled here, so it is loaded when somebody asks for it.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _compiled_operators_load() -> bool:
    """Try torchvision's compiled library, as torchvision itself will."""
    spec = importlib.util.find_spec("torchvision")  # finds the package without running it
    if spec is None or spec.origin is None:
        return False
    for suffix in EXTENSION_SUFFIXES:
        library = Path(spec.origin).with_name("_C" + suffix)
        if library.is_file():
            try:
                torch.ops.load_library(str(library))
                return True
            except OSError:  # compiled against libraries that this torch does not carry
                return False
    return False


def declare_torchvision_operators() -> None:
    """Declare torchvision::nms and torchvision::qnms unless they exist or can be loaded."""
    if "torchvision" in sys.modules or _compiled_operators_load():
        return
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", _SCHEMA)


def _ask_compiler(device: str) -> bool:
    """Ask the compiler itself: torchvision imports the question, and asks it when it runs."""
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device)


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Let modules be imported that mark functions for a compiler which is not loaded."""
    asked, real = "torch._dynamo.utils", torch.compiler.disable
    if "torch._dynamo" in sys.modules:
        yield
        return

    def mark(function: Callable | None = None, *_, **__) -> Callable:
        return function or (lambda one: one)

    sys.modules[asked] = types.ModuleType(asked)
    sys.modules[asked].is_compile_supported = _ask_compiler
    torch.compiler.disable = mark
    try:
        yield
    finally:
        torch.compiler.disable = real
        del sys.modules[asked]


declare_torchvision_operators()
with _without_compiler(), contextlib.suppress(ImportError):  # who needs them says what is wrong with them
    import timm  # noqa: F401
    import torchvision  # noqa: F401
