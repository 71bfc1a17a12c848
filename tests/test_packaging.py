"""pyproject.toml, environment.yml, requirements.lock and the Makefile name the same versions."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from patchsae.runs.stage import project_root

ROOT = project_root()


def pins(lines) -> dict[str, str]:
    """Return name -> exact version of requirement lines, refusing any other kind."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, line
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is named twice"
        found[name] = specifier.version
    return found


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def direct(project) -> dict[str, str]:
    extras = project["optional-dependencies"]
    return pins([*project["dependencies"], *extras["book"], *extras["test"]])


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    return pins((ROOT / "requirements.lock").read_text().splitlines())


def test_the_lock_holds_every_direct_version(direct, locked):
    # Triton is torch's to pin where torch is a CUDA build, and the lock serves both
    assert direct == {name: locked.get(name) for name in direct} | {"triton": direct["triton"]}


def test_the_lock_serves_cpu_and_gpu_machines(locked):
    assert not [name for name in locked if re.match("nvidia|cuda|triton", name)]
    assert not [name for name, version in locked.items() if "+" in version]


def test_environment_yml_names_the_same_versions(direct):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    options = [line for line in pip if line.startswith("-")]
    assert options == ["-c requirements.lock", "-e .[book,test]"]
    assert pins(line for line in pip if not line.startswith("-")) == direct


def test_environment_yml_has_a_python_that_the_project_takes(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (python,) = [Requirement(d.replace("=", "==")) for d in environment["dependencies"][:1]]
    (specifier,) = python.specifier
    assert Requirement(f"x{project['requires-python']}").specifier.contains(specifier.version)


def test_the_makefile_installs_the_same_torch(direct):
    assert f"TORCH := torch=={direct['torch']}\n" in (ROOT / "Makefile").read_text()


def test_what_is_installed_is_what_is_locked(locked):
    installed = {name: metadata.version(name).split("+")[0] for name in locked if _is_installed(name)}
    assert installed == {name: locked[name] for name in installed}


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, patchsae; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "[]\n", told.stderr


@pytest.mark.parametrize(
    "target", ["book", "test", "lab", "bench", "clip", "prompts", "saes", "clean", "lock"]
)
def test_make_help_documents_every_target(target):
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert re.search(rf"^make {target} +\S+", told.stdout, re.MULTILINE), told


def test_make_refuses_an_unfit_python_in_one_sentence(tmp_path):
    """Ask with a stand-in that fails the version check, in a copy without an environment."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = ["make", "book", "PYTHON=false"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in refused.stdout
    assert not (tmp_path / ".venv").exists()


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
