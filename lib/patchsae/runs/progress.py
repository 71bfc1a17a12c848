"""Progress bars that a batch run can silence."""

import os

from tqdm.auto import tqdm


def progress_bar(*args, shown: bool = True, **options) -> tqdm:
    """Make a tqdm bar, hidden if not `shown` or if TQDM_DISABLE is set.

    tqdm itself honours that variable on a terminal but not in a notebook, where a page rendered from the
    result would keep a dead widget.
    """
    silenced = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(*args, disable=silenced or not shown, **options)
