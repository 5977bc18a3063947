"""Semi-structured pruning: two of four neighbouring weights are zero (SparseGPT, Wanda at 2:4)."""

from __future__ import annotations

from simulator.errors import InputError
from simulator.models.model import Model
from simulator.pruning._family import WEIGHTS, Choice, Family, weights_removed, with_zeros


def semi_structured(model: Model, choice: Choice) -> tuple[Model, float]:
    """Make the projections 2:4 sparse: density 0.5 on sparse tensor cores. The kernel pads ``m`` to
    a multiple of 8.

    A sparsity per part or per layer of 0.5 and 0 selects some of the projections. Where an engine
    fuses projections, only projections that are stored alike become one product."""

    def check(share: float) -> None:
        if share != 0.5:
            expected = "expected 0.5, as 2:4 removes half (0 keeps a projection dense)"
            raise InputError(f"semi_structured at sparsity {share:g}: {expected}")

    out = with_zeros(model, choice, "2:4", "semi_structured", check)
    return out, weights_removed(model, out)


FAMILY = Family(
    function=semi_structured,
    axis="static K",
    loading="checkpoint",
    parts={},
    order=4,
    summary="2:4 sparsity in all projections: half the weights and FLOPs, plus 2-bit indices",
    default=0.5,
    whole=False,
    targets=WEIGHTS,
)
