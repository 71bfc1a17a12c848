"""The interactive demo (Fig. 12): one ES module, live in JupyterLab and static in the book."""

from .blocks import ReferenceSet, Shown, write_blocks
from .data import ExplorerConfig
from .widget import Explorer

__all__ = ["Explorer", "ExplorerConfig", "ReferenceSet", "Shown", "write_blocks"]
