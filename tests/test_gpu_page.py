"""The page of the book that says what was measured on GPUs, made from the files of `make gpu`."""

import json
import shutil

import pytest

from patchbook.gpu_page import write_page
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    for path in (project_root() / "benchmarks").glob("gpu-*.json"):
        shutil.copy(path, tmp_path / "benchmarks")
    return tmp_path


def test_the_page_shows_what_the_files_hold(clone):
    path = next((clone / "benchmarks").glob("gpu-*.json"))
    found = json.loads(path.read_text())
    page = write_page(clone, clone / "page.md").read_text()
    assert f"## {found['machine']['gpu']}" in page
    for row in found["parts"]["step"]["rows"] + found["parts"]["pass"]["rows"]:
        assert row["other_name"] in page
    assert f"{found['parts']['pass']['rows'][0]['ours']:,.0f} |" in page
    assert "make gpu" in page and "nan" not in page


def test_a_part_that_failed_or_is_absent_is_said(clone):
    path = next((clone / "benchmarks").glob("gpu-*.json"))
    found = json.loads(path.read_text())
    found["parts"] = {"nccl": {"failed": "PatchSAEError: torchrun failed", "seconds": 1.0}}
    path.write_text(json.dumps(found))
    page = write_page(clone, clone / "page.md").read_text()
    assert "*nccl* failed: PatchSAEError: torchrun failed" in page and "*step* was not measured." in page


def test_without_a_card_the_page_says_so(tmp_path):
    assert "No card was measured yet." in write_page(tmp_path, tmp_path / "page.md").read_text()


@pytest.mark.parametrize("text", ["{", "{}", '{"machine": {}, "parts": []}'])
def test_a_damaged_file_is_named(clone, text):
    path = next((clone / "benchmarks").glob("gpu-*.json"))
    path.write_text(text)
    with pytest.raises(PatchSAEError, match=f"{path.name} cannot be read .*make gpu"):
        write_page(clone, clone / "page.md")
