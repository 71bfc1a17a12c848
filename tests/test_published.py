"""The published numbers against the averages that their authors give."""

import numpy as np

from patchbook.chapters.published import TABLE_1
from patchsae.images.benchmark_table import BENCHMARKS


def test_all_eleven_benchmarks_are_there():
    assert set(TABLE_1) == set(BENCHMARKS)


def test_columns_have_the_published_means():
    def mean(field: str, half: int) -> float:
        return np.mean([getattr(row, field)[half] for row in TABLE_1.values()])

    # MaPLe's README; facts.md §0.2
    assert round(mean("official_clip", 0), 2) == 69.34 and round(mean("official_clip", 1), 2) == 74.22
    assert round(mean("official_maple", 0), 2) == 82.28 and round(mean("official_maple", 1), 2) == 75.14
    assert round(mean("clip", 0), 1) == 63.2 and round(mean("maple", 0), 1) == 75.8


def test_every_cell_of_table_1_is_below_the_official_one():
    for name, row in TABLE_1.items():
        for ours, official in ((row.clip, row.official_clip), (row.maple, row.official_maple)):
            assert ours[0] < official[0] and ours[1] < official[1], name


def test_delta_is_that_of_table_1():
    from patchsae.adaptation.remapping import improvement_rate

    rates = {
        name: 100 * improvement_rate(row.clip[0] / 100, row.maple[0] / 100) for name, row in TABLE_1.items()
    }
    for name, printed in {"stanford_cars": 5.82, "imagenet": 13.01, "eurosat": 53.08}.items():
        assert abs(rates[name] - printed) < 0.02
