"""Kill a training process or an atlas pass again and again, from a process of its own: see test_crash.py.

Workers import this file anew, so what is heavy is imported in functions.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

IMAGES = 240


def train(root: Path, options: dict) -> None:
    """Train the SAE of these tests under `root`."""
    from tiny import CONFIG, tiny_backbone, tiny_images

    from patchsae.sae.model import SAEConfig
    from patchsae.training.trainer import train_sae

    config = CONFIG.__class__(**vars(CONFIG) | {"images": 480, "log_every": 5} | options)
    train_sae(tiny_images(), tiny_backbone(), SAEConfig(d_in=32, expansion=4), config, root, progress=False)


def describe(root: Path, options: dict) -> None:
    """Make an atlas of 240 scenes under `root`, saved after every fourth."""
    import numpy as np
    from test_atlas import make
    from tiny import tiny_images

    from patchsae.latents import atlas

    atlas.SAVE_SHARE = 1e9
    images = tiny_images()
    images.labels = np.arange(IMAGES) % len(images.classnames)
    make(root, images=images, batch_size=4, **options)


TASKS = {"train": train, "describe": describe}


def in_child(root: Path, options: dict) -> int:
    """Start the task in a child process, which does not import everything again."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        TASKS[options.get("task", "train")](root, {k: v for k, v in options.items() if k != "task"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def steps_saved(root: Path) -> int:
    """Read from the checkpoint's header, or an atlas' part, how far it is."""
    for path in root.glob("atlas-*/part-0000.safetensors"):
        from safetensors.numpy import load_file

        with contextlib.suppress(FileNotFoundError):
            return int(load_file(path)["seen"].sum()) // 4
    for path in root.glob("sae-*/checkpoint.safetensors"):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return json.loads(header["__metadata__"]["facts"])["step"]
    return 0


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def kill_and_resume(root: Path, options: dict, seed: int) -> dict:
    """Kill five times at random moments, then let it finish; say what happened."""
    draw = random.Random(seed)
    # the first dies while it starts, when workers are not yet ready; the others at a random step's
    # random moment, in a step, a save or the reading of images
    goals = [None, *sorted(draw.sample(range(5, 90 if options.get("task") else 180), 4))]
    died_at, orphans = [], set()
    for goal in goals:
        pid = in_child(root, options)
        if goal is None:
            time.sleep(draw.uniform(0.0, 1.5 if options.get("workers") else 0.2))
        else:
            while steps_saved(root) < goal and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.03))
        orphans |= set(children(pid))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        died_at.append(steps_saved(root))
    status = os.waitpid(in_child(root, options), 0)[1]
    deadline = time.monotonic() + 10  # torch's workers look for their parent every 5 s
    while any(map(alive, orphans)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = sum(map(alive, orphans))
    return {"died_at": died_at, "status": status, "workers_seen": len(orphans), "workers_left": left}


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    import test_atlas  # noqa: F401  (once, before the forks)
    import tiny  # noqa: F401

    folder, given, number = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    whole = os.waitpid(in_child(folder / "whole", given), 0)[1]
    print(json.dumps({"whole": whole} | kill_and_resume(folder / "cut", given, number)))
