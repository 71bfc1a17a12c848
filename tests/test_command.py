"""The command `patchsae`: what help tells, exit codes; what each command does is tested with its room."""

import inspect
import re
import subprocess
import sys

import docstring_parser
import numpy as np
import pytest
from PIL import Image

from patchsae.command import OWN, main
from patchsae.runs.stage import Stage


@pytest.mark.parametrize("name", OWN)
def test_help_explains_every_option_with_its_type_and_default(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    text = " ".join(re.sub(r"[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    assert left.value.code == 0 and "Exit code: 0 done" in text
    told = {one.arg_name: one.description for one in docstring_parser.parse(OWN[name].__doc__).params}
    assert list(told) == list(inspect.signature(OWN[name]).parameters)
    for option, parameter in inspect.signature(OWN[name]).parameters.items():
        assert " ".join(told[option].split()) in text, option
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert f"--{option.replace('_', '-')}" in text


def test_a_command_that_is_none_and_no_command_at_all(capsys):
    assert main(["explode"]) == 2
    assert capsys.readouterr().err.startswith("error: 'explode' is no command: give one of check, data,")
    assert main([]) == 0 and "usage: patchsae COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["export", "only-one"])
    assert left.value.code == 2


def test_commands_of_other_packages_are_entry_points(monkeypatch, capsys):
    class Point:
        name, module = "other", "somewhere.else"

        def load(self):
            return lambda words: len(words)

    monkeypatch.setattr("patchsae.command.entry_points", lambda group: [Point()])
    assert main(["other", "a", "b", "c"]) == 3
    assert main(["--help"]) == 0 and "(of somewhere.else; see its --help)" in capsys.readouterr().out


def test_check_tells_of_a_result_that_lost_a_part(tmp_path, capsys):
    stage = Stage.open(tmp_path, "numbers", {"n": 1}, version=1)
    (stage.path / "numbers.txt").write_text("1 2 3")
    stage.finish("numbers.txt")
    assert main(["check", str(tmp_path)]) == 0 and "is as it was made" in capsys.readouterr().out
    (stage.path / "numbers.txt").write_text("1 2")
    assert main(["check", str(tmp_path)]) == 1 and "numbers.txt" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: There is no folder")


def test_nothing_heavy_is_loaded_before_a_command_runs():
    code = "import sys, patchsae.command as c; c.main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_pictures_are_looked_for_before_a_model_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("patchsae.command._clip", lambda *_: pytest.fail("a model was asked for"))
    for folder, told in ((tmp_path, "no images under"), (tmp_path / "none", "there is no folder")):
        assert main(["explore", "--images", str(folder), "--out", str(tmp_path / "page.html")]) == 2
        assert capsys.readouterr().err.startswith(f"error: {told}")


def test_this_projects_own_model_and_autoencoder_make_a_page_of_a_folder(tmp_path, capsys):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    words = ["--images", str(tmp_path), "--model", "patchsae:small_clip", "--sae", "patchsae:sae/main"]
    more = ["--out", str(tmp_path / "page.html"), "--results", str(tmp_path / ".results"), "--quiet"]
    assert main(["explore", *words, *more]) == 0
    assert "latents on 3 pictures: open file://" in capsys.readouterr().out
    assert main(["explore", *words[:-1], "patchsae:sae/none", *more]) == 2
    assert "there is no 'patchsae:sae/none' in" in capsys.readouterr().err
    assert main(["explore", *words[:-1], "patchsae:../lib", *more]) == 2
