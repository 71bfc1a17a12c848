"""CIFAR-100's pickles, as Python 2 and 3 write them: read in place, and never run."""

import io
import pickle
import pickletools
import resource

import numpy as np
import pytest
import torch
from miniature import photo
from PIL import Image

from patchsae.images.benchmark_sets import open_benchmark
from patchsae.runs.errors import PatchSAEError

NAMES = [b"apple", b"aquarium_fish", b"baby"]


def as_python_2(content: dict) -> bytes:
    """Pickle in protocol 2 as Python 2 did: its strings, and numpy's bytes, are BINSTRINGs."""
    out = io.BytesIO()
    out.write(b"\x80\x02}(")

    def text(value: bytes):
        out.write(b"T" + len(value).to_bytes(4, "little") + value)

    for key, value in content.items():
        text(key)
        if isinstance(value, np.ndarray):
            out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n")
            out.write(b"K\x00\x85")
            text(b"b")
            out.write(b"\x87R(K\x01")
            out.write(
                b"".join(b"J" + n.to_bytes(4, "little") for n in value.shape) + b"\x86cnumpy\ndtype\n"
            )
            text(b"u1")
            out.write(b"K\x00K\x01\x87R(K\x03")
            text(b"|")
            out.write(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
            text(value.tobytes())
            out.write(b"tb")
        else:
            out.write(b"](")
            for item in value:
                text(item) if isinstance(item, bytes) else out.write(b"K" + bytes([item]))
            out.write(b"e")
    out.write(b"u.")
    return out.getvalue()


WRITERS = {
    "python 2": as_python_2,
    **{f"protocol {n}": lambda content, n=n: pickle.dumps(content, protocol=n) for n in (2, 3, 4, 5)},
}


def make(folder, write=as_python_2):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    pixels = {}
    for split, n in (("train", 9), ("test", 4)):
        pixels[split] = rng.integers(0, 256, (n, 3072), np.uint8)
        labels = [i % 3 for i in range(n)]
        content = {b"fine_labels": labels, b"data": pixels[split], b"filenames": [b"a.png"] * n}
        (folder / split).write_bytes(write(content))
    (folder / "meta").write_bytes(write({b"fine_label_names": NAMES}))
    return pixels


def test_the_hand_written_pickle_is_one_that_numpy_reads():
    """The oracle of the fixture: plain pickle gives back the array."""
    array = np.arange(6144, dtype=np.uint8).reshape(2, 3072)
    text = as_python_2({b"data": array, b"fine_labels": [2, 1]})
    pickletools.dis(text, out=io.StringIO())
    loaded = pickle.loads(text, encoding="bytes")
    assert (loaded[b"data"] == array).all() and loaded[b"fine_labels"] == [2, 1]


@pytest.mark.parametrize("writer", WRITERS)
def test_official_files_open_with_their_labels_and_pixels(tmp_path, writer):
    pixels = make(tmp_path / "cifar-100/cifar-100-python", WRITERS[writer])
    data = open_benchmark("cifar-100", tmp_path, 32)
    assert data.classnames == ("apple", "aquarium_fish", "baby") and data.val is None
    assert data.train.labels.tolist() == [0, 1, 2] * 3 and len(data.test) == 4
    for split, images in (("train", data.train), ("test", data.test)):
        batch = images.load([3, 0])
        assert (batch.images.numpy().reshape(2, -1) == pixels[split][[3, 0]]).all()
        assert batch.labels.tolist() == [0, 0] and images.picture(1).size == (32, 32)
    assert open_benchmark("cifar-100", tmp_path, 112).test.load([0]).images.shape == (1, 3, 112, 112)
    sent = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(sent.load([5]).images, data.train.load([5]).images)
    assert sent.fingerprint() == data.train.fingerprint() != data.test.fingerprint()


def test_pixels_stay_in_the_file(tmp_path):
    make(tmp_path / "cifar-100/cifar-100-python")
    train = open_benchmark("cifar-100", tmp_path, 32).train
    assert isinstance(train.pixels, np.memmap)
    assert len(pickle.dumps(train)) < 3072


def test_a_layout_of_folders_opens_too(tmp_path):
    for split in ("train", "test"):
        for name in ("apple", "aquarium_fish"):
            photo(tmp_path / "cifar-100" / split / name / f"{split}.png", (32, 32))
    data = open_benchmark("cifar-100", tmp_path, 32)
    assert data.classnames == ("apple", "aquarium_fish") and data.train.labels.tolist() == [0, 1]


class Runs:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_a_file_that_would_call_something_is_refused(tmp_path, capsys, file):
    folder = tmp_path / "cifar-100/cifar-100-python"
    make(folder)
    (folder / file).write_bytes(
        pickle.dumps({b"data": Runs(), b"fine_labels": [], b"fine_label_names": Runs()})
    )
    with pytest.raises(PatchSAEError, match=f"{file}' would call builtins.print"):
        open_benchmark("cifar-100", tmp_path, 32)
    assert not capsys.readouterr().out


def test_missing_and_damaged_files_are_named(tmp_path):
    folder = tmp_path / "cifar-100/cifar-100-python"
    with pytest.raises(PatchSAEError, match="cifar-100-python/train', .*cs.toronto.edu"):
        open_benchmark("cifar-100", tmp_path, 32)
    pixels = make(folder)
    whole = (folder / "test").read_bytes()
    for length in (*range(0, 200, 11), len(whole) // 2, len(whole) - 1):
        (folder / "test").write_bytes(whole[:length])
        with pytest.raises(PatchSAEError, match="test' is damaged"):
            open_benchmark("cifar-100", tmp_path, 32)
    wrong = [
        {b"fine_labels": [0, 1], b"data": pixels["test"]},
        {b"fine_labels": [0, 1, 2, 3], b"data": pixels["test"]},
        {b"fine_labels": [0, 1, 2, 0], b"data": pixels["test"].astype(np.int32)},
        {b"fine_labels": [0, 1, 2, 0]},
        {b"data": pixels["test"]},
        {b"fine_labels": b"0120", b"data": pixels["test"]},
        {b"fine_labels": [[0], [1], [2], [0]], b"data": pixels["test"]},
        {b"fine_labels": [0, 1, -1, 0], b"data": pixels["test"]},
        {b"fine_labels": [0, 1, None, "0"], b"data": pixels["test"]},
        {b"fine_labels": [0, 1, 2, 0], b"data": b"x" * 12288},
        [1, 2],
    ]
    for content in wrong:
        (folder / "test").write_bytes(pickle.dumps(content))
        with pytest.raises(PatchSAEError, match="cifar-100-python/test'.*cs.toronto.edu"):
            open_benchmark("cifar-100", tmp_path, 32)


@pytest.mark.parametrize("names", [[1, 2, 3], [[b"apple"], b"baby", b"bear"], [None] * 3])
def test_names_that_are_no_text_are_refused(tmp_path, names):
    folder = tmp_path / "cifar-100/cifar-100-python"
    make(folder)
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}))
    with pytest.raises(PatchSAEError, match="meta' holds names that are no text; get it as https"):
        open_benchmark("cifar-100", tmp_path, 32)


def test_the_picture_is_in_rgb_order(tmp_path):
    folder = tmp_path / "cifar-100/cifar-100-python"
    make(folder)
    red = np.zeros((1, 3, 32, 32), np.uint8)
    red[:, 0] = 255
    (folder / "test").write_bytes(as_python_2({b"fine_labels": [1], b"data": red.reshape(1, -1)}))
    picture = open_benchmark("cifar-100", tmp_path, 32).test.picture(0)
    assert isinstance(picture, Image.Image) and picture.getpixel((5, 7)) == (255, 0, 0)


def test_a_memo_of_millions_takes_no_memory(tmp_path):
    folder = tmp_path / "cifar-100/cifar-100-python"
    make(folder)
    (folder / "test").write_bytes(b"\x80\x02}r" + (2**31 - 1).to_bytes(4, "little") + b".")  # 12 bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PatchSAEError, match="test' holds no fine_labels"):
        open_benchmark("cifar-100", tmp_path, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; in C it is 16 GB
