"""Images in shards, of torchvision and of Hugging Face `datasets`: the same pictures as in a folder."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import patchsae as ps
from patchsae.images.files import Frame, resize_and_crop
from patchsae.images.loading import Pixels, read_batches
from patchsae.images.sources import is_source, open_source
from patchsae.runs.errors import PatchSAEError

SIDE = 24


def photo(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 30 + number, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int) -> bytes:
    file = io.BytesIO()
    photo(number).save(file, "png")
    return file.getvalue()


def shard(path, numbers, labels=True):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            parts = {"png": png(number), "json": json.dumps({"n": number}).encode()}
            if labels:
                parts["cls"] = str(number % 3).encode()
            for ending, content in parts.items():
                entry = tarfile.TarInfo(f"part/{number:04d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    shard(folder / "a-000.tar", range(4)), shard(folder / "a-001.tar", range(4, 7))
    (folder / "classnames.txt").write_text("owl\nwren\nred kite\n")
    return folder


def assert_photos(images, numbers):
    batch = images.load(range(len(numbers)))
    for index, number in enumerate(numbers):
        assert torch.equal(batch.images[index], resize_and_crop(photo(number), images.frame))


def test_shards_are_read_at_any_place(shards):
    images = open_source(f"{shards}/a-{{000..001}}.tar", Frame(SIDE, "squash"))
    assert len(images) == 7 and images.name == "birds" and images.classnames == ("owl", "wren", "red kite")
    assert images.labels.tolist() == [n % 3 for n in range(7)] and images.key(5) == "part/0005"
    assert_photos(images, range(7))
    assert torch.equal(images.load([6, 0]).images, images.load(range(7)).images[[6, 0]])
    assert images.picture(4).size == photo(4).size
    assert len(open_source(f"{shards}/a-*.tar", SIDE)) == 7
    assert len(open_source(f"{shards}/a-{{001,000}}.tar", SIDE)) == 7
    assert open_source(f"{shards}/a-001.tar", SIDE).labels.tolist() == [1, 2, 0]


def test_what_a_shard_is_decides_its_fingerprint(shards):
    def of(frame=SIDE):
        return open_source(f"{shards}/a-*.tar", frame).fingerprint()

    first = of()
    assert first == of() != of(Frame(SIDE, "squash"))
    shard(shards / "a-001.tar", range(4, 8))
    assert first != of()


def test_shards_go_through_processes_that_read(shards):
    images = open_source(f"{shards}/a-*.tar", SIDE)
    (batch,) = read_batches(Pixels(images), [[5, 2]], workers=1)
    assert torch.equal(batch, images.load([5, 2]).images)
    assert pickle.loads(pickle.dumps(images)).fingerprint() == images.fingerprint()


def test_damaged_shards_are_one_sentence(shards, tmp_path):
    def refused(source, match):
        with pytest.raises(PatchSAEError, match=match) as raised:
            open_source(str(source), SIDE).load([0])
        assert "\n" not in str(raised.value)

    refused(tmp_path / "none.tar", "there is no shard")
    (tmp_path / "text.tar").write_text("no archive")
    refused(tmp_path / "text.tar", "is no readable shard")
    refused(shard(tmp_path / "empty.tar", ()), "holds no images")
    shard(shards / "a-002.tar", (8,), labels=False)
    refused(shards / "a-*.tar", "part/0008 has no .cls, which others have")
    (shards / "classnames.txt").write_text("owl\n")
    refused(shards / "a-000.tar", "has 1 names, but there is a label 2")
    with tarfile.open(tmp_path / "broken.tar", "w") as tar:
        entry = tarfile.TarInfo("x.png")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"12345"))
    refused(tmp_path / "broken.tar", "cannot read image 'x' of")


def test_shards_without_labels_are_one_class(tmp_path):
    images = open_source(str(shard(tmp_path / "bare.tar", range(3), labels=False)), SIDE)
    assert images.classnames == (tmp_path.name,) and images.labels.tolist() == [0, 0, 0]
    (tmp_path / "bare.tar").unlink()


def test_torchvisions_sets_are_read_where_they_lie(tmp_path):
    for number in range(4):
        folder = tmp_path / "eurosat" / "2750" / ("Forest", "River")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photo(number).save(folder / f"{number}.png")
    images = open_source(f"torchvision:EuroSAT:{tmp_path}", SIDE)
    assert images.classnames == ("Forest", "River") and images.labels.tolist() == [0, 0, 1, 1]
    assert_photos(images, (0, 2, 1, 3))
    before = images.fingerprint()
    photo(9).save(tmp_path / "eurosat/2750/River/9.png")
    assert open_source(f"torchvision:EuroSAT:{tmp_path}", SIDE).fingerprint() != before
    for source, match in (
        (f"torchvision:CIFAR100:{tmp_path}", "'CIFAR100' is no data set that can be read safely"),
        (f"torchvision:DTD:{tmp_path}", "torchvision finds no DTD of split 'train'"),
        (f"torchvision:DTD:{tmp_path}:half", "torchvision finds no DTD of split 'half'"),
    ):
        with pytest.raises(PatchSAEError, match=match):
            open_source(source, SIDE)


def test_hugging_face_datasets_are_read_undecoded(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs pip install 'patchsae[sets]'")
    features = datasets.Features(
        {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["owl", "wren"])}
    )
    rows = {"photo": [{"bytes": png(n), "path": None} for n in range(4)], "kind": [0, 1, 1, 0]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=data.select([1, 2])).save_to_disk(tmp_path / "parts")
    images = open_source(f"datasets:{tmp_path}/saved", Frame(SIDE, "squash"))
    assert images.classnames == ("owl", "wren") and images.labels.tolist() == [0, 1, 1, 0]
    assert_photos(images, range(4))
    part = open_source(f"datasets:{tmp_path}/parts:test", SIDE)
    assert_photos(part, (1, 2))
    assert images.fingerprint() == open_source(f"datasets:{tmp_path}/saved", images.frame).fingerprint()
    assert images.fingerprint() != part.fingerprint()
    with pytest.raises(PatchSAEError, match="of split 'train' cannot be opened by datasets"):
        open_source(f"datasets:{tmp_path}/parts", SIDE)
    datasets.Dataset.from_dict({"n": [1]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(PatchSAEError, match="has no images"):
        open_source(f"datasets:{tmp_path}/numbers", SIDE)


def test_the_short_way_opens_them_too(shards):
    class Clip:
        frame = Frame(SIDE)

    assert len(ps.open_images(f"{shards}/a-000.tar", Clip)) == 4
    assert not is_source(str(shards)) and is_source("datasets:a/b")
