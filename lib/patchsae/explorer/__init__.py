"""The page on which latents are looked at (Fig. 12): live in JupyterLab, or from disk without a network.

What is shown is computed here as plain arrays, kept as blocks on disk, and drawn by one ES module.
Another chart, list or way to choose on that page belongs here, and so does another way to save it.
"""

from patchsae.explorer.answers import Change, Pictures
from patchsae.explorer.blocks import ReferenceSet, Shown, write_blocks
from patchsae.explorer.data import ExplorerConfig
from patchsae.explorer.names import Vocabulary
from patchsae.explorer.widget import Explorer

__all__ = [
    "Change",
    "Explorer",
    "ExplorerConfig",
    "Pictures",
    "ReferenceSet",
    "Shown",
    "Vocabulary",
    "write_blocks",
]
