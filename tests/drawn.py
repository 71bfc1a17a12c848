"""One call of every figure function, at the sizes and with the long names that the book gives it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from patchbook import figures
from patchsae.adaptation.remapping import Groups
from patchsae.runs.intervals import Interval

LATENTS, NAMES = 3072, ["roller coaster", "cat", "ferris wheel", "hot beverage", "musical keyboard"]
SETS = ["All concepts", "OpenMoji animals", "Twemoji animals", "Sketch animals", "OpenMoji food",
        "Twemoji food", "OpenMoji travel", "Twemoji clothing", "Sketch objects", "Sketch activities",
        "Silhouettes"]  # fmt: skip
SIZES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, LATENTS]


def scene(rng: np.random.Generator) -> np.ndarray:
    return rng.random((28, 28, 3))


def scenes(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    return [scene(rng) for _ in range(count)]


def labels(count: int) -> list[str]:
    return [NAMES[at % len(NAMES)] for at in range(count)]


def atlas(rng: np.random.Generator) -> xr.Dataset:
    counts = rng.integers(0, 50, (LATENTS, 22))
    return xr.Dataset(
        {
            "image_frequency": ("latent", 10 ** rng.uniform(-4, 0, LATENTS)),
            "mean_activation": ("latent", 10 ** rng.uniform(-3, 0, LATENTS)),
            "entropy": ("latent", rng.uniform(0, 6, LATENTS)),
            "histogram": (("latent", "bins"), counts),
        },
        {"bin": np.linspace(-4, 1, 22)},
    )


def activation(rng: np.random.Generator) -> np.ndarray:
    values = np.zeros(LATENTS)
    values[rng.choice(LATENTS, 60, replace=False)] = rng.random(60)
    values[7] = 1.2
    return values


def shown(
    rng: np.random.Generator, pictures: int, references: int, title: str = "latent 2047"
) -> figures.Shown:
    return figures.Shown(title, scenes(rng, pictures), scenes(rng, references), labels(references))


def curve(rng: np.random.Generator) -> xr.Dataset:
    names = ["class (oracle)", "class (predicted)", "dataset", "random"]
    value = rng.random((len(names), 2, len(SIZES)))
    dims = ("ranking", "switch", "k")
    return xr.Dataset(
        {"accuracy": (dims, value), "low": (dims, value - 0.05), "high": (dims, value + 0.05)},
        {"ranking": names, "switch": ["on", "off"], "k": SIZES},
        {"original": (0.8, 0.7, 0.9), "classes": 40},
    )


def settings(rng: np.random.Generator, count: int) -> dict:
    pairs = [(a, b) for a in ("CLIP", "MaPLe") for b in ("CLIP", "MaPLe")]
    return {name: {pair: curve(rng) for pair in pairs} for name in SETS[:count]}


def interval(rng: np.random.Generator) -> Interval:
    value = rng.random() / 2 + 0.2
    return Interval(value, value - 0.1, value + 0.1)


def intervals(rng: np.random.Generator, rows: list[str], names: list[str]) -> dict:
    return {row: {name: interval(rng) for name in names} for row in rows}


def counts(rng: np.random.Generator) -> figures.Counts:
    before, after = rng.integers(0, 900, (2, LATENTS))
    masks = [rng.random(LATENTS) < 0.01 for _ in Groups._fields]
    note = "high 31, high-to-low 12, low-to-high 9"
    return figures.Counts(before, after, Groups(*masks), (800.0, 100.0), note, {5: "5", 9: "9"})


def metrics() -> list[dict[str, float]]:
    steps = np.arange(1, 40)
    return [
        {"step": s, "tokens": 1e5 * s, "mse": 1 / s, "fvu": 1 / s, "l0": 300 / s, "dead_share": 0.01 * s}
        for s in steps.tolist()
    ]


def calls(rng: np.random.Generator) -> dict[str, Callable[[], Figure]]:
    """Return a call of each figure function, by its name."""
    runs = {"the book's (loaded)": metrics(), "live": metrics()}
    measured = ["trained", "random SAE", "principal components", "shuffled bedding", "4×4 colours"]
    rows = [f"{switch}, {name}" for switch in ("on", "off")
            for name in ("class (oracle)", "class (predicted)", "dataset", "random 0")]  # fmt: skip
    answered = np.array(NAMES, dtype=object)[rng.integers(0, 5, (4, len(rows), len(SIZES)))]
    one = figures.OneImage(
        scene(rng), (14, 14), rng.normal(size=(197, 192)), rng.random((197, 60)),
        rng.normal(size=(197, 192)),
        {f"latent {s}": scene(rng) for s in (12, 412, 2047)},
        {"model": rng.random(5), "through SAE": rng.random(5)}, NAMES,
    )  # fmt: skip
    levels = [
        figures.Level(name, "tokens above τ", activation(rng), (3, 3, 2, 2) if "patch" in name else None, 7,
                      shown(rng, 3, 10, "latent 2047: references"))
        for name in ("patch 1", "patch 2", "image", "class: roller coaster", "data set")
    ]  # fmt: skip
    long = "(a) latent 2047: frequency 0.0012, mean activation 0.0123, entropy 3.21 nat"
    return {
        "activation_histograms": lambda: figures.activation_histograms(atlas(rng), {"a": 1, "b": 2}),
        "ahead_of_untrained": lambda: figures.ahead_of_untrained(
            intervals(rng, [f"probe of the scene's level {n}" for n in range(5)], ["seed 0", "seed 1"])
        ),
        "analysis": lambda: figures.analysis(scene(rng), levels, ["map", "patch × activation", "bilinear"]),
        "class_changes": lambda: figures.class_changes(rng.random(50) - 0.8, 50, rng.random(50)),
        "co_activation_map": lambda: figures.co_activation_map(rng.random((30, 30)), range(2000, 2030)),
        "dead_latents": lambda: figures.dead_latents(runs),
        "confusion_pair": lambda: figures.confusion_pair(*rng.random((2, 20, 20)), labels(20)),
        "count_scatters": lambda: figures.count_scatters({name: counts(rng) for name in SETS}),
        "domain_shift": lambda: figures.domain_shift(
            {"openmoji": scene(rng), "silhouettes": scene(rng)},
            {"openmoji": activation(rng), "silhouettes": activation(rng)},
            {s: shown(rng, 2, 10, f"latent {s}, only in the first") for s in (7, 412, 2047)},
            "tokens above τ",
        ),  # fmt: skip
        "gain_shares": lambda: figures.gain_shares(
            intervals(rng, ["all data sets", "Silhouettes", "the sets that gain most"],
                      [f"MaPLe's {part}" for part in ("text", "image side", "map", "latents", "both")])
        ),  # fmt: skip
        "image_row": lambda: figures.image_row(scenes(rng, 16), labels(16)),
        "known_truth": lambda: figures.known_truth(
            {"trained SAE": (0.7, 0.6, 0.8), "untrained SAE": (0.2, 0.1, 0.3)},
            {"trained SAE": 0.9, "untrained SAE": 0.3, "principal components": 0.5, "residual stream": 0.8},
            {"concept": 900, "style": 12, "group": 40, "background": 5, "word": 31, "place": 0, "tint": 3},
            rng.random((7, 24)), ["concept"] * 8 + ["style"] * 8 + ["word"] * 8,
        ),  # fmt: skip
        "latent_rows": lambda: figures.latent_rows(
            [shown(rng, 3, 5, f"Silhouettes, water buffalo: {kind} (12), latent 7, counts 12 and 900")
             for kind in ("high", "high-to-low", "low-to-high")], ["image", "CLIP", "MaPLe"],
        ),  # fmt: skip
        "layers": lambda: figures.layers(
            scene(rng), (4, 4, 2, 2),
            [figures.Layer(f"({letter}) block {block}, {LATENTS} latents", activation(rng),
                           {s: shown(rng, 1, 5, f"latent {s}") for s in (7, 8, 9)}, atlas(rng))
             for letter, block in zip("bcde", (2, 5, 8, 11), strict=True)],
        ),  # fmt: skip
        "learning_curve": lambda: figures.learning_curve(
            [{"images": 1e4 * n, "openmoji_concept": n / 9, "twemoji_concept": n / 10} for n in range(9)],
            ["openmoji", "twemoji"], 0.01,
        ),  # fmt: skip
        "masked_predictions": lambda: figures.masked_predictions(
            scenes(rng, 4), labels(4), answered, answered == np.array(labels(4))[:, None, None], rows,
            [f"k = {k:,}" for k in SIZES],
        ),  # fmt: skip
        "masking_curves": lambda: figures.masking_curves({name: curve(rng) for name in SETS}),
        "mass_scatter": lambda: figures.mass_scatter(rng.random(400), rng.random(400), 0.2, 0.6),
        "matched_histograms": lambda: figures.matched_histograms(
            {name: {kind: rng.uniform(0.1, 1, 500) for kind in ("another seed", "the same seed, other data",
                                                                "random directions")}
             for name in ("CLS, B/16", "all tokens", "chapter 1")}
        ),  # fmt: skip
        "overview": lambda: figures.overview(one, ("blocks 1–11", "encoder", "decoder")),
        "purity_histogram": lambda: figures.purity_histogram(rng.random(500), rng.random(500) / 2),
        "reference_images": lambda: figures.reference_images(
            {long: (scenes(rng, 10), labels(10)), long.replace("(a)", "(b)"): (scenes(rng, 4), labels(4))}
        ),
        "reference_matrix": lambda: figures.reference_matrix(
            [[(scene(rng), "f -1.2, a -0.3, e 5.1") for _ in SETS] for _ in SETS],
            [f"{name}\n{number}" for number, name in enumerate(SETS, 2000)], SETS,
        ),  # fmt: skip
        "score_intervals": lambda: figures.score_intervals(
            intervals(rng, ["trained styles", "… two or more objects", "openmoji", "sketch", "silhouette"],
                      measured), "pointing game (mean over scenes)",
        ),  # fmt: skip
        "setting_curves": lambda: figures.setting_curves(settings(rng, 11), "class (oracle)"),
        "sparsity_and_error": lambda: figures.sparsity_and_error(
            {title: [figures.Traded(f"expansion / {n}, another", 10.0 * n, 0.1 / n) for n in range(1, 9)]
             for title in ("rows on the CLS token", "rows on all tokens")}
        ),  # fmt: skip
        "statistics_scatter": lambda: figures.statistics_scatter(atlas(rng), {"a": 1, "b": 2}),
        "token_scatters": lambda: figures.token_scatters({"(a) CLS": atlas(rng), "(b) all": atlas(rng)}),
        "training_curves": lambda: figures.training_curves(runs),
    }  # fmt: skip
