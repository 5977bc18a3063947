"""Separate products from the conversion of their activations, in tables that time both together.

The collectors of aiconfigurator-core time a layer as an engine runs it (``collector/*/collect_gemm.py`` of
https://github.com/ai-dynamo/aiconfigurator): in formats below 16 bits, kernels convert the 16-bit activations first.
SGLang's rows of fp8 have one kernel more (``sgl_per_token_quant_fp8``), those of TensorRT-LLM one for the scale and one
for the values. Engines fuse this conversion or not, so a profile needs the product alone. The same table has the
products in 16 bits. Those of few outputs tell how long such a product takes without conversion: the difference is the
conversion, by m and k, whatever kernels it has.

Symbols
-------
m, n, k : tokens, output features, input features of y[m, n] = x[m, k] w[k, n]
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from simulator.arrays import Array, FloatArray

NARROW = 256
"""Output features up to which a product takes less time than the conversion of its activations."""
FEW, SHORT = 16, 1024
"""Tokens and input features up to which the time of a conversion is that of its launches."""
MOST = 0.65
"""Share of a row's time above which the conversion leaves too little of the product."""


def conversion_s(m: Array, n: Array, k: Array, seconds: FloatArray, wide: Array, share: float) -> FloatArray:
    """Return the time of the conversion in each narrow row of one table, s; NaN where the table does not tell.

    Without conversion, a narrow product moves and computes a ``share`` of what the product in 16 bits does, after the
    same launch. What few tokens take beyond that at large k is not the conversion, but the main loop of one tile.

    Parameters
    ----------
    m, n, k, seconds : ndarray
        Sizes and times of products in 16 bits and in one narrow format.
    wide : ndarray of bool
        Rows in 16 bits.
    share : float
        Bytes of an element over those of 16 bits.

    Examples
    --------
    >>> m, n, k = np.array([[1, 8192, 1, 8192, 1, 8192], [128, 128, 128, 128, 4096, 4096], [1024] * 6])
    >>> t = 1e-6 * np.array([3.0, 5.0, 6.0, 20.0, 7.0, 90.0])
    >>> conversion_s(m, n, k, t, np.array([True, True, False, False, False, False]), 0.5)[2:].round(6).tolist()
    [3e-06, 1.6e-05, 3e-06, 1.6e-05]
    """
    out = np.full(len(seconds), np.nan)
    sizes = np.stack([m, n, k], axis=1).astype(np.float64)
    few = n <= NARROW
    both, at, other = np.intersect1d(_keys(sizes[few & ~wide]), _keys(sizes[few & wide]), return_indices=True)
    if not len(both):
        return out
    launch = seconds[wide].min()
    pair = sizes[few & ~wide][at]
    added = seconds[few & ~wide][at] - launch - share * (seconds[few & wide][other] - launch)
    places, group = np.unique(pair[:, [0, 2]], axis=0, return_inverse=True)
    by_place = _medians(added, group.reshape(-1), len(places))
    tokens, inputs = places.T
    start = (tokens <= FEW) & (inputs <= SHORT)
    if not start.any():
        return out
    widths, of_width = np.unique(inputs, return_inverse=True)
    first = _medians(by_place[tokens <= FEW], of_width[tokens <= FEW], len(widths))
    found = np.median(by_place[start]) + np.maximum(by_place - first[of_width], 0.0)
    known = _keys(places)
    rows = np.flatnonzero(~wide)
    wanted = _keys(sizes[rows][:, [0, 2]])
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    out[rows] = np.where(known[place] == wanted, found[place], np.nan)
    return out


def _keys(columns: FloatArray) -> Array:
    """Return a sortable key per row of whole numbers below 2^21."""
    key = np.zeros(len(columns), dtype=np.int64)
    for column in columns.T:
        key = key * 2**21 + column.astype(np.int64)
    return key


def _medians(values: FloatArray, group: Array, count: int) -> FloatArray:
    """Return the median of each group, NaN for empty ones."""
    found = ndimage.labeled_comprehension(values, group, np.arange(count), np.median, np.float64, np.nan)
    return np.asarray(found)
