"""Few-shot draws against Python's global generator, and manifests that travel between machines."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from miniature import benchmark, imagenet, split_set

from patchbook.scenes.embedded import DATASETS, embedded_dataset
from patchsae.images.benchmark_sets import BENCHMARKS, open_benchmark
from patchsae.images.few_shot import few_shot, read_manifest, write_manifest
from patchsae.images.files import FileImages
from patchsae.images.sets import Dataset
from patchsae.runs.errors import PatchSAEError

SIDE = 32

# Dassl as facts.md §2 tells it, with the global generator and items of text
ORACLE = """
import json, random, sys
from collections import defaultdict

def generate(items, shots):
    by_label = defaultdict(list)
    for item in items:
        by_label[item.split()[0]].append(item)
    out = []
    for of_label in by_label.values():
        out.extend(random.sample(of_label, shots) if len(of_label) >= shots else of_label)
    return out

answers = []
for train, val, shots, seed in json.load(sys.stdin):
    random.seed(seed)
    drawn = generate(train, shots)
    answers.append([drawn, val and generate(val, min(shots, 4))])
json.dump(answers, sys.stdout)
"""


def labelled(labels: list[int], split: str) -> FileImages:
    """Make a set of files that need not exist: drawing looks at labels only."""
    names = [f"{label}/{split}_{i}.jpg" for i, label in enumerate(labels)]
    return FileImages("/nowhere", names, labels, [f"class {i}" for i in range(12)], SIDE, "some", split)


def chosen(images) -> list[str]:
    return [f"{label} {images.key(i)}" for i, label in enumerate(images.labels)]


def test_draws_equal_those_of_a_fresh_global_generator():
    """Sixty sets of random sizes and orders; some classes have fewer images than shots, some none."""
    rng = np.random.default_rng(0)
    cases, ours = [], []
    for case in range(60):
        labels = [rng.integers(0, 1 + case % 12, rng.integers(1, 200)).tolist() for _ in range(2)]
        train, val = labelled(labels[0], "train"), labelled(labels[1], "val") if case % 3 else None
        shots, seed = int(rng.choice([1, 2, 4, 8, 16])), int(rng.integers(0, 2**31)) if case > 3 else case
        few = few_shot(Dataset("some", "Some", train.classnames, "{}", train, train, val), shots, seed)
        ours.append([chosen(few.train), few.val and chosen(few.val)])
        cases.append([chosen(train), val and chosen(val), shots, seed])
    told = subprocess.run(
        [sys.executable, "-c", ORACLE], input=json.dumps(cases), capture_output=True, check=True, text=True
    )
    assert ours == json.loads(told.stdout)


def test_the_global_generator_is_neither_used_nor_moved():
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    train = labelled([0, 1] * 40, "train")
    data = Dataset("some", "Some", train.classnames, "{}", train, train)
    first = chosen(few_shot(data, 8, 1).train)
    assert random.random() == expected
    assert chosen(few_shot(data, 8, 1).train) == first != chosen(few_shot(data, 8, 2).train)


# every way of listing a folder gives an order of its own in each process, as file systems do
PROCESS = """
import json, os, random, sys
data, out, number = sys.argv[1:]
scandir, listdir, order = os.scandir, os.listdir, random.Random(number)

def shuffled(found):
    return order.sample(found, len(found))

class Scan:
    def __init__(self, path="."):
        with scandir(path) as entries:
            self.entries = shuffled(list(entries))
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def close(self):
        pass
    def __iter__(self):
        return iter(self.entries)

os.scandir, os.listdir = Scan, lambda path=".": shuffled(listdir(path))

from pathlib import Path
from patchsae.images.benchmark_sets import open_benchmark
from patchsae.images.few_shot import write_manifest

folder = f"{data}/imagenet/images/train/n01440764"
listings = [os.listdir(folder), [entry.name for entry in os.scandir(folder)]]
listings.append([path.name for path in Path(folder).iterdir()])
hashes = []
for name in ("imagenet", "eurosat"):
    path = write_manifest(f"{out}/{name}.json", open_benchmark(name, data, 32), 2, 7)
    hashes.append(json.loads(path.read_text())["sha256"])
print(json.dumps([listings, hashes]))
"""


def test_the_same_manifest_in_processes_that_list_folders_in_other_orders(tmp_path):
    data = tmp_path / "data"
    imagenet(data, train=9)
    split_set(data, "eurosat")
    hashes = []
    for name in ("imagenet", "eurosat"):
        path = write_manifest(tmp_path / f"{name}.json", open_benchmark(name, data, SIDE), 2, 7)
        hashes.append(json.loads(path.read_text())["sha256"])
    listings = [sorted(os.listdir(data / "imagenet/images/train/n01440764"))]
    for hash_seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", PROCESS, str(data), str(tmp_path), hash_seed],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert not told.returncode, told.stderr
        found, there = json.loads(told.stdout)
        assert there == hashes
        listings += found
    assert all(sorted(listing) == listings[0] for listing in listings)
    assert len({tuple(listing) for listing in listings}) == 7


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_drawn_written_and_read_back(tmp_path, name):
    benchmark(tmp_path, name)
    data = open_benchmark(name, tmp_path, SIDE)
    few = few_shot(data, 2, seed=1)
    assert np.bincount(few.train.labels).tolist() == [2] * len(data.classnames)
    assert few.test is data.test and few.classnames == data.classnames
    path = write_manifest(tmp_path / "few.json", data, 2, seed=1)
    again = read_manifest(path, data)
    assert chosen(again.train) == chosen(few.train)
    assert (again.val is None) == (name == "imagenet")
    assert few.val is None or chosen(again.val) == chosen(few.val)
    # halves come after, and lose nothing
    halves = again.base(), again.novel()
    assert sum(len(half.train) for half in halves) == len(few.train)
    manifest = json.loads(path.read_text())
    assert (manifest["dataset"], manifest["shots"], manifest["seed"]) == (name, 2, 1)
    assert manifest["train"][0] == [few.train.key(0), few.train.labels[0]]
    # val of the miniatures has one image per class
    assert [found["name"] for found in manifest["fewer"]["val"]] == (
        [] if data.val is None else [*data.classnames]
    )


@pytest.mark.parametrize("name", DATASETS)
def test_the_embedded_sets_go_through_the_same_functions(tmp_path, name):
    data = embedded_dataset(name, train=5, test=1)
    path = write_manifest(tmp_path / "few.json", data, 3, seed=1)
    few = read_manifest(path, data)
    assert np.bincount(few.train.labels).tolist() == [3] * len(data.classnames)
    assert few.train.indices.tolist() == few_shot(data, 3, 1).train.indices.tolist()
    with pytest.raises(PatchSAEError, match=f"counts the images of another '{name}'"):
        read_manifest(path, embedded_dataset(name, train=6, test=1))


def test_a_class_with_fewer_images_gives_all_and_is_listed(tmp_path):
    train = labelled([3] * 5 + [0] * 2 + [1] * 3, "train")
    train.classnames = ("a", "b", "c", "d")
    data = Dataset("some", "Some", train.classnames, "{}", train, train)
    assert np.bincount(few_shot(data, 3, 1).train.labels).tolist() == [2, 3, 0, 3]
    manifest = json.loads(write_manifest(tmp_path / "few.json", data, 3, 1).read_text())
    fewer = [{"label": 0, "name": "a", "images": 2}, {"label": 2, "name": "c", "images": 0}]
    assert manifest["fewer"] == {"train": fewer, "val": []}
    with pytest.raises(
        PatchSAEError, match="class 'a' of 'some' has 2 training images, fewer than shots=3"
    ):
        few_shot(data, 3, 1, on_fewer="raise")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    data = embedded_dataset("silhouettes", train=4, test=1)
    for shots in (0, -1, 2.0, True, "16"):
        with pytest.raises(PatchSAEError, match="shots="):
            few_shot(data, shots, 1)
    with pytest.raises(PatchSAEError, match="seed='1'"):
        few_shot(data, 2, "1")
    with pytest.raises(PatchSAEError, match="on_fewer='repeat'"):
        few_shot(data, 2, 1, on_fewer="repeat")
    for half in (data.base(), data.novel(), few_shot(data, 2, 1).base()):
        with pytest.raises(PatchSAEError, match="shots are drawn before"):
            few_shot(half, 2, 1)
    with pytest.raises(PatchSAEError, match="testing only"):
        few_shot(replace(data, train=data.train.subset([])), 2, 1)


@pytest.fixture
def written(tmp_path):
    split_set(tmp_path, "dtd")
    data = open_benchmark("dtd", tmp_path, SIDE)
    return tmp_path, data, write_manifest(tmp_path / "few.json", data, 2, 1)


def test_a_manifest_of_another_set_or_with_missing_images_is_refused(written):
    folder, data, path = written
    split_set(folder, "eurosat")
    with pytest.raises(PatchSAEError, match="is of the data set 'dtd', not of 'eurosat'"):
        read_manifest(path, open_benchmark("eurosat", folder, SIDE))
    keys = json.loads(path.read_text())["train"]
    kept = [i for i in range(len(data.train)) if data.train.key(i) not in (keys[0][0], keys[3][0])]
    with pytest.raises(
        PatchSAEError, match=rf"lists 2 images that 'dtd' lacks under train \({keys[0][0]}, "
    ):
        read_manifest(path, replace(data, train=data.train.subset(kept)))
    with pytest.raises(PatchSAEError, match="has other classes"):
        read_manifest(path, replace(data, classnames=("a", "b", "c")))
    with pytest.raises(PatchSAEError, match="val split, or neither"):
        read_manifest(path, replace(data, val=None))
    split = json.loads((folder / "dtd/split_zhou_DescribableTextures.json").read_text())
    for entry in split["train"]:
        entry[1:] = [[1, "blotchy"], [0, "banded"], entry[1:]][min(entry[1], 2)]
    (folder / "dtd/split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    with pytest.raises(PatchSAEError, match="gives 4 images another label"):
        read_manifest(path, open_benchmark("dtd", folder, SIDE))


def test_an_edited_or_damaged_manifest_is_refused(written):
    folder, data, path = written
    text = path.read_text()
    manifest = json.loads(text)
    for change in (
        {"seed": 2},
        {"train": manifest["train"][1:]},
        {"sha256": "0"},
        {"train": None},
        {"val": 3},
    ):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(PatchSAEError, match="few.json' was damaged or edited"):
            read_manifest(path, data)
    for length in range(0, len(text) - 1, 37):
        path.write_text(text[:length])
        with pytest.raises(PatchSAEError, match="few.json' is no manifest"):
            read_manifest(path, data)
    for other in ("[]", "3", "null", "{}", "\x00"):
        path.write_text(other)
        with pytest.raises(PatchSAEError, match="few.json' is no manifest"):
            read_manifest(path, data)
    path.unlink()
    with pytest.raises(PatchSAEError, match="does not exist; make it with write_manifest"):
        read_manifest(path, data)
    assert sorted(p.name for p in folder.iterdir()) == ["dtd"]  # nothing half-written beside
