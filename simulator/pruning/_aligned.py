"""Find widths of a model that kernels run slowly, and round them up: :func:`widths`, :func:`aligned_up`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from simulator.arrays import Array
from simulator.codes import Kind
from simulator.pruning._edits import resized, with_expert_width, with_inner
from simulator.pruning._family import QKV
from simulator.pruning._rows import covering, projections, readers
from simulator.pruning.width_cross import with_hidden
from simulator.workload import Workload

FIXED: tuple[str, ...] = ("query width",)
"""Widths that :func:`aligned_up` does not change: heads times the head dimension."""


def widths(w: Workload) -> Mapping[str, Array]:
    """Return the widths of a model on one device by name: one value per row, 0 for rows without this width."""
    rows = {
        "MLP width": (readers(w, "down"), w.k),
        "expert width": (w.kind == Kind.EXPERTS, w.n),
        "rank": (projections(w) & (w.stage == 1), w.n),
        "hidden size": (readers(w, *QKV, "gate", "up", "gate_up"), w.k),
        "query width": (readers(w, "o"), w.k),
    }
    return {name: np.where(mask, width, 0) for name, (mask, width) in rows.items()}


def aligned_up(w: Workload, unit: Array) -> Workload:
    """Return the workload with its widths rounded up to multiples of ``unit``, one per row, except :data:`FIXED`."""

    def up(width: Array) -> Array:
        rounded: Array = -(-width // unit) * unit
        return rounded

    out = with_inner(w, covering(w, readers(w, "down"), up(w.k)))
    out = with_expert_width(out, up(out.n))
    inside = projections(out)
    first, second = inside & (out.stage == 1), inside & (out.stage == 2)
    out = resized(out, np.where(first, up(out.n), out.n), np.where(second, up(out.k), out.k))
    of_hidden = widths(w)["hidden size"]
    hidden, new = int(of_hidden.max(initial=0)), int(up(of_hidden).max(initial=0))
    return out if hidden == new else with_hidden(out, hidden, new)
