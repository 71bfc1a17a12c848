"""What belongs to a latent besides itself: the latents nearest to it, and the class that it leads to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.sparse import csr_matrix

from patchsae.explorer.data import References
from patchsae.explorer.packing import pack
from patchsae.explorer.references import LATENTS
from patchsae.sae.model import SAE

NEAREST = 6


@torch.no_grad()
def near_block(sae: SAE, fires: csr_matrix | None, first: int) -> dict[str, Any]:
    """Return the nearest of LATENTS latents: by decoder cosine and, given `fires_on`, by co-activation."""
    stop = min(first + LATENTS, sae.d_sae)
    rows = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    cosine = (rows[first:stop] @ rows.T).cpu().numpy()
    block = {"decoder": _nearest(cosine, first)}
    if fires is not None:
        together = (fires[:, first:stop].T @ fires).toarray()
        block["together"] = _nearest(together, first)
    return block


def fires_on(atlas: xr.Dataset, latents: int) -> csr_matrix:
    """Return which images each latent is among the strongest of, as unit columns: [N, S].

    The product of two columns is the cosine of the activations that the atlas kept of each image.
    """
    latent, value = atlas.image_latent.values, atlas.image_value.values
    used = (latent >= 0) & (value > 0)
    row = np.broadcast_to(np.arange(len(latent))[:, None], latent.shape)[used]
    kept = csr_matrix((value[used], (row, latent[used])), shape=(len(latent), latents))
    length = np.sqrt(np.asarray(kept.multiply(kept).sum(0))).ravel()
    return kept.multiply(1 / np.maximum(length, 1e-12)[None]).tocsr()


def _nearest(likeness: np.ndarray, first: int) -> dict[str, Any]:
    """Keep the NEAREST of each row [n, S], itself aside; a likeness of 0 or less is none."""
    likeness = likeness.astype(np.float32)
    likeness[np.arange(len(likeness)), first + np.arange(len(likeness))] = -1
    count = min(NEAREST, likeness.shape[1])
    order = np.argsort(-likeness, axis=1, kind="stable")[:, :count]
    return {"latent": pack(order), "value": pack(np.maximum(np.take_along_axis(likeness, order, 1), 0))}


def leading_class(refs: References) -> np.ndarray:
    """Return the class that most references of each latent are of, plus 1: int64 [S], 0 for none.

    A class must have more than one reference and half of them; ties go to the stronger references.
    """
    found = np.zeros(refs.index.shape[1], np.int64)
    for s in range(len(found)):
        labels = refs.label[refs.index[:, s] >= 0, s].tolist()
        if labels:
            label, times = Counter(labels).most_common(1)[0]
            if times > 1 and 2 * times >= len(labels):
                found[s] = label + 1
    return found
