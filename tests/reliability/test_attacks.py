"""A sample of the soak (`make soak`): nothing wrong is believed, and nothing ends in a traceback."""

import pytest
from attacks import checkpoints, failing_disks, images, pickles, power_losses, stages

SAMPLE = {images: 300, checkpoints: 150, stages: 120, pickles: 60}


@pytest.mark.parametrize("attack", SAMPLE, ids=lambda attack: attack.__name__)
def test_what_was_changed_is_refused_or_harmless(attack, tmp_path):
    tally = attack(SAMPLE[attack], 0, tmp_path)
    assert tally["garbage"] == tally["traceback"] == 0, tally.examples
    assert tally["refused"] > SAMPLE[attack] / 5, dict(tally)


@pytest.mark.parametrize("attack", [failing_disks, power_losses], ids=lambda attack: attack.__name__)
def test_a_result_outlasts_its_disk(attack, tmp_path):
    tally = attack(tmp_path, every=7)  # of them all in the soak
    assert tally["garbage"] == tally["traceback"] == 0, tally.examples
    assert tally["tried"] > 5 and tally["right"], dict(tally)
