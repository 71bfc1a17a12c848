"""The page of the book that says what was tried, made from the soak's file."""

import json

import pytest

from patchbook.reliability import SOAK, write_page
from patchsae.runs.errors import PatchSAEError

ROW = {"attack": "images", "about": "Pictures.", "tried": 5000, "refused": 2000, "right": 2999}
TOLD = {
    "attacks": [ROW | {"garbage": 1, "traceback": 0}], "training": {}, "commit": "0123456789abcdef",
    "machine": "two cores", "seconds": 600.0, "command": "python soak.py",
}  # fmt: skip


def test_the_page_says_what_was_tried_and_what_was_lost(tmp_path):
    soak = tmp_path / SOAK
    soak.parent.mkdir()
    soak.write_text(json.dumps(TOLD))
    page = write_page(tmp_path, tmp_path / "page.md").read_text()
    assert "made 5,000 attacks in 10 minutes on two cores, at commit `0123456789ab`. **1** of them" in page
    assert "| Pictures. | 5,000 | 2,000 | 2,999 | 1 | 0 |" in page
    assert "make soak" in page and "## What is trusted" in page


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_soak_that_is_missing_or_damaged_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / SOAK).parent.mkdir()
        (tmp_path / SOAK).write_text(text)
    with pytest.raises(PatchSAEError, match="soak.json cannot be read .*make soak"):
        write_page(tmp_path, tmp_path / "page.md")
