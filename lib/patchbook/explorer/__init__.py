"""The interactive demo (Fig. 12): one ES module, live in JupyterLab and static in the book."""

from patchbook.explorer.blocks import ReferenceSet, Shown, write_blocks
from patchbook.explorer.data import ExplorerConfig
from patchbook.explorer.widget import Explorer

__all__ = ["Explorer", "ExplorerConfig", "ReferenceSet", "Shown", "write_blocks"]
