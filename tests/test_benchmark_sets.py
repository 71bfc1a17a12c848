"""The eleven benchmarks and ImageNet's variants, opened from miniatures of their official layouts."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from miniature import AIRCRAFT, PER_CLASS, SPLIT_SETS, WNIDS, benchmark, imagenet, photo, split_set

from patchsae.command import main
from patchsae.images.benchmark_sets import BENCHMARKS, RECIPES, ROBUSTNESS, open_benchmark, open_found
from patchsae.images.files import load_image
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root

SIDE = 32
# facts.md §2, word for word
TEMPLATES = {
    "imagenet": "a photo of a {}.",
    "caltech-101": "a photo of a {}.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": "a photo of a {}.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "food-101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "sun397": "a photo of a {}.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Make all eleven; tests that change a file copy what they need."""
    data = tmp_path_factory.mktemp("data")
    for name in TEMPLATES:
        benchmark(data, name)
    return data


@pytest.fixture
def eurosat(tmp_path):
    """Make a set to be damaged, and its split."""
    path = split_set(tmp_path, "eurosat")
    return tmp_path, path, json.loads(path.read_text())


def test_the_eleven_are_those_of_table_1_in_its_order():
    assert BENCHMARKS == tuple(TEMPLATES)
    classes = [RECIPES[name].classes for name in BENCHMARKS]
    assert classes == [1000, 100, 37, 196, 102, 101, 100, 397, 47, 10, 101]
    # every image of the original collections is in one part of CoOp's split (Caltech: without two folders)
    collections = {
        "caltech-101": 9144 - 467 - 435,
        "oxford_pets": 7349,
        "stanford_cars": 16185,
        "dtd": 5640,
    }
    collections |= {"oxford_flowers": 8189, "food-101": 101_000, "eurosat": 27_000, "ucf101": 13_320}
    assert {name: sum(RECIPES[name].images) for name in collections} == collections


@pytest.mark.parametrize("name", SPLIT_SETS)
def test_a_split_files_set_opens_with_its_names_labels_and_images(whole, name):
    folder, file, classes = SPLIT_SETS[name]
    data = open_benchmark(name, whole, SIDE)
    assert (data.name, data.template, data.classnames) == (name, TEMPLATES[name], tuple(classes))
    said = json.loads((whole / name / file).read_text())
    for part, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        assert images.split == part and images.name == name and images.classnames == data.classnames
        assert images.labels.tolist() == [label for _, label, _ in said[part]]
        assert [images.key(i) for i in range(len(images))] == [path for path, _, _ in said[part]]
        assert np.bincount(images.labels).tolist() == [PER_CLASS[part]] * len(classes)
    path = whole / name / folder / said["test"][1][0]
    batch = data.test.load([1])
    assert torch.equal(batch.images[0], load_image(path, SIDE)) and batch.labels[0] == said["test"][1][1]
    assert data.test.picture(1).size == (41, 30)
    whole_image = torch.from_numpy(np.array(data.test.picture(1)))
    assert not torch.equal(whole_image, torch.from_numpy(np.array(data.test.picture(0))))


def test_aircraft_opens_from_its_official_lists(whole):
    data = open_benchmark("fgvc_aircraft", whole, SIDE)
    assert data.classnames == tuple(AIRCRAFT) and data.template == TEMPLATES["fgvc_aircraft"]
    for part, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        assert np.bincount(images.labels).tolist() == [PER_CLASS[part]] * len(AIRCRAFT)
        lines = (whole / "fgvc_aircraft" / f"images_variant_{part}.txt").read_text().splitlines()
        names = [f"{images.key(i)[:-4]} {data.classnames[label]}" for i, label in enumerate(images.labels)]
        assert names == lines
    assert data.train.load([5]).images.shape == (1, 3, SIDE, SIDE)


def test_imagenets_val_plays_test_and_names_follow_the_wnids(whole):
    data = open_benchmark("imagenet", whole, SIDE)
    assert data.classnames == tuple(WNIDS.values()) and data.val is None
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(data.test) == 6
    assert data.test.split == "test" and data.test.key(5) == "n02389026/n02389026_1.JPEG"
    path = whole / "imagenet/images/val/n01443537/n01443537_0.JPEG"
    assert torch.equal(data.test.load([2]).images[0], load_image(path, SIDE))


@pytest.mark.parametrize(
    "name, raw, final",
    [
        ("eurosat", ["AnnualCrop", "HerbaceousVegetation", "SeaLake", "Forest"],
         ["Annual Crop Land", "Herbaceous Vegetation Land", "Sea or Lake", "Forest"]),
        ("eurosat", ["Highway", "Industrial", "Pasture", "PermanentCrop", "Residential", "River"],
         ["Highway or Road", "Industrial Buildings", "Pasture Land", "Permanent Crop Land",
          "Residential Buildings", "River"]),
        ("caltech-101", ["Faces", "Leopards", "Motorbikes", "airplanes", "crocodile_head"],
         ["face", "leopard", "motorbike", "airplane", "crocodile_head"]),
        ("stanford_cars", ["AM General Hummer SUV 2000", "Audi 100 Sedan 1994", "2012 Audi TT RS Coupe"],
         ["2000 AM General Hummer SUV", "1994 Audi 100 Sedan", "2012 Audi TT RS Coupe"]),
        ("sun397",
         ["/a/abbey", "/a/apse/indoor", "b/balcony/exterior", "a/airplane_cabin", "outdoor church"],
         ["abbey", "indoor apse", "exterior balcony", "airplane_cabin", "outdoor church"]),
        ("ucf101", ["ApplyEyeMakeup", "TaiChi", "Yo_Yo", "Archery"],
         ["Apply_Eye_Makeup", "Tai_Chi", "Yo_Yo", "Archery"]),
        ("oxford_pets", ["Abyssinian", "american_bulldog", "British_Shorthair"],
         ["abyssinian", "american_bulldog", "british_shorthair"]),
    ],
)  # fmt: skip
def test_raw_class_names_get_their_final_form_and_final_ones_keep_it(tmp_path, name, raw, final):
    file = RECIPES[name].split
    split = {part: [] for part in PER_CLASS}
    for label, classname in enumerate(raw):
        for part in split:
            split[part].append([f"{part}/{label}.jpg", label, classname])
            photo(tmp_path / name / RECIPES[name].folder / part / f"{label}.jpg")
    (tmp_path / name / file).write_text(json.dumps(split))
    assert open_benchmark(name, tmp_path, SIDE).classnames == tuple(final)


def test_caltechs_background_and_easy_faces_are_dropped_and_labels_close_up(tmp_path):
    names = ["BACKGROUND_Google", "Faces", "Faces_easy", "accordion"]
    split = {part: [[f"{part}{i}.jpg", i, n] for i, n in enumerate(names)] for part in ("train", "test")}
    for entries in split.values():
        for path, _, _ in entries:
            photo(tmp_path / "caltech-101/101_ObjectCategories" / path)
    (tmp_path / "caltech-101/split_zhou_Caltech101.json").write_text(json.dumps(split))
    data = open_benchmark("caltech-101", tmp_path, SIDE)
    assert data.classnames == ("face", "accordion") and data.val is None
    assert [(data.train.key(i), y) for i, y in enumerate(data.train.labels)] == [
        ("train1.jpg", 0),
        ("train3.jpg", 1),
    ]


def variant(data, name, folders):
    for folder in folders:
        for i in range(2):
            photo(data / name / RECIPES[name].folder / folder / f"{i}.jpg")
    return data / name


@pytest.mark.parametrize("name", ["imagenet-sketch", "imagenet-adversarial", "imagenet-rendition"])
def test_a_variant_of_imagenet_is_for_testing_and_takes_names_by_wnid(tmp_path, name):
    imagenet(tmp_path)
    folder = variant(tmp_path, name, ["n02389026", "n01440764"])
    (folder / RECIPES[name].folder / "README.txt").write_text("no class")
    data = open_benchmark(name, tmp_path, SIDE)
    assert data.classnames == ("tench", "common sorrel horse") and data.template == "a photo of a {}."
    assert len(data.train) == 0 and data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.novel().test.labels.tolist() == [0, 0]
    assert data.novel().classnames == ("common sorrel horse",)
    # its own list goes before ImageNet's
    (folder / "classnames.txt").write_text("n01440764 a\nn02389026 b c\n")
    assert open_benchmark(name, tmp_path, SIDE).classnames == ("a", "b c")


def test_imagenetv2s_folders_are_label_numbers(tmp_path):
    imagenet(tmp_path)
    names = [f"n{i:08d} class {i}" for i in range(12)]
    folder = variant(tmp_path, "imagenetv2", ["10", "9", "0"])
    (folder / "classnames.txt").write_text("\n".join(names))
    data = open_benchmark("imagenetv2", tmp_path, SIDE)
    assert data.test.labels.tolist() == [0, 0, 9, 9, 10, 10] and data.classnames[10] == "class 10"
    assert data.test.key(2) == "9/0.jpg"
    variant(tmp_path, "imagenetv2", ["12"])
    with pytest.raises(PatchSAEError, match="val/12' is no label of"):
        open_benchmark("imagenetv2", tmp_path, SIDE)


def test_classes_without_a_training_image_are_in_neither_half(eurosat):
    data, path, split = eurosat
    for label in range(3, 6):
        for part, entries in split.items():
            if (label, part) != (4, "train"):
                photo(data / f"eurosat/2750/extra/{part}{label}.jpg")
                entries.append([f"extra/{part}{label}.jpg", label, f"class {label}"])
    path.write_text(json.dumps(split))
    dataset = open_benchmark("eurosat", data, SIDE)  # six classes, five of them trained
    base, novel = dataset.base(), dataset.novel()
    assert base.classnames == dataset.classnames[:3] and novel.classnames == ("class 3", "class 5")
    assert novel.test.labels.tolist() == [0, 1] and novel.val.labels.tolist() == [0, 1]
    assert [novel.test.key(i) for i in range(2)] == ["extra/test3.jpg", "extra/test5.jpg"]


def test_a_name_in_both_halves_is_refused(eurosat):
    data, path, split = eurosat
    for entries in split.values():
        for entry in entries:
            if entry[1] == 2:
                entry[2] = "Forest"
    path.write_text(json.dumps(split))
    dataset = open_benchmark("eurosat", data, SIDE)
    with pytest.raises(PatchSAEError, match="overlap: 'Forest'"):
        dataset.base()


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_missing_is_named_with_the_page_to_get_it_from(tmp_path, name):
    first = "images/train" if name == "imagenet" else RECIPES[name].split or "variants.txt"
    section = RECIPES[name].page
    with pytest.raises(PatchSAEError, match=rf"{name}/{first}.*DATASETS\.md#{section}"):
        open_benchmark(name, tmp_path, SIDE)


def test_raw_annotations_do_not_replace_the_split_file(tmp_path):
    path = split_set(tmp_path, "oxford_flowers")
    path.unlink()
    (path.parent / "imagelabels.mat").write_bytes(b"MATLAB 5.0")
    (path.parent / "cat_to_name.json").write_text('{"1": "pink primrose"}')
    with pytest.raises(
        PatchSAEError, match="split_zhou_OxfordFlowers.json'; get it .*drive.google.com/file/d/1Pp0s"
    ):
        open_benchmark("oxford_flowers", tmp_path, SIDE)
    assert not path.exists()


def test_missing_images_are_counted_and_three_are_shown(eurosat):
    data, _, _ = eurosat
    shutil.rmtree(data / "eurosat/2750/SeaLake")
    with pytest.raises(
        PatchSAEError,
        match=r"lacks 6 of the images .*\(SeaLake/SeaLake_3.jpg, .*_2.jpg, .*_1.jpg, \.\.\.\).*#eurosat",
    ):
        open_benchmark("eurosat", data, SIDE)


def test_each_folder_is_listed_once_and_no_image_is_asked_for(whole, monkeypatch):
    listed, asked = [], []
    listdir, stat = os.listdir, os.stat
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(str(path)) or listdir(path))
    monkeypatch.setattr(os, "stat", lambda path, **k: asked.append(str(path)) or stat(path, **k))
    open_benchmark("sun397", whole, SIDE)
    assert sorted(path.split("SUN397/")[1] for path in listed) == [
        "a/abbey",
        "a/airplane_cabin",
        "a/apse/indoor",
    ]
    assert not any(path.endswith(".jpg") for path in asked)


BAD_ENTRIES = [
    ["Forest/Forest_1.jpg", 1],
    ["Forest/Forest_1.jpg", "1", "Forest"],
    ["Forest/Forest_1.jpg", True, "Forest"],
    ["Forest/Forest_1.jpg", 1.0, "Forest"],
    ["Forest/Forest_1.jpg", -1, "Forest"],
    ["Forest/Forest_1.jpg", 1, ""],
    [7, 1, "Forest"],
    ["", 1, "Forest"],
    ["../secret.jpg", 1, "Forest"],
    ["Forest/../../secret.jpg", 1, "Forest"],
    ["/etc/secret.jpg", 1, "Forest"],
    ["Forest\\secret.jpg", 1, "Forest"],
    "Forest/Forest_1.jpg",
    {"path": "Forest/Forest_1.jpg"},
    None,
]


@pytest.mark.parametrize("entry", BAD_ENTRIES, ids=str)
def test_an_entry_of_the_wrong_kind_or_outside_the_folder_is_named(eurosat, entry):
    data, path, split = eurosat
    split["test"].insert(2, entry)
    path.write_text(json.dumps(split))
    with pytest.raises(PatchSAEError, match=r"split_zhou_EuroSAT.json': entry 2 of 'test' is .*DATASETS"):
        open_benchmark("eurosat", data, SIDE)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda split: split["val"].append(["Forest/x.jpg", 0, "Forest"]),
         "gives label 0 two names, 'Annual Crop Land' and 'Forest' .at Forest/x.jpg"),
        (lambda split: split["test"].append(split["train"][0]), "train and test share 1 images"),
        (lambda split: split["val"].append(["./" + split["test"][0][0], *split["test"][0][1:]]),
         "val and test share 1 images, such as SeaLake/SeaLake_6.jpg"),
        (lambda split: split["test"].append(["x.jpg", 4, "River"]), "no image of label 3 but one of 4"),
        (lambda split: split.pop("test"), "lists train and test"),
        (lambda split: split.update(train=[]), "no image under 'train'"),
        (lambda split: split.update(val={}), "no list under 'val'"),
    ],
)  # fmt: skip
def test_a_split_that_contradicts_itself_is_refused(eurosat, change, message):
    data, path, split = eurosat
    change(split)
    path.write_text(json.dumps(split))
    with pytest.raises(PatchSAEError, match=message):
        open_benchmark("eurosat", data, SIDE)


@pytest.mark.parametrize("text", ["", "{", '{"train": [', "[]", "7", '"x"', "\xff\xfe", "[" * 100_000])
def test_a_damaged_split_file_is_named(eurosat, text):
    data, path, _ = eurosat
    path.write_text(text, "latin1")
    with pytest.raises(PatchSAEError, match="split_zhou_EuroSAT.json.*#eurosat"):
        open_benchmark("eurosat", data, SIDE)


def test_no_cut_of_a_split_file_ends_in_a_traceback(eurosat):
    data, path, _ = eurosat
    text = path.read_text()
    for length in range(0, len(text), 7):
        path.write_text(text[:length])
        with pytest.raises(PatchSAEError, match="split_zhou_EuroSAT"):
            open_benchmark("eurosat", data, SIDE)


@pytest.mark.parametrize("line", ["1025794", "1025794 Concorde", "../1025794 DC-3"])
def test_a_bad_line_of_aircrafts_lists_is_named(whole, tmp_path, line):
    shutil.copytree(whole / "fgvc_aircraft", tmp_path / "fgvc_aircraft")
    path = tmp_path / "fgvc_aircraft/images_variant_val.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(PatchSAEError, match=rf"images_variant_val.txt': line 5 is '{line}'"):
        open_benchmark("fgvc_aircraft", tmp_path, SIDE)


def test_half_an_imagenet_is_named(tmp_path):
    folder = imagenet(tmp_path)
    shutil.rmtree(folder / "images/val/n01443537")
    with pytest.raises(PatchSAEError, match=r"images/val' lacks class folders .*\(n01443537\)"):
        open_benchmark("imagenet", tmp_path, SIDE)
    (folder / "images/val/n01443537").mkdir()
    with pytest.raises(
        PatchSAEError, match=r"images/val' has 1 class folders without an image \(n01443537\)"
    ):
        open_benchmark("imagenet", tmp_path, SIDE)
    photo(folder / "images/val/n01443537/0.JPEG")
    (folder / "classnames.txt").write_text("n01440764 tench\nn02389026 horse\n")
    with pytest.raises(PatchSAEError, match=r"classnames.txt' does not name 1 .*n01443537"):
        open_benchmark("imagenet", tmp_path, SIDE)
    (folder / "classnames.txt").write_text("n01440764 tench\nn01443537\n")
    with pytest.raises(PatchSAEError, match=r"classnames.txt': line 2 is 'n01443537'"):
        open_benchmark("imagenet", tmp_path, SIDE)
    (folder / "classnames.txt").unlink()
    with pytest.raises(PatchSAEError, match="all 1000 classes can do without .there are 3"):
        open_benchmark("imagenet", tmp_path, SIDE)
    shutil.rmtree(folder / "images/val")
    photo(folder / "images/val/ILSVRC2012_val_00000001.JPEG")  # as the archive unpacks
    with pytest.raises(PatchSAEError, match="images/val' holds no folder per class"):
        open_benchmark("imagenet", tmp_path, SIDE)


def test_a_variant_without_any_list_of_names_says_so(tmp_path):
    variant(tmp_path, ROBUSTNESS[1], ["n01440764"])
    with pytest.raises(PatchSAEError, match="imagenet-sketch/classnames.txt.*#imagenet-sketch"):
        open_benchmark(ROBUSTNESS[1], tmp_path, SIDE)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(PatchSAEError, match="'flowers' is unknown.*oxford_flowers"):
        open_benchmark("flowers", tmp_path, SIDE)


def test_images_of_a_set_reach_workers_as_few_bytes(whole):
    data = open_benchmark("imagenet", whole, SIDE).train
    sent = pickle.loads(pickle.dumps(data))
    assert torch.equal(sent.load([3]).images, data.load([3]).images)
    from patchsae.images.files import FileImages

    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(20_000)]
    many = FileImages(whole, names, np.zeros(len(names)), ["a"], SIDE, "many", "train")
    assert len(pickle.dumps(many)) / len(names) < 50  # bytes; the names alone are 26
    assert [many.key(i) for i in (0, 777, -1)] == [names[0], names[777], names[-1]]


def test_complete_benchmarks_are_found_and_incomplete_ones_warned_of(whole, tmp_path):
    for name in ("eurosat", "imagenet", "dtd"):
        shutil.copytree(whole / name, tmp_path / name)
    (tmp_path / "dtd/split_zhou_DescribableTextures.json").unlink()
    with pytest.warns(UserWarning, match="dtd is left out: .*split_zhou_DescribableTextures"):
        found = open_found(tmp_path, SIDE)
    assert [data.name for data in found] == ["imagenet", "eurosat"]


def test_the_paper_scale_holds_imagenet_first_and_what_else_is_there(whole):
    from patchbook.scales import scale
    from patchsae.clip.backbone import load_backbone

    backbone = load_backbone(str(project_root() / "artefacts" / "small_clip"), block=11)
    sets = scale("paper").sets(backbone, str(whole))
    assert [data.name for data in sets.benchmarks] == list(BENCHMARKS)
    assert sets.train is sets.benchmarks[0].train and sets.test.split == "test"
    assert sets.test.load([0]).images.shape[-1] == backbone.image_size


def counted(monkeypatch, data):
    """Take the miniatures for the whole sets."""
    for name in BENCHMARKS:
        found = open_benchmark(name, data, SIDE)
        parts = (found.train, found.val, found.test)
        images = tuple(len(part) for part in parts if part is not None)
        monkeypatch.setitem(
            RECIPES, name, replace(RECIPES[name], classes=len(found.classnames), images=images)
        )


def test_the_command_does_not_call_a_part_complete(whole, tmp_path, capsys, monkeypatch):
    assert main(["data", "--data", str(whole)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "incomplete"] for name in BENCHMARKS]
    assert "4 classes; 12 train, 4 val, 8 test, but the whole set has 100 classes; 3,334 + 3" in lines[6]
    assert "DATASETS.md#fgvcaircraft" in lines[6]
    # an ImageNet of which one image did not arrive has no list that would miss it
    shutil.copytree(whole / "imagenet", tmp_path / "imagenet")
    counted(monkeypatch, whole)
    assert main(["data", "--data", str(tmp_path), "--check", "imagenet"]) == 0
    (tmp_path / "imagenet/images/train/n01443537/n01443537_2.JPEG").unlink()
    assert len(open_benchmark("imagenet", tmp_path, SIDE).train) == 11
    assert main(["data", "--data", str(tmp_path), "--check", "imagenet"]) == 1
    assert "11 train, 6 test, but the whole set has 3 classes; 12 + 6 images" in capsys.readouterr().out


def test_the_command_tells_what_is_there_and_what_is_missing(whole, tmp_path, capsys, monkeypatch):
    counted(monkeypatch, whole)
    assert main(["data", "--data", str(whole)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "complete"] for name in BENCHMARKS]
    assert lines[6].endswith("4 classes; 12 train, 4 val, 8 test")
    shutil.copytree(whole / "eurosat", tmp_path / "eurosat")
    assert main(["data", "--data", str(tmp_path), "--check", "eurosat"]) == 0
    assert main(["data", "--data", str(tmp_path), "--check", "eurosat", "dtd"]) == 1
    out = capsys.readouterr().out
    assert "dtd                   incomplete" in out and "DATASETS.md#dtd" in out
    assert main(["data", "--data", str(tmp_path), "--check", "flowers"]) == 2
    assert main(["data", "--data", str(tmp_path / "absent"), "--check"]) == 2
    assert main(["data", "--data", str(tmp_path), "--download", "ucf101"]) == 2
    assert "'ucf101' cannot be downloaded from here: get it" in capsys.readouterr().err
