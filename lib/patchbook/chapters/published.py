"""Numbers that others published, to stand beside this run's: never computed here, never mixed with ours."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One row of the paper's Table 1 and MaPLe's own accuracies of the same data set (facts.md §0.2)."""

    high: tuple[float, float]
    """Latents high in both models, per class: base, novel."""
    high_to_low: tuple[float, float]
    low_to_high: tuple[float, float]
    clip: tuple[float, float]
    """Accuracy in %, base and novel, as the paper's Table 1 has it."""
    maple: tuple[float, float]
    official_clip: tuple[float, float]
    """The same as MaPLe's authors published it."""
    official_maple: tuple[float, float]


def _row(high, down, up, clip, maple, official_clip, official_maple) -> Published:
    return Published(high, down, up, clip, maple, official_clip, official_maple)


# fmt: off
TABLE_1 = {
    "stanford_cars": _row((11.18, 11.10), (0.00, 0.12), (0.12, 0.16), (53.45, 66.46), (56.16, 60.63), (63.37, 74.89), (72.94, 74.00)),  # noqa: E501
    "fgvc_aircraft": _row((10.10, 10.57), (0.31, 0.32), (0.00, 0.03), (21.72, 28.09), (31.19, 30.07), (27.19, 36.29), (37.44, 35.61)),  # noqa: E501
    "imagenet": _row((11.05, 10.82), (0.02, 0.02), (0.12, 0.22), (69.88, 67.23), (73.80, 68.24), (72.43, 68.14), (76.66, 70.54)),  # noqa: E501
    "food-101": _row((11.24, 11.58), (0.00, 0.00), (0.00, 0.00), (84.85, 86.65), (87.26, 89.14), (90.10, 91.22), (90.71, 92.05)),  # noqa: E501
    "sun397": _row((11.20, 11.31), (0.00, 0.01), (0.02, 0.02), (68.74, 72.27), (77.89, 76.26), (69.36, 75.35), (80.82, 78.70)),  # noqa: E501
    "ucf101": _row((10.90, 11.10), (0.01, 0.01), (0.07, 0.06), (66.56, 68.80), (81.13, 71.40), (70.53, 77.50), (83.00, 78.66)),  # noqa: E501
    "oxford_pets": _row((11.11, 11.73), (0.00, 0.00), (0.24, 0.16), (85.41, 95.26), (92.04, 94.99), (91.17, 97.26), (95.43, 97.76)),  # noqa: E501
    "dtd": _row((8.85, 8.96), (0.32, 0.36), (1.68, 2.02), (53.12, 53.44), (75.17, 55.62), (53.24, 59.90), (80.36, 59.18)),  # noqa: E501
    "eurosat": _row((6.90, 8.70), (0.50, 1.00), (4.10, 2.30), (42.61, 62.42), (73.07, 55.77), (56.48, 64.05), (94.07, 73.23)),  # noqa: E501
    "caltech-101": _row((11.25, 11.32), (0.02, 0.00), (0.00, 0.00), (92.57, 93.47), (97.49, 94.29), (96.84, 94.00), (97.74, 94.36)),  # noqa: E501
    "oxford_flowers": _row((10.81, 11.47), (0.01, 0.00), (0.01, 0.01), (56.32, 69.26), (88.07, 68.41), (72.08, 77.80), (95.92, 72.46)),  # noqa: E501
}
# fmt: on


class Ablated(NamedTuple):
    """The numbers of one row of the paper's Table 2, None where it prints none (facts.md §0.1)."""

    mse: float
    """Mean of (x̂ - x)² / ‖x‖, to four decimals."""
    cl_sae: float | None
    """Contrastive loss with the CLS token reconstructed."""
    cl_original: float | None
    """The same with the model's own; every row was scored on another batch."""
    l1_norm: float | None
    """Sum of latents per token; that of 'λ × 10' is a misprint, being in another unit."""
    l0: float
    """Active latents per token."""


# keys: ablation.DESIGNS
class Dictionary(NamedTuple):
    """The autoencoder that the paper's figures use (facts.md §0)."""

    d_in: int
    expansion: int
    l1: float
    """Weight of the L1 penalty."""

    @property
    def d_sae(self) -> int:
        """Latents of it."""
        return self.d_in * self.expansion


PAPERS_SAE = Dictionary(768, 64, 8e-5)

TABLE_2 = {
    "baseline (Fry)": Ablated(0.0027, 1.775, 1.895, 13.900, 26.00),
    "CLS, default": Ablated(0.0026, 1.702, 1.859, 13.823, 29.48),
    "λ = 0": Ablated(0.0000, 1.926, 1.927, None, 17570.57),
    "λ × 10": Ablated(0.0069, 1.693, 1.856, 0.077, 5.57),
    "expansion / 2": Ablated(0.0028, 1.690, 1.859, 13.608, 35.71),
    "expansion × 2": Ablated(0.0025, 1.689, 1.816, 14.506, 28.43),
    "no ghost": Ablated(0.0026, 1.663, 1.753, 13.957, 19.35),
    "b_dec from mean": Ablated(0.0027, 1.693, 1.859, 14.050, 32.47),
    "CLS, B/16": Ablated(0.0009, 1.904, 1.986, 5.501, 25.23),
    "all tokens": Ablated(0.0025, 1.885, 1.962, 28.300, 148.56),
    "block 8": Ablated(0.0010, 2.034, 2.063, 14.730, 182.07),
    "block 5": Ablated(0.0007, 2.039, 2.039, 10.670, 298.97),
    "block 2": Ablated(0.0005, None, None, 10.164, 242.97),
}
