"""Shared by all tests, which `make test` runs in as many processes as there are cores."""

import atexit
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlparse

# One core for each process: OpenMP's threads wait for each other by spinning, at the neighbour's expense.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What files of images hold is remembered from one run to the next; tests begin anew, as CI does.
os.environ["PATCHSAE_CACHE"] = tempfile.mkdtemp(prefix="patchsae-tests-")
atexit.register(shutil.rmtree, os.environ["PATCHSAE_CACHE"], ignore_errors=True)

import torch  # noqa: E402

# Triton reads this on import, which other tests cause before test_sparse_gpu is collected.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import patchsae.runs.compat  # noqa: E402, F401  (declares torchvision's operators before open_clip is imported)

# isort: split
import pytest  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from tiny import tiny_backbone, tiny_images  # noqa: E402

from patchsae.runs.stage import project_root  # noqa: E402

BUILD = (sys.executable, "book/build.py")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]


FIRST = ("test_notebooks.py",)
LAST = (
    "test_report.py", "test_pages.py", "test_publishing.py", "test_book.py", "test_accessibility.py",
    "test_explorer_browser.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Begin with the file that builds a small book, end with those that look at it: so nobody waits."""
    items.sort(key=lambda item: (item.path.name not in FIRST, item.path.name in LAST))


@pytest.fixture(scope="module")
def backbone():
    """Return a small CLIP of real architecture."""
    return tiny_backbone()


@pytest.fixture(scope="module")
def images():
    """Return 40 real scenes of 10 classes."""
    return tiny_images()


@pytest.fixture(scope="session")
def small_book() -> Path:
    """Build the whole book at tiny sizes, unless it is up to date; return its folder of pages."""
    command = [*BUILD, "--small"]
    folder = project_root() / "_build" / "small"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may be building it
        built = subprocess.run(command, cwd=project_root(), capture_output=True, text=True)
    if built.returncode:
        pytest.fail(built.stdout + built.stderr, pytrace=False)
    html = folder / "_build" / "html"
    assert built.stdout.splitlines()[-1] == f"open {(html / 'index.html').as_uri()}"
    return html


@pytest.fixture(scope="session")
def html(request) -> Path:
    """Return the pages of the book that is built here and up to date, or else of a small one (CI)."""
    checked = subprocess.run([*BUILD, "--check"], cwd=project_root(), capture_output=True, text=True)
    assert not checked.stderr, checked.stderr
    built = project_root() / "_build" / "html"
    return request.getfixturevalue("small_book") if checked.returncode else built


@pytest.fixture(scope="session")
def browser():
    """Start Debian's Chromium; without it the tests are skipped, but never in CI."""
    if not CHROMIUM.exists():
        message = f"{CHROMIUM} is missing: apt-get install chromium to test the pages in a browser"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(browser):
    """Return a function that opens a page in a fresh context and tells what went wrong there."""
    contexts = []

    def open_page(path: Path, width: int = 1400):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        wrong: list[str] = []

        def gate(route):
            if urlparse(route.request.url).scheme in ("file", "data", "blob"):
                route.continue_()
            else:
                wrong.append(f"asked the network: {route.request.url}")
                route.abort()

        context.route("**/*", gate)

        def failed(request):
            if request.failure != "net::ERR_ABORTED":  # a page that is left stops what it was loading
                wrong.append(f"failed: {request.url} {request.failure}")

        context.on("requestfailed", failed)
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: wrong.append(f"page error: {e}"))
        page.goto(path.as_uri(), wait_until="load")
        return page, wrong

    yield open_page
    for context in contexts:
        context.close()
