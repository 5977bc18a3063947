"""Low-rank factorisation: replace each weight by two thin factors (SVD-LLM, ASVD)."""

from __future__ import annotations

import math
from dataclasses import replace

from simulator.errors import InputError
from simulator.models.form import Form
from simulator.models.model import Model
from simulator.pruning._family import (
    WEIGHTS,
    Choice,
    Family,
    changed_weights,
    weights_removed,
    whole,
)


def low_rank(model: Model, choice: Choice, *, align: int = 16) -> tuple[Model, float]:
    """Replace W of N x K by K x r and r x N, r = ``floor((1-s) N K / (N + K))`` rounded up to
    ``align``, at most N, K.

    The weights are those of the checkpoint: an engine runs their factors as they are, also where it
    fuses whole weights. The second factor keeps the bias."""
    align = whole("align", align)

    def factors(form: Form, share: float, n: int, k: int) -> Form:
        if form.rank is not None:
            raise InputError(
                "low_rank: expected dense projections, got low-rank ones; factorise once"
            )
        if form.zeros:
            raise InputError(
                "low_rank: expected dense projections, got sparse ones; apply low_rank first"
            )
        exact = math.floor((1.0 - share) * n * k / max(n + k, 1) + 1e-9)
        return replace(form, rank=min(max(math.ceil(exact / align), 1) * align, n, k))

    out = changed_weights(model, choice, factors)
    return out, weights_removed(model, out)


FAMILY = Family(
    function=low_rank,
    axis="static K",
    loading="checkpoint",
    parts={},
    narrows=True,
    order=5,
    summary="replaces each projection by two GEMMs of a small rank",
    whole=False,
    targets=WEIGHTS,
)
