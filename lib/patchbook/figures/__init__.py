"""One function per figure: takes results, returns a matplotlib figure, computes nothing.

A file is loaded when a name of it is first used, so that a chapter depends on the figures that it draws.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adaptation": ["Counts", "confusion_pair", "count_scatters", "gain_shares", "setting_curves"],
        "appendix": [
            "Traded",
            "ahead_of_untrained",
            "matched_histograms",
            "sparsity_and_error",
            "token_scatters",
        ],
        "localization": [
            "Layer",
            "Level",
            "analysis",
            "domain_shift",
            "latent_rows",
            "layers",
            "score_intervals",
        ],
        "masking": ["class_changes", "masked_predictions", "masking_curves"],
        "overview": ["OneImage", "overview"],
        "parts": ["Shown"],
        "statistics": [
            "activation_histograms",
            "co_activation_map",
            "known_truth",
            "mass_scatter",
            "purity_histogram",
            "reference_images",
            "reference_matrix",
            "statistics_scatter",
        ],
        "training": ["dead_latents", "image_row", "learning_curve", "training_curves"],
    },
)
