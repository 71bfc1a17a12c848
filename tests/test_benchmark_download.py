"""torchvision's own downloader, fed by a server on this machine, and what is put where."""

import functools
import os
import shutil
import tarfile
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from miniature import split_set
from torchvision import datasets

from patchsae.command import main
from patchsae.images.benchmark_download import SOURCES, download
from patchsae.images.benchmark_sets import RECIPES, open_benchmark
from patchsae.runs.errors import PatchSAEError


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Let torchvision's DTD come from an archive made here; its split file lies beside."""
    split = split_set(tmp_path / "elsewhere", "dtd")
    source = split.parent
    for folder in ("imdb", "labels"):
        (source / folder).mkdir()
    for part in ("train", "val", "test"):
        (source / "labels" / f"{part}1.txt").write_text("banded/banded_0001.jpg\n")
    path = tmp_path / "dtd-r1.0.1.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for folder in ("imdb", "labels", "images"):
            tar.add(source / folder, f"dtd/{folder}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(Silent, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.DTD, "_URL", f"http://127.0.0.1:{server.server_port}/{path.name}")
        monkeypatch.setattr(datasets.DTD, "_MD5", None)
        yield path, split
        server.shutdown()


def test_what_torchvision_fetches_lands_in_the_layout(tmp_path, archive, capsys, monkeypatch):
    data = tmp_path / "data"
    monkeypatch.setitem(RECIPES, "dtd", replace(RECIPES["dtd"], classes=3, images=(9, 3, 6)))
    # the split file is not torchvision's to give
    assert main(["data", "--data", str(data), "--download", "dtd"]) == 1
    assert "split_zhou_DescribableTextures.json" in capsys.readouterr().out
    assert sorted(path.name for path in data.iterdir()) == ["dtd"]
    assert sorted(path.name for path in (data / "dtd").iterdir()) == ["images", "imdb", "labels"]
    shutil.copy(archive[1], data / "dtd")
    assert len(open_benchmark("dtd", data, 32).train) == 9
    archive[0].unlink()  # nothing is fetched again
    assert main(["data", "--data", str(data), "--download", "dtd"]) == 0


def test_a_failed_download_leaves_nothing_that_looks_whole(tmp_path, archive):
    whole = archive[0].read_bytes()
    archive[0].write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(PatchSAEError, match="download of 'dtd' failed .*DATASETS.md#dtd"):
            download("dtd", tmp_path / "data" / "dtd", RECIPES["dtd"].remedy)
        assert not list((tmp_path / "data").iterdir())
    archive[0].unlink()
    with pytest.raises(PatchSAEError, match="download of 'dtd' failed"):
        download("dtd", tmp_path / "data" / "dtd", RECIPES["dtd"].remedy)


def test_a_stop_between_two_moves_is_made_good_by_the_next_call(tmp_path, monkeypatch):
    """Aircraft's images are moved last: they are what the next call looks for."""
    lists = ("images_variant_test.txt", "images_variant_train.txt", "variants.txt")

    class Aircraft:
        def __init__(self, root, download):
            unpacked = root / SOURCES["fgvc_aircraft"].folder
            (unpacked / "images").mkdir(parents=True)
            for name in lists:
                (unpacked / name).write_text(name)

    monkeypatch.setattr(datasets, "FGVCAircraft", Aircraft)
    folder, replace_, moved = tmp_path / "fgvc_aircraft", os.replace, []

    def stop(source, target):
        if len(moved) == 2:
            raise OSError("stopped")
        moved.append(target)
        replace_(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(PatchSAEError, match="stopped"):
            download("fgvc_aircraft", folder, "remedy")
    assert not (folder / "images").exists()
    download("fgvc_aircraft", folder, "remedy")
    assert sorted(path.name for path in folder.iterdir()) == ["images", *lists]


def test_every_source_exists_in_torchvision_and_brings_the_folder_of_images():
    for name, source in SOURCES.items():
        assert hasattr(datasets, source.kind)
        assert not source.items or source.items[-1] == RECIPES[name].folder
