"""Train an SAE from the command line: `patchsae train`, or torchrun for several processes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# What runs a scale is imported in `main`: the processes that decode images import this module too.


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the arguments say, print the SAE's folder, and return the exit code."""
    options = _parser().parse_args(arguments)
    from torch import distributed

    from patchsae.runs.errors import PatchSAEError
    from patchsae.runs.stopping import Stopped, stoppable

    try:
        with stoppable():
            _train(options)
    except Stopped as stop:
        print(
            f"{stop} stopped the run; the same command goes on from its last checkpoint.", file=sys.stderr
        )
        return stop.code
    except PatchSAEError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


def _train(options: argparse.Namespace) -> None:
    from patchbook.scales import scale
    from patchsae.runs.processes import join, local_device
    from patchsae.runs.stage import project_root

    device = local_device(options.device)
    processes = join(device)
    setup = scale(options.scale)
    setup.look_for(options.data)
    backbone = setup.backbone(options.model, options.pretrained, block=options.block, device=device)
    sets = setup.sets(backbone, options.data)
    of_sae = ("expansion", "l1", "ghost", "activation", "k")
    of_training = (
        *("images", "tokens", "token_batch", "lr", "seed", "execution", "b_dec_init"),
        *("decay_from", "l1_warmup", "start", "workers", "lanes", "cache", "tensorboard"),
    )
    trained = setup.trained_sae(
        sets.train, backbone, options.out or project_root() / "results",
        sae={name: getattr(options, name) for name in of_sae},
        train={name: getattr(options, name) for name in of_training},
        progress=not options.quiet,
    )  # fmt: skip
    if processes.first:
        last = trained.metrics[-1]
        shown = ", ".join(f"{name} {last[name]:.4g}" for name in ("mse", "fvu", "l0", "dead_share"))
        print(f"{trained.folder}: {last['tokens']:,.0f} tokens, {shown}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="patchsae train",
        description="Train a sparse autoencoder, or find it if it is there. A run that was stopped goes on "
        "when the same command is given again. What is not given is the scale's.",
        epilog="Several processes: torchrun --nproc-per-node 2 -m patchbook.train --device cuda. "
        "Exit code: 0 done; 2 bad input; 130, 143 or 129 it was stopped by Ctrl-C or a scheduler.",
    )
    add = parser.add_argument
    add("--scale", default="embedded", help="'embedded' (default) or 'paper'")
    add("--data", default="", help="paper scale: folder that holds imagenet/images/{train,val}")
    add("--model", help="another open_clip model name or folder")
    add("--pretrained", help="open_clip tag or weights file of that model")
    add("--block", type=int, default=11, help="block whose output is decomposed, from 1 (default 11)")
    add("--device", default="cpu", help="'cpu' (default) or 'cuda'")
    add("--out", type=Path, help="folder for results (default: results in the project)")
    add("--images", type=int, help="images seen, counted with repetition")
    add("--tokens", help="'all', 'cls' or 'patches'")
    add("--expansion", type=float, help="latents per dimension")
    add("--activation", help="'relu', 'topk' or 'batchtopk'")
    add("--k", type=int, help="active latents per token, for topk and batchtopk")
    add("--l1", type=float, help="weight of the L1 penalty")
    add("--ghost", action=argparse.BooleanOptionalAction, help="ghost gradients for dead latents")
    add("--b-dec-init", help="'geometric_median', 'geometric_median_images', 'mean' or 'zeros'")
    add("--lr", type=float, help="Adam's step size after warm-up")
    add("--decay-from", type=float, help="share of the run after which the step size falls to 0")
    add("--l1-warmup", type=float, help="share of the run in which the L1 weight rises from 0")
    add("--start", help="'random' directions or tokens of the 'data'")
    add("--token-batch", type=int, help="tokens per optimiser step, all processes together")
    add("--seed", type=int, help="seed of weights, order and mixing")
    add("--execution", help="'auto', 'dense', 'sparse' or 'sparse_f32'")
    add("--workers", type=int, help="processes that decode images, per training process")
    add("--lanes", type=int, help="parts of a chunk; the number of processes must divide it")
    add("--cache", help="folder for activations, made once and read by later runs")
    add("--tensorboard", action=argparse.BooleanOptionalAction, help="also log to TensorBoard")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())
