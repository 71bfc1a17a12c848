"""Autoencoders given to others: the model card, a folder, and the hub, played by a server here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from hub_server import TOKEN, serve

from patchsae.command import main
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import CONFIG, SAE, WEIGHTS, SAEConfig
from patchsae.sae.sharing import CARD, model_card, pull, push

NAME = "somebody/birds-sae"


@pytest.fixture
def saved(tmp_path):
    """Return the folder of an SAE with a file that is nobody's business beside it."""
    folder = SAE(SAEConfig(d_in=8, expansion=4, activation="topk", k=3, l1=0), seed=5).save(
        tmp_path / "mine"
    )
    (folder / "notes.txt").write_text("private")
    return folder


def parts(card: str) -> tuple[dict, str]:
    """Return the YAML and the page of a model card."""
    empty, head, page = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), page


def test_a_model_card_says_what_the_files_say(saved):
    head, page = parts(model_card(saved))
    assert head["license"] == "other" and head["library_name"] == "patchsae" and "base_model" not in head
    assert "sparse-autoencoder" in head["tags"]
    for row in ("| latents | 32 |", "| width of a token | 8 |", "| activation | topk, k = 3 |"):
        assert row in page
    assert "Measured" not in page and "Trained on" not in page


def test_a_card_adds_where_it_comes_from_and_what_was_measured(saved):
    card = {
        "name": "birds",
        "block": 7,
        "backbone": {"name": "org/clip", "fingerprint": "f" * 64},
        "licence": {"weights": "MIT", "images": "CC BY 4.0"},
        "measured": {"images": 1234, "fvu": 0.12345, "l0": 3.0},
    }
    (saved / CARD).write_text(json.dumps(card))
    head, page = parts(model_card(saved))
    assert head["license"] == "mit" and head["base_model"] == "org/clip"
    assert "# birds" in page and "after block 7 of `org/clip`" in page and "block=7" in page
    assert "| fraction of variance unexplained | 0.1235 |" in page and "On 1,234 images" in page
    assert parts(model_card(saved, "cc-by-4.0"))[0]["license"] == "cc-by-4.0"


@pytest.mark.parametrize(
    ("text", "told"),
    [("[1]", "no table"), ("{", "damaged"), ('{"images": {"seen": 3}}', "of another form")],
)
def test_a_card_that_cannot_be_read_is_named(saved, text, told):
    (saved / CARD).write_text(text)
    with pytest.raises(PatchSAEError, match=f"card.json' is .*{told}"):
        model_card(saved)


def test_an_sae_goes_into_a_folder_and_comes_back(saved, tmp_path):
    shelf = tmp_path / "shelf" / "birds"
    assert push(saved, str(shelf)) == str(shelf)
    assert sorted(path.name for path in shelf.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert (shelf / "README.md").read_text("utf-8") == model_card(saved)
    back = pull(str(shelf), tmp_path / "back")
    assert SAE.load(back).fingerprint() == SAE.load(saved).fingerprint()


def test_nothing_is_written_over_what_is_read(saved):
    for act in (lambda: push(saved, str(saved)), lambda: pull(str(saved), saved)):
        with pytest.raises(PatchSAEError, match="is the folder that is read"):
            act()


def test_what_is_damaged_is_neither_given_nor_taken(saved, tmp_path):
    whole = (saved / WEIGHTS).read_bytes()
    kept = pull(str(saved), tmp_path / "kept")
    (saved / WEIGHTS).write_bytes(whole[:-9])
    for act in (lambda: push(saved, str(tmp_path / "out")), lambda: pull(str(saved), kept)):
        with pytest.raises(PatchSAEError, match="holds no readable SAE"):
            act()
    assert not (tmp_path / "out").exists() and (kept / WEIGHTS).read_bytes() == whole


def test_the_command_gives_and_brings_and_refuses_in_a_sentence(saved, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["push", str(saved), str(there), "--licence", "mit"]) == 0
    assert main(["pull", str(there), str(back)]) == 0
    assert capsys.readouterr().out == f"{there}\n{back}\n"
    assert parts((back / "README.md").read_text("utf-8"))[0]["license"] == "mit"
    assert main(["pull", str(tmp_path / "nothing"), str(back)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def ask(call: str, hub, home, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    """Call `push` or `pull` in a process that takes the server for the hub."""
    code = f"from patchsae.sae.sharing import push, pull\nprint({call})"
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_an_sae_goes_to_the_hub_and_comes_back(saved, tmp_path):
    with serve(NAME) as hub:
        sent = ask(f"push({str(saved)!r}, 'hf:{NAME}', 'mit', private=True)", hub, tmp_path / "home")
        assert sent.returncode == 0, sent.stderr
        assert sent.stdout.strip() == f"{hub.address}/{NAME}"
        assert hub.made["name"] == "birds-sae" and hub.made["organization"] == "somebody"
        assert hub.made.get("visibility") == "private" or hub.made.get("private") is True
        assert sorted(hub.files) == ["README.md", CONFIG, WEIGHTS]  # notes.txt stays at home
        assert hub.files["README.md"].decode() == model_card(saved, "mit")
        assert hub.files[WEIGHTS] == (saved / WEIGHTS).read_bytes()
        brought = ask(f"pull('hf:{NAME}', {str(tmp_path / 'back')!r})", hub, tmp_path / "other", token=None)
        assert brought.returncode == 0, brought.stderr
        assert any(request.startswith("GET") and request.endswith(WEIGHTS) for request in hub.asked)
    assert SAE.load(tmp_path / "back").fingerprint() == SAE.load(saved).fingerprint()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("push({folder!r}, 'hf:somebody/birds-sae')", "could not be sent to the Hugging Face hub"),
        ("pull('hf:somebody/else', 'x')", "could not be fetched from the Hugging Face hub"),
    ],
)
def test_the_hubs_refusal_is_one_sentence(saved, tmp_path, call, told):
    with serve(NAME) as hub:
        asked = ask(call.format(folder=str(saved)), hub, tmp_path / "home", token=None)
    assert asked.returncode == 1
    last = asked.stderr.strip().splitlines()[-1]
    assert "PatchSAEError" in last and told in last
    assert hub.files == {} and not (tmp_path / "x").exists()
