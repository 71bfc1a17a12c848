"""A Sphinx extension: the book's search finds no page for the names of its parameters."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.search import WordCollector

UNSEARCHED = {"tag_parameters", "tag_injected-parameters"}
"""Classes of cells that every chapter has, nearly alike: a word in them leads nowhere."""


def setup(app: Any) -> dict[str, bool]:
    """Leave cells of parameters out of the index that the search reads."""
    collect = WordCollector.dispatch_visit

    def visit(self: WordCollector, node: nodes.Node) -> None:
        if isinstance(node, nodes.Element) and UNSEARCHED & set(node.get("classes", ())):
            raise nodes.SkipNode
        collect(self, node)

    WordCollector.dispatch_visit = visit
    return {"parallel_read_safe": True, "parallel_write_safe": True}
