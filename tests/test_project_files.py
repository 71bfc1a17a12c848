"""What a published project has beside its code: how to cite it, to work on it, to report a hole."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import patchsae
from patchsae.runs.stage import project_root

ROOT = project_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    for key in ("cff-version", "message", "title", "authors"):  # what the format asks for
        assert citation[key]
    assert citation["version"] == PROJECT["version"] == patchsae.__version__
    assert citation["license"] == PROJECT["license"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", citation["date-released"])
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Lim", "Choi", "Choo", "Schneider"]
    assert paper["year"] == 2025 and "selective remapping" in paper["title"]


def test_the_changes_end_with_this_version():
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heads[0] == "Unreleased" and heads[1].split()[0] == PROJECT["version"]


@pytest.mark.parametrize("name", PAGES)
def test_a_file_that_a_page_names_is_there(name):
    text = (ROOT / name).read_text("utf-8")
    linked = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:lib|book|tests|artefacts|workflow|notebooks|benchmarks)/[\w./-]*)`", text)
    missing = [path for path in (*linked, *named) if not (ROOT / path).exists()]
    assert not missing


def test_working_on_it_takes_a_page():
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 80


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    told = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout + told.stderr
