"""workflow/: its settings name what exists, and Snakemake draws the DAG that the notebooks need."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from patchbook.order import READS
from patchbook.parameters import check_parameters, read_parameters
from patchbook.scenes.embedded import DATASETS
from patchsae.images.benchmark_table import BENCHMARKS
from patchsae.runs.stage import project_root

ROOT = project_root()
WORKFLOW = ROOT / "workflow"
SNAKEFILE = (WORKFLOW / "Snakefile").read_text(encoding="utf-8")
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
SHARED = ("scale", "data", "prompts", "device", "workers")

needs_snakemake = pytest.mark.skipif(
    not SNAKEMAKE.exists(), reason="snakemake is an extra: see 'Sweeps and clusters' in README.md"
)


def read(name: str) -> dict:
    return yaml.safe_load((WORKFLOW / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def settings() -> dict:
    return read("config.yaml")


@pytest.fixture(scope="module")
def chapters() -> list[str]:
    """Return the notebooks of the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [Path(page["file"]).name for page in toc["chapters"] if "notebooks/" in page["file"]]


def test_every_notebook_of_the_book_has_a_rule_and_is_wanted(settings, chapters):
    assert list(READS) == chapters == settings["notebooks"]
    for number, before in enumerate(READS.values()):
        assert set(before) <= set(chapters[:number])


def test_settings_name_parameters_of_the_notebooks(settings, chapters):
    notebooks = [ROOT / "notebooks" / f"{chapter}.ipynb" for chapter in chapters]
    for name in SHARED:
        takers = [notebook for notebook in notebooks if name in read_parameters(notebook)]
        assert takers, name
        for notebook in takers:
            check_parameters(notebook, {name: settings[name]})
    for backbone in settings["backbones"]:
        check_parameters(notebooks[0], {n: v for n, v in backbone.items() if n != "name"})
    for name, value in (("seed", settings["seeds"][0]), ("dataset", settings["datasets"][0])):
        check_parameters(ROOT / "notebooks/04_masking.ipynb", {name: value})
    check_parameters(ROOT / "notebooks/05_adaptation.ipynb", {"prompt_seed": settings["prompt_seeds"][0]})


def test_data_sets_and_prompts_exist(settings):
    assert settings["datasets"] == list(DATASETS)
    for dataset in settings["datasets"]:
        for seed in settings["prompt_seeds"]:
            assert (ROOT / "artefacts/prompts/maple" / dataset / f"seed{seed}/prompts.json").is_file()


def test_the_papers_settings_change_what_there_is(settings):
    paper = read("paper.yaml")
    assert paper["datasets"] == list(BENCHMARKS)
    for name in set(paper) - set(settings):
        assert check_parameters(ROOT / "notebooks" / f"{name}.ipynb", paper[name]) == paper[name]
    assert set(settings["notebooks"]) == set(paper) - set(settings)


def test_the_allocator_is_set_as_in_the_makefile():
    tunables = re.search(r"GLIBC_TUNABLES \?= (\S+)", (ROOT / "Makefile").read_text())[1]
    assert f'"{tunables}"' in SNAKEFILE


def test_the_lock_of_the_extra_holds_it_and_nothing_of_the_other_lock():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    locks = [(folder / "requirements.lock").read_text().splitlines() for folder in (WORKFLOW, ROOT)]
    assert set(extras["cluster"]) <= set(locks[0])
    first, second = ({line.split("==")[0].lower() for line in lock if "==" in line} for lock in locks)
    assert not first & second


def dry_run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    """Ask Snakemake what it would do in an empty folder."""
    command = [SNAKEMAKE, "-s", "workflow/Snakefile", "--dry-run", "--directory", tmp_path, *options]
    if "--profile" not in options:
        command += ["--cores", "2"]
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)


def jobs_of(told: subprocess.CompletedProcess) -> dict[str, dict[str, str]]:
    """Return the fields that Snakemake prints of each job, by its output."""
    found = {}
    for block in re.split(r"\n(?:local)?rule ", told.stdout + told.stderr)[1:]:
        fields = dict(re.findall(r"^ +(\w+): (.*)$", block.split("\n[")[0], re.MULTILINE))
        fields["shell"] = (re.findall(r"^Shell command: (.*)$", block, re.MULTILINE) or [""])[0]
        found[fields.get("output", "all")] = fields
    return found


@needs_snakemake
def test_a_sweep_runs_every_combination_once_after_what_it_reads(tmp_path):
    swept = ["seeds=[0,1]", "datasets=[silhouettes,sketch_objects]", "prompt_seeds=[1,3]"]
    told = dry_run(tmp_path, "--configfile", "book/small.yml", "--config", *swept)
    assert told.returncode == 0, told.stderr
    jobs = jobs_of(told)
    jobs.pop("all")
    expected = {}
    for seed in (0, 1):
        top = f"clip/seed{seed}"
        first, second = f"{top}/01_training.ipynb", f"{top}/02_statistics.ipynb"
        expected |= {first: set(), second: {first}, f"{top}/06_appendix.ipynb": {first}}
        expected |= {f"{top}/{name}.ipynb": {first, second} for name in ("03_localization", "07_explorer")}
        for dataset in ("silhouettes", "sketch_objects"):
            masked = f"{top}/{dataset}/04_masking.ipynb"
            expected[masked] = {first}
            for prompt_seed in (1, 3):
                adapted = f"{top}/{dataset}/prompt_seed{prompt_seed}/05_adaptation.ipynb"
                expected[adapted] = {first, second, masked}
    assert set(jobs) == set(expected)
    for output, before in expected.items():
        made = {path for path in jobs[output]["input"].split(", ") if not Path(path).is_absolute()}
        assert made == before, output
    adapted = jobs["clip/seed1/sketch_objects/prompt_seed3/05_adaptation.ipynb"]
    assert "-p seed 1 -p dataset sketch_objects -p prompt_seed 3 " in adapted["shell"]
    assert "-p sizes '[1, 50, 1024]'" in adapted["shell"] and "-p results results/small" in adapted["shell"]
    assert adapted["log"].endswith("/05_adaptation.log") and adapted["threads"] == "2"
    assert "mem_mb=4000" in adapted["resources"] and "gpu" not in adapted["resources"]


@needs_snakemake
def test_the_papers_sweep_asks_slurm_for_a_gpu_each(tmp_path):
    options = ["--configfile", "workflow/paper.yaml", "--config", "data=DATA", "prompts=MAPLE"]
    told = dry_run(tmp_path, "--profile", "workflow/profiles/slurm", *options)
    assert told.returncode == 0, told.stderr
    jobs = jobs_of(told)
    jobs.pop("all")
    assert len(jobs) == 5 + 2 * len(BENCHMARKS)
    for job in jobs.values():
        assert "gpu=1" in job["resources"] and "runtime=" in job["resources"]
        assert "-p scale paper -p data DATA" in job["shell"] and "-p device cuda" in job["shell"]


@needs_snakemake
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("dataset=silhouettes", "There is no setting dataset"),
        ("datasets=[eurosat]", "There is no data set eurosat at this scale"),
        ("backbones=[{name: a, blok: 2}]", "has no parameter 'blok'"),
        ("prompt_seeds=[2]", "artefacts/prompts/maple/concepts/seed2/prompts.json"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(tmp_path, settings, sentence):
    told = dry_run(tmp_path, "--config", settings)
    assert told.returncode != 0 and sentence in told.stdout + told.stderr
