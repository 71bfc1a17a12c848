"""One function per figure: takes results, returns a matplotlib figure, computes nothing."""

from patchbook.figures.adaptation import Counts, confusion_pair, count_scatters, gain_shares, setting_curves
from patchbook.figures.appendix import (
    Traded,
    ahead_of_untrained,
    matched_histograms,
    sparsity_and_error,
    token_scatters,
)
from patchbook.figures.localization import (
    Layer,
    Level,
    analysis,
    domain_shift,
    latent_rows,
    layers,
    score_intervals,
)
from patchbook.figures.masking import class_changes, masked_predictions, masking_curves
from patchbook.figures.overview import OneImage, overview
from patchbook.figures.parts import Shown
from patchbook.figures.statistics import (
    activation_histograms,
    co_activation_map,
    known_truth,
    mass_scatter,
    purity_histogram,
    reference_images,
    reference_matrix,
    statistics_scatter,
)
from patchbook.figures.training import dead_latents, image_row, learning_curve, training_curves

__all__ = [
    "Counts",
    "Layer",
    "Level",
    "OneImage",
    "Shown",
    "Traded",
    "activation_histograms",
    "ahead_of_untrained",
    "analysis",
    "class_changes",
    "co_activation_map",
    "dead_latents",
    "confusion_pair",
    "count_scatters",
    "domain_shift",
    "gain_shares",
    "image_row",
    "known_truth",
    "latent_rows",
    "layers",
    "learning_curve",
    "masked_predictions",
    "masking_curves",
    "mass_scatter",
    "matched_histograms",
    "overview",
    "purity_histogram",
    "reference_images",
    "reference_matrix",
    "score_intervals",
    "setting_curves",
    "sparsity_and_error",
    "statistics_scatter",
    "token_scatters",
    "training_curves",
]
