"""Image sets on disk: CLIP's resizing to the last bit, laziness, class halves, bad files."""

import json
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import patchsae.runs.compat  # noqa: F401  (before torchvision)
from patchbook.scenes.embedded import SINGLE, SceneSet
from patchsae.clip import files as clip_files
from patchsae.images import files as library
from patchsae.images.contents import Memory
from patchsae.images.files import (
    FileImages,
    FolderImages,
    Frame,
    PathList,
    files_in,
    load_image,
    open_image,
    resize_and_crop,
)
from patchsae.images.sets import Dataset
from patchsae.runs.errors import PatchSAEError

# isort: split
from open_clip.transform import image_transform
from tiny import tiny_backbone
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

SIDE = 32
ODD_SIZES = [
    (32, 32), (33, 32), (32, 33), (37, 91), (91, 37), (301, 57), (57, 600), (640, 427), (335, 500),
    (5, 3), (1, 9), (9, 1), (31, 64), (113, 224), (999, 334),
]  # fmt: skip


def pixels(width, height, mode="RGB", seed=0) -> Image.Image:
    """Make noise under a ramp, which a shift by one pixel changes everywhere."""
    rng = np.random.default_rng([seed, width, height])
    ramp = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    array = (ramp + rng.integers(0, 36, (height, width, 4))).astype(np.uint8)
    return Image.fromarray(array, "RGBA").convert(mode)


def by_torchvision(path, side) -> torch.Tensor:
    """Preprocess as the released code does: RGB first, then CLIP's Resize and CenterCrop."""
    transform = Compose([Resize(side, interpolation=InterpolationMode.BICUBIC), CenterCrop(side)])
    with Image.open(path) as image:
        return torch.from_numpy(np.array(transform(image.convert("RGB")))).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path):
    """Seven classes of two images, in every kind of file that occurs."""
    root = tmp_path / "pets"
    kinds = [
        ("RGB", "jpg"),
        ("L", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("CMYK", "jpg"),
        ("1", "bmp"),
        ("RGB", "webp"),
    ]
    for label, (mode, suffix) in enumerate(kinds):
        place = root / f"class_{label}"
        place.mkdir(parents=True)
        for i in range(2):
            pixels(40 + 7 * label, 61 - 5 * i, mode, seed=label).save(place / f"{i}.{suffix}")
    (root / "class_0" / "notes.txt").write_text("not an image")
    return root


@pytest.mark.parametrize("side", [32, 112])
@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
def test_resize_and_crop_equal_torchvision(tmp_path, size, side):
    path = tmp_path / "image.png"
    pixels(*size).save(path)
    assert torch.equal(load_image(path, side), by_torchvision(path, side))


def test_many_sizes_equal_torchvision(tmp_path):
    path = tmp_path / "image.png"
    for width, height in np.random.default_rng(0).integers(2, 150, (150, 2)):
        pixels(width, height).save(path)
        assert torch.equal(load_image(path, 24), by_torchvision(path, 24)), (width, height)


def test_every_kind_of_file_is_rgb_as_by_torchvision(folder):
    images = FolderImages(folder, SIDE)
    (batch,) = images.batches(len(images))
    assert batch.images.shape == (14, 3, SIDE, SIDE) and batch.images.dtype == torch.uint8
    for path, image in zip(images.paths, batch.images, strict=True):
        assert torch.equal(image, by_torchvision(path, SIDE)), path
    grey = batch.images[2]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_exif_orientation_is_left_alone_as_by_torchvision(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    path = tmp_path / "turned.jpg"
    pixels(60, 41).save(path, exif=exif)
    assert torch.equal(load_image(path, SIDE), by_torchvision(path, SIDE))


def test_labels_and_names_follow_the_folders(folder):
    images = FolderImages(folder, SIDE, split="train")
    assert images.name == "pets" and images.split == "train" and len(images) == 14
    assert images.classnames == tuple(f"class {i}" for i in range(7))
    assert images.labels.tolist() == [i for i in range(7) for _ in range(2)]
    assert all(
        path.parent.name == f"class_{y}" for path, y in zip(images.paths, images.labels, strict=True)
    )


def test_batches_keep_order_and_decode_one_batch_at_a_time(folder, monkeypatch):
    decoded = []

    def counted(path, side):
        decoded.append(path)
        return load_image(path, side)

    monkeypatch.setattr(library, "load_image", counted)
    images = FolderImages(folder, SIDE)
    for i, batch in enumerate(images.batches(4)):
        assert decoded == images.paths[: 4 * (i + 1)]  # none before it is asked for
        assert batch.indices.tolist() == list(range(14))[4 * i : 4 * i + 4]
        assert batch.labels.tolist() == images.labels[batch.indices].tolist()
    assert len(decoded) == 14
    asked = [9, 0, 3, 3, 13]
    parts = list(images.batches(2, indices=asked))
    assert [len(part.images) for part in parts] == [2, 2, 1]
    assert torch.cat([part.indices for part in parts]).tolist() == asked
    together = torch.cat([part.images for part in parts])
    expected = torch.stack([load_image(images.paths[i], SIDE) for i in asked])
    assert torch.equal(together, expected)
    assert list(images.batches(4, indices=[])) == []


def test_subset_keeps_labels_and_counts_from_zero(folder):
    images = FolderImages(folder, SIDE)
    part = images.subset([13, 2, 5], split="few")
    assert part.split == "few" and part.classnames == images.classnames
    assert part.labels.tolist() == [6, 1, 2]
    batch = part.load([1, 0])
    assert batch.indices.tolist() == [1, 0] and batch.labels.tolist() == [1, 6]
    assert torch.equal(batch.images, images.load([2, 13]).images)
    assert torch.equal(part.subset([2]).load([0]).images, images.load([5]).images)
    for wrong in ([14], [-1]):
        with pytest.raises(PatchSAEError, match=r"pets.*0\.\.13"):
            images.subset(wrong)


def test_classes_are_relabelled_in_the_order_given(folder):
    images = FolderImages(folder, SIDE)
    part = images.classes([5, 2])
    assert part.classnames == ("class 5", "class 2")
    assert part.labels.tolist() == [1, 1, 0, 0]  # images stay in the order of the set
    batch = part.load([0, 3])
    assert batch.labels.tolist() == [1, 0]
    assert torch.equal(batch.images, images.load([4, 11]).images)


def test_base_is_the_larger_half_and_novel_the_rest(folder):
    images = FolderImages(folder, SIDE)
    whole = Dataset("pets", "Pets", images.classnames, "a photo of a {}", images, images)
    base, novel = whole.base(), whole.novel()
    assert base.classnames == images.classnames[:4] and novel.classnames == images.classnames[4:]
    for half in (base, novel):
        assert half.template == whole.template and half.name != whole.name
        for part in (half.train, half.test):
            assert part.classnames == half.classnames
            assert set(part.labels) == set(range(len(half.classnames)))
    assert base.name != novel.name
    seen = [set(half.test.indices.tolist()) for half in (base, novel)]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(14))


FINGERPRINTS = """
import json, sys
from patchsae.images.contents import Memory
from patchsae.images.files import FolderImages
images = FolderImages(sys.argv[1], 32)
parts = images, images.subset([3, 1]), images.classes([5, 2])
print(json.dumps([part.fingerprint() for part in parts]))
"""


def fingerprints(root) -> list[str]:
    images = FolderImages(root, SIDE)
    return [part.fingerprint() for part in (images, images.subset([3, 1]), images.classes([5, 2]))]


def test_fingerprint_is_the_same_in_every_process(folder):
    other_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    told = subprocess.run(
        [sys.executable, "-c", FINGERPRINTS, str(folder)],
        env={**os.environ, "PYTHONHASHSEED": other_seed},
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(told.stdout) == fingerprints(folder)


def test_fingerprint_tells_sets_apart(folder):
    images = FolderImages(folder, SIDE)
    found = [
        *fingerprints(folder),
        FolderImages(folder, SIDE + 1).fingerprint(),
        images.subset([1, 3]).fingerprint(),
        images.classes([2, 5]).fingerprint(),
        images.subset(np.flatnonzero(np.isin(images.labels, [5, 2]))).fingerprint(),
    ]
    assert len(set(found)) == len(found)


def test_fingerprint_follows_the_content(folder):
    before = FolderImages(folder, SIDE).fingerprint()
    time.sleep(0.02)  # file systems keep time in steps of some milliseconds
    changed = folder / "class_5" / "0.bmp"
    size = changed.stat().st_size
    pixels(75, 61, "1", seed=99).save(changed)
    assert changed.stat().st_size == size  # other pixels in as many bytes
    edited = FolderImages(folder, SIDE).fingerprint()
    (folder / "class_6" / "1.webp").unlink()
    removed = FolderImages(folder, SIDE).fingerprint()
    (folder / "class_3").rename(folder / "class_3b")
    assert len({before, edited, removed, FolderImages(folder, SIDE).fingerprint()}) == 4


def test_a_touch_changes_nothing_and_is_read_once(folder, monkeypatch):
    first = FolderImages(folder, SIDE).fingerprint()
    for path in folder.rglob("*.*"):
        os.utime(path, ns=(0, 10**18))
    assert FolderImages(folder, SIDE).fingerprint() == first  # read again, and found the same
    monkeypatch.setattr("patchsae.images.contents.hashlib.file_digest", None)
    assert FolderImages(folder, SIDE).fingerprint() == first  # from what was kept


def test_a_damaged_cache_of_contents_is_not_believed(folder):
    images = FolderImages(folder, SIDE)
    for path in folder.rglob("*.*"):
        os.utime(path, ns=(0, 10**18))
    first, memory = images.fingerprint(), Memory(images.root)
    content = bytearray(memory.path.read_bytes())
    content[-1] ^= 1
    memory.path.write_bytes(content)
    assert not Memory(images.root).notes and FolderImages(folder, SIDE).fingerprint() == first


def test_what_cannot_be_decoded_is_found_before_work_begins(folder, monkeypatch):
    images = FolderImages(folder, SIDE)
    whole = images.paths[3].read_bytes()
    images.paths[3].write_bytes(whole[: len(whole) // 2])
    images.paths[5].write_bytes(b"no image")
    with pytest.raises(
        PatchSAEError, match=f"2 of the {len(images)} files .*nothing was begun: .*{images.key(3)}"
    ):
        images.check_readable(range(len(images)))
    others = [i for i in range(len(images)) if i not in (3, 5)]
    images.subset(others).check_readable(range(len(others)))
    monkeypatch.setattr("patchsae.images.contents.read_image", None)
    images.subset(others).check_readable(range(len(others)))  # not decoded a second time


def test_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(PatchSAEError, match="absent.*does not exist.*one sub-folder per class"):
        FolderImages(tmp_path / "absent", SIDE)
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "notes.txt").write_text("nothing to see")
    with pytest.raises(PatchSAEError, match="no images under"):
        FolderImages(tmp_path, SIDE)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(60)])
def test_unreadable_image_is_named(folder, content):
    broken = folder / "class_4" / "0.jpg"
    broken.write_bytes(content)
    with pytest.raises(PatchSAEError, match=r"class_4/0\.jpg.*replace or remove"):
        list(FolderImages(folder, SIDE).batches(8))


def test_image_removed_after_listing_is_named(folder):
    images = FolderImages(folder, SIDE)
    images.paths[3].unlink()
    with pytest.raises(PatchSAEError, match=images.paths[3].name):
        images.load([3])


@pytest.mark.filterwarnings("ignore")  # Pillow may warn about what it could still read
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "ppm"])
def test_no_damage_ends_in_a_traceback(tmp_path, suffix):
    """Cut and altered files either decode or are named; nothing else may come out."""
    whole = tmp_path / f"whole.{suffix}"
    pixels(23, 17).save(whole)
    content, rng = whole.read_bytes(), np.random.default_rng(1)
    broken = tmp_path / f"broken.{suffix}"
    refused = 0
    for trial in range(150):
        damaged = bytearray(content)
        if trial % 3 == 0:
            damaged = damaged[: rng.integers(len(content))]
        else:
            # the first bytes hold the sizes and types that decoders trust
            for position in rng.integers(0, min(len(content), 40 * trial), 3):
                damaged[position] = rng.integers(256)
        broken.write_bytes(damaged)
        try:
            image = load_image(broken, 16)
        except PatchSAEError as error:
            refused += 1
            assert f"broken.{suffix}" in str(error)
        else:
            assert image.shape == (3, 16, 16)
    assert refused > 20


def test_the_first_images_of_each_class_are_kept_in_order(folder):
    images = FolderImages(folder, 32)
    few = images.per_class(1)
    labels = images.labels.tolist()
    assert few.indices.tolist() == sorted(labels.index(c) for c in set(labels))
    assert images.per_class(10**6).labels.tolist() == labels


def test_the_picture_is_the_file_itself_and_otherwise_what_was_loaded(folder):
    images = FolderImages(folder, SIDE)
    with Image.open(images.paths[8]) as file:
        expected = file.convert("RGB")
    for picture in (images.picture(8), images.subset([3, 8]).picture(1), images.classes([4]).picture(0)):
        assert picture.mode == "RGB" and picture.size == expected.size == (68, 61)
        assert picture.tobytes() == expected.tobytes()
    scenes = SceneSet("tiny", "train", range(4), (0,), 2, SINGLE)
    loaded = scenes.load([5]).images[0].permute(1, 2, 0)
    for picture in (scenes.picture(5), scenes.subset([0, 5]).picture(1)):
        assert torch.equal(torch.from_numpy(np.array(picture)), loaded)


def test_an_image_is_named_by_its_path_or_else_by_its_index(folder):
    images = FolderImages(folder, SIDE)
    assert images.key(3) == "class_1/1.png" and images.subset([9, 3]).subset([1]).key(0) == "class_1/1.png"
    assert images.paths[3] == folder / "class_1" / "1.png" == images.root / images.key(3)
    scenes = SceneSet("tiny", "train", range(4), (0,), 2, SINGLE)
    assert scenes.key(5) == 5 and scenes.subset([7, 5]).key(1) == 5


def test_paths_behave_as_a_list_and_keep_any_name(tmp_path):
    names = ["a.jpg", "b/ä ö.png", os.fsdecode(b"c/\xff.png"), "d/\n.png", "", "e"]
    paths = PathList(tmp_path, names)
    assert list(paths) == [tmp_path / name for name in names] and len(paths) == 6
    assert paths[-1] == tmp_path / "e" and paths[np.int64(1)] == paths[1]
    assert paths[1:5:2] == [paths[1], paths[3]] and paths[::-1][0] == paths[5]
    for outside in (6, -7):
        with pytest.raises(IndexError):
            paths[outside]
    assert list(pickle.loads(pickle.dumps(paths))) == list(paths)
    assert list(PathList(tmp_path, [])) == []


def test_files_are_listed_in_the_order_of_their_parts_without_hidden_ones(tmp_path):
    names = ["b/2.jpg", "b/a/3.jpg", "b/a-1.jpg", "b/a/x/1.JPG", "a/1.png"]
    for name in [*names, "a/._1.png", ".cache/1.png", "b/.trash/1.jpg", "a/notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "a" / "up").symlink_to(tmp_path / "b")  # a loop
    images = FolderImages(tmp_path, SIDE)
    # "a" sorts before "a-1.jpg", though "a/3.jpg" as text does not
    assert [images.key(i) for i in range(len(images))] == [
        "a/1.png", "b/2.jpg", "b/a/3.jpg", "b/a/x/1.JPG", "b/a-1.jpg",
    ]  # fmt: skip
    assert images.classnames == ("a", "b") and images.labels.tolist() == [0, 1, 1, 1, 1]


def test_files_are_asked_for_their_size_once_and_a_missing_one_is_named(folder, monkeypatch):
    asked, stat = [], os.stat
    images = FolderImages(folder, SIDE)
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(path) or stat(path, **options))
    first = images.fingerprint(), images.subset([1]).fingerprint()
    asked = [path for path in asked if str(path).startswith(f"{folder}/")]
    assert len(asked) == len(images) and (images.fingerprint(), images.subset([1]).fingerprint()) == first
    images = FolderImages(folder, SIDE)
    images.paths[5].unlink()
    with pytest.raises(PatchSAEError, match=images.key(5)):
        images.fingerprint()


def test_labels_are_part_of_what_a_set_of_files_is(folder):
    names = [FolderImages(folder, SIDE).key(i) for i in range(4)]
    sets = [
        FileImages(folder, names, y, ["a", "b"], SIDE, "x", "train") for y in ([0, 0, 1, 1], [0, 1, 0, 1])
    ]
    assert sets[0].fingerprint() != sets[1].fingerprint()


def test_val_is_divided_as_train_and_test_are(folder):
    images = FolderImages(folder, SIDE)
    empty = images.subset([])
    data = Dataset("pets", "Pets", images.classnames, "{}", images.classes(range(7)), images, images)
    assert len(data.base().val) == 8 and data.novel().val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert Dataset("pets", "Pets", images.classnames, "{}", images, images).base().val is None
    # a set made for testing only divides the classes it is tested on
    assert Dataset("pets", "Pets", images.classnames, "{}", empty, images).novel().classnames == (
        "class 4", "class 5", "class 6",
    )  # fmt: skip


RAMP = np.linspace(0, 65535, 65536).reshape(256, 256)


@pytest.mark.parametrize(("name", "grey"), [
    ("16.png", RAMP.astype(np.uint16)), ("16.tif", RAMP.astype(np.uint16)),
    ("16 big-endian.tif", RAMP.astype(">u2")), ("16.jp2", RAMP.astype(np.uint16)),
    ("32.tif", RAMP.astype(np.int32)), ("8 in 32.tif", (RAMP / 257).astype(np.int32)),
    ("0 to 1.tif", (RAMP / 65535).astype(np.float32)), ("0 to 255.tif", (RAMP / 257).astype(np.float32)),
])  # fmt: skip
def test_grey_of_any_depth_keeps_its_steps(tmp_path, name, grey):
    Image.fromarray(grey).save(tmp_path / name)
    found = np.asarray(open_image(tmp_path / name)).astype(int)
    assert found.shape == (256, 256, 3)
    assert abs(found - (RAMP / 257)[..., None]).max() <= 1


def test_a_portable_greymap_of_12_bits_is_scaled_by_its_own_white(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5\n256 256\n4095\n" + (RAMP // 16).astype(">u2").tobytes())
    assert abs(np.asarray(open_image(tmp_path / "x.pgm"))[..., 0] - RAMP / 257).max() <= 1


@pytest.mark.parametrize("grey", [RAMP - 1000, RAMP * 3, RAMP / 65535 * np.nan, RAMP / -65535])
def test_grey_without_a_white_is_refused(tmp_path, grey):
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(PatchSAEError, match=r"x\.tif' has grey values from .* does not say what is white"):
        load_image(tmp_path / "x.tif", SIDE)


@pytest.mark.parametrize(("size", "match"), [
    ((50_000, 1), "is 50000 pixels long and 1 wide, more than 100 times"),
    ((1, 101), "is 101 pixels long and 1 wide"),
    ((20_000, 6_000), "has 120 megapixels, more than 100"),
    ((30_000, 7_000), "has far more than 100 megapixels"),
])  # fmt: skip
def test_a_picture_that_would_take_gigabytes_is_refused_before_it_is_decoded(
    tmp_path, monkeypatch, size, match
):
    Image.new("1", size).save(tmp_path / "large.png")
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(PatchSAEError, match=rf"image '.*large\.png' {match}"):
        load_image(tmp_path / "large.png", SIDE)


def test_only_rasters_are_opened(tmp_path):
    pixels(20, 20).save(tmp_path / "x.eps")  # Pillow would hand it to Ghostscript
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    with pytest.raises(PatchSAEError, match=r"cannot read image '.*x\.jpg' \(cannot identify"):
        open_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("suffix", ["JPG", "jpe", "jfif", "gif", "avif", "jp2", "pgm", "tga", "dib", "qoi"])
def test_every_raster_that_is_read_is_listed(tmp_path, suffix):
    made = pixels(30, 20, "L" if suffix == "pgm" else "P" if suffix == "gif" else "RGB")
    (tmp_path / "a").mkdir()
    made.save(tmp_path / "a" / f"1.{suffix}")
    images = FolderImages(tmp_path, SIDE)
    assert images.key(0) == f"a/1.{suffix}" and images.load([0]).images.shape == (1, 3, SIDE, SIDE)


def test_what_systems_put_beside_a_persons_folders_is_no_class(tmp_path):
    for name in ("cat/1.jpg", "dog/1.jpg", "cat/@eaDir/1.jpg/SYNO_THUMB.jpg", "dog/album.png/2.jpg",
                 "__MACOSX/cat/1.jpg", "@eaDir/1.jpg", ".hidden/1.jpg", "Lost+Found/1.jpg"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels(20, 20).save(tmp_path / name)
    (tmp_path / "System Volume Information").mkdir()
    images = FolderImages(tmp_path, SIDE)
    assert images.classnames == ("cat", "dog")
    assert [images.key(i) for i in range(3)] == ["cat/1.jpg", "dog/1.jpg", "dog/album.png/2.jpg"]
    assert len(images) == 3 and files_in(tmp_path / "dog") == ["1.jpg"]


def test_names_that_are_not_utf8_are_read_and_can_be_printed(tmp_path):
    place = os.fsencode(tmp_path) + b"/caf\xe9_noir"
    os.mkdir(place)
    pixels(20, 20).save(os.fsdecode(place + b"/\xff.png"))
    images = FolderImages(tmp_path, SIDE)
    assert images.classnames == (r"caf\xe9 noir",) and images.load([0]).images.shape == (1, 3, SIDE, SIDE)
    images.paths[0].write_bytes(b"")
    with pytest.raises(PatchSAEError) as error:
        images.load([0])
    assert r"caf\xe9_noir/\xff.png" in str(error.value).encode("utf-8").decode()
    assert str(PatchSAEError("\ud800")) == r"\ud800"


@pytest.mark.parametrize("size", [(80, 40), (37, 91), (64, 64), (5, 200), (200, 9)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_every_frame_is_open_clips_own_transform(resize, interpolation, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = image_transform(
        32, False, (0.0,) * 3, (1.0,) * 3, resize_mode=resize, interpolation=interpolation, fill_color=7
    )
    wanted = (theirs(image) * 255).round().byte()
    assert torch.equal(resize_and_crop(image, Frame(32, resize, interpolation, 7)), wanted)


def test_a_frame_is_part_of_what_a_set_is_and_an_unknown_one_is_refused(folder):
    plain, squashed = (FolderImages(folder, frame) for frame in (32, Frame(32, "squash")))
    assert plain.fingerprint() == FolderImages(folder, Frame(32)).fingerprint() != squashed.fingerprint()
    with pytest.raises(PatchSAEError, match="resize='fit' of the model's preprocessing is unknown"):
        FolderImages(folder, Frame(32, "fit"))


def test_a_model_has_the_frame_of_its_own_transform():
    backbone = tiny_backbone()
    assert backbone.frame == Frame(112)
    published = {"resize_mode": "squash", "interpolation": "bilinear", "fill_color": 0, "size": 112}
    backbone.model.visual.preprocess_cfg = published
    assert backbone.frame == Frame(112, "squash", "bilinear")
    for name in ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP2"):
        assert clip_files._published_preprocess(name, "webli")["resize_mode"] == "squash"
