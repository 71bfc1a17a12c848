"""Every command that a page shows is one that there is, with options that it has; or says what it needs.

A `# needs: …` line in a block marks the commands below it, to the end of the block.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import shlex
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tyro
import yaml

import patchsae
from patchbook.parameters import check_parameters
from patchsae.command import GROUP, OWN
from patchsae.runs.stage import project_root

ROOT = project_root()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "book").glob("*.md")),
    *sorted((ROOT / "book" / "guides").glob("*.md")),
]
PAGES = [page for page in PAGES if page.name not in ("report.md",)]  # made by the build
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Commands whose options are tried here: each is run as a whole by the test file named.
RUN_BY = {
    "explore": "test_explorer_page.py",
    "data": "test_benchmark_sets.py",
    "import": "test_importers.py",
    "export": "test_importers.py",
    "push": "test_sharing.py",
    "pull": "test_sharing.py",
    "run": "test_run.py",
    "train": "test_training.py",
    "prompts": "test_train_prompts.py",
}
MODULES = {"patchbook.releases": "test_releases.py"}
SCRIPTS = {
    "book/build.py": "test_build.py",
    "tests/test_versions.py": "test_versions.py",
}
OTHERS = ("pre-commit", "jupyter")  # of packages in the lock


def commands(page: Path) -> list[tuple[str, bool]]:
    """Return every command of a page, and whether it says what it needs."""
    found = []
    for language, text in BLOCK.findall(page.read_text("utf-8")):
        if language not in ("bash", "sh", "shell"):
            continue
        marked = False
        for line in text.replace("\\\n", " ").splitlines():
            marked = marked or line.startswith("# needs: ")
            words = line.partition("  #")[0].strip()
            if words and not words.startswith("#"):
                found.append((words, marked))
    return found


ALL = [(page.relative_to(ROOT).as_posix(), *one) for page in PAGES for one in commands(page)]


def test_commands_are_found():
    assert len(ALL) > 30 and ("README.md", "make book", False) in ALL
    assert sum(marked for *_, marked in ALL) >= 10


def try_options(name: str, words: list[str]) -> None:
    """Read a command's words as it would, and run nothing."""
    if name in OWN:
        told = []
        stand_in = functools.wraps(OWN[name])(lambda *given, **named: told.append((given, named)))
        tyro.cli(stand_in, args=words)
        assert told
        return
    (point,) = entry_points(group=GROUP, name=name)
    parser = importlib.import_module(point.module)._parser()
    if "--help" in words:
        assert parser.format_help()
        return
    given = parser.parse_args(words)
    if name == "run":  # its parameters, too
        assert check_parameters(ROOT / given.notebook, dict(given.p))


@pytest.mark.parametrize(
    ("page", "command", "marked"), ALL, ids=[f"{page}: {command[:60]}" for page, command, _ in ALL]
)
def test_a_command_is_there_with_its_options_or_says_what_it_needs(page, command, marked):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    name = words[0].removeprefix(".venv/bin/")
    if name == "make":
        told = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True)
        assert told.returncode == 0, told.stderr
    elif name == "patchsae":
        assert "main(" in (ROOT / "tests" / RUN_BY[words[1]]).read_text("utf-8")
        try_options(words[1], words[2:])
    elif name == "python" and words[1] == "-m" and words[2] in MODULES:
        assert "main(" in (ROOT / "tests" / MODULES[words[2]]).read_text("utf-8")
        importlib.import_module(words[2])._parser().parse_args(words[3:])
    elif name == "python" and words[1] in SCRIPTS:
        assert (ROOT / words[1]).is_file() and (ROOT / "tests" / SCRIPTS[words[1]]).is_file()
    elif name == "python" and words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/"))
    elif name in OTHERS:
        lock = (ROOT / "requirements.lock").read_text("utf-8")
        assert re.search(rf"^{name}", lock.replace("_", "-"), re.MULTILINE) and all(
            (ROOT / w).exists() for w in words if w.startswith("notebooks/")
        )
    else:
        assert marked, f"{page}: nothing runs '{command}': put '# needs: …' above it"


PYTHON = [
    (page.relative_to(ROOT).as_posix(), text)
    for page in PAGES
    for language, text in BLOCK.findall(page.read_text("utf-8"))
    if language == "python"
]


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[page for page, _ in PYTHON])
def test_python_on_a_page_uses_names_that_there_are(page, text):
    """`tests/test_lens.py` runs these lines on a small model; here every page's names are looked up."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ps":
            assert node.attr in patchsae.__all__, f"{page}: ps.{node.attr}"
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_readme_is_short_and_shows_what_there_is():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 120
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 2
    for picture in pictures:
        assert 10_000 < (ROOT / picture).stat().st_size < 200_000


# --- the forge and the container ---


def workflow() -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text("utf-8"))


def test_the_workflow_runs_the_commands_of_the_readme_on_every_promised_python():
    jobs = workflow()["jobs"]
    classes = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'requires-python = ">=3.11,<3.14"' in classes
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert matrix["include"][0]["os"].startswith("macos")
    runs = {name: [s["run"].strip() for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    assert runs["test"][-1] == "make test" and runs["pages"] == ["make book"]
    assert set(jobs["pages"]["needs"]) == {"style", "test"}
    (built,) = [s["with"]["path"] for s in jobs["pages"]["steps"] if "upload-pages" in s.get("uses", "")]
    assert built == "_build/html"
    for job in jobs.values():
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"[\w./-]+@v\d+", step["uses"])


def test_what_the_workflow_and_the_container_make_are_targets():
    commands = [s["run"] for job in workflow()["jobs"].values() for s in job["steps"] if "run" in s]
    docker = (ROOT / "Dockerfile").read_text("utf-8")
    commands += re.findall(r"^RUN (make .+)$", docker, re.MULTILINE)
    commands.append(" ".join(json.loads(re.search(r"^CMD (\[.+\])$", docker, re.MULTILINE)[1])))
    dev = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
    commands.append(dev["postCreateCommand"])
    made = [command.partition("#")[0].split() for command in commands if command.startswith("make")]
    assert len(made) == 5
    for words in made:
        told = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
    assert (ROOT / ".devcontainer" / dev["build"]["dockerfile"]).is_file()


def test_what_the_container_copies_is_there_and_suffices_to_install():
    docker = (ROOT / "Dockerfile").read_text("utf-8")
    copied = [line.split()[1:-1] for line in docker.splitlines() if line.startswith("COPY")]
    before = [name for names in copied[:2] for name in names]
    assert all((ROOT / name).exists() for name in before)
    needed = ("Makefile", "pyproject.toml", "requirements.lock", "README.md", "LICENSE", "lib")
    assert set(needed) <= set(before)
