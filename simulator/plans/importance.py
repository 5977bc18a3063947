"""Scores of whole layers where none were measured: published losses of depth pruning of the same model.

The shipped tables have the loss of a model by the fraction of its layers that was removed (ShortGPT, SLEB, LaCo), not
by layer. So a search with these scores chooses how many layers go; which ones follows from what these papers report:
deep layers first, except the last.
"""

from __future__ import annotations

import numpy as np

from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.plans.library import Library
from simulator.plans.variants import without
from simulator.prediction.quality import QualityRow, load_quality
from simulator.units import percent


def importance(model: ModelConfig) -> Library:
    """Return the library of whole layers of a model, with their published relative loss as score.

    Raises
    ------
    InputError
        If no published table has depth pruning of the model.

    Examples
    --------
    >>> from simulator.models.library import load_model
    >>> library = importance(load_model("llama-2-7b"))
    >>> len(library.layers[0]), list(library.values)
    (2, ['relative loss'])
    """
    rows = _rows(model.name)
    if not rows:
        raise InputError(
            f"scores: no published loss of depth pruning for {model.name}; give a file of scores, "
            "or measure them with prunesim quality --per-layer"
        )
    many = model.layers
    removed = [0.0, *(row.sparsity * many for row in rows)]
    losses = [0.0, *(row.relative_loss for row in rows)]
    slope = np.diff(losses) / np.diff(removed)
    at = np.clip(np.searchsorted(removed[1:], np.arange(many) + 0.5), 0, len(slope) - 1)
    each = np.maximum.accumulate(np.maximum(slope[at], 0.0))  # the next layer never costs less
    each *= 1.0 + 1e-6 * np.arange(many)  # so that the order decides between equal ones
    order = [*range(many - 2, -1, -1), many - 1]
    values = {layer: float(each[i]) for i, layer in enumerate(order)}
    layers = tuple((dense, without("attention", without("mlp", dense))) for dense in model.layout)
    scores = tuple(np.array([0.0, values[i]]) for i in range(many))
    first = rows[0]
    note = (
        f"scores: published losses of {first.method} on {first.model} ({first.metric}, {first.source}) by number of "
        f"removed layers, extrapolated beyond {percent(rows[-1].sparsity)}; deep layers go first, except the last"
    )
    return Library(model, layers, {"relative loss": scores}, (note,))


def _rows(name: str) -> list[QualityRow]:
    """Return the rows of the depth method with most fractions, by rising sparsity."""
    table = load_quality("published")
    found: dict[tuple[str, str, str], dict[float, QualityRow]] = {}
    for row in table.rows:
        if row.family == "depth" and row.model.lower() == name.lower() and row.sparsity > 0.0 and not row.options:
            found.setdefault((row.method, row.metric, row.protocol), {})[row.sparsity] = row
    if not found:
        return []
    best = max(found.values(), key=lambda rows: (len(rows), "accuracy" in next(iter(rows.values())).metric))
    return [best[sparsity] for sparsity in sorted(best)]
