"""The model cards of what the repository ships say what the cards beside the weights say."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from patchbook.model_cards import cards, clip_card, main, small_clip
from patchbook.shipped import read_index, shelf
from patchsae.runs.errors import PatchSAEError


def test_every_shipped_model_has_its_card_and_it_is_up_to_date():
    made = cards()
    assert {path.parent for path in made} == {small_clip(), *(shelf() / name for name in read_index())}
    for path, text in made.items():
        again = "run `python -m patchbook.model_cards`"
        assert path.is_file() and path.read_text("utf-8") == text, f"{path} is not its card.json's: {again}"


@pytest.mark.parametrize("path", list(cards()), ids=lambda path: path.parent.name)
def test_a_card_has_the_hubs_form(path):
    text = path.read_text("utf-8")
    assert text.startswith("---\n")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "mit" and head["library_name"] and head["tags"]
    assert text.count("\n# ") == 1 and "## Limits" in text and "CC BY-SA 4.0" in text


def test_the_clips_card_follows_its_numbers(tmp_path):
    for name in ("card.json", "open_clip_config.json"):
        shutil.copyfile(small_clip() / name, tmp_path / name)
    card = json.loads((tmp_path / "card.json").read_text())
    card["accuracy"]["sketch"]["trained"]["concept"] = 0.12345
    card["images_seen"] = 1234567
    (tmp_path / "card.json").write_text(json.dumps(card))
    text = clip_card(tmp_path)
    assert "| 12.3% |" in text and "1,234,567 scenes" in text
    (tmp_path / "card.json").unlink()
    with pytest.raises(PatchSAEError, match="card.json' cannot be read"):
        clip_card(tmp_path)


def test_the_command_names_what_it_writes(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("patchbook.model_cards.cards", lambda: {tmp_path / "card.md": "x"})
    assert main([]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'card.md'}\n"
    assert (tmp_path / "card.md").read_text() == "x"
