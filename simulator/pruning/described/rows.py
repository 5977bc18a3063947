"""The dynamic part of a described method as a family: :func:`family_of`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from simulator.pruning._family import Choice, Family
from simulator.pruning.described.additions import Additions
from simulator.pruning.described.changes import Changes
from simulator.pruning.described.description import Description
from simulator.pruning.dynamic.rows import merge_runs
from simulator.workload import Workload


def family_of(description: Description) -> Family:
    """Return the family of what a method changes per token and adds."""
    return Family(
        function=_Rows(description),
        axis="described",
        loading="kernels",
        parts=None if _of_tokens(description) else {},
        order=20,
        together="one",
        summary=description.what,
        sets_sparsity=not description.needs_sparsity,
    )


def _of_tokens(description: Description) -> bool:
    return any(change.axis not in ("keep", "budget") for change in description.dynamic)


@dataclass(frozen=True)
class _Rows:
    """The function of the family of a description."""

    description: Description
    __kwdefaults__ = None

    @property
    def __name__(self) -> str:
        return self.description.name

    def __call__(self, w: Workload, choice: Choice, *, ideal: bool) -> tuple[Workload, float]:
        """Return the pruned workload and the realised sparsity: the removed share of the positions
        of a prompt, else ``s``; without ``s``, the removed share of the FLOPs of the layers."""
        about, dense = self.description, w
        s = choice.asked if choice.form == "scalar" else choice.fractions
        dynamic = tuple(replace(one, layers=one.layers or about.layers) for one in about.dynamic)
        adds = tuple(replace(one, layers=one.layers or about.layers) for one in about.adds)
        listed = any(one.layers for one in dynamic) or any(one.layers for one in adds)
        if listed or np.ndim(s) or "layer" in about.names:
            w = w.expand()
        changes = Changes(about.name, dynamic, s, ideal)
        if adds and not ideal:
            w = Additions(about.name, adds, s, changes.kept(w)).insert(w)
        w, realised = changes.apply(w)
        pruned = merge_runs(w)
        if realised is None:
            realised = choice.asked if choice.form != "budget" else _removed_flops(dense, pruned)
        return pruned, realised


def _removed_flops(dense: Workload, pruned: Workload) -> float:
    before, after = (float(w.flops[(w.layer >= 0) & ~w.overhead].sum()) for w in (dense, pruned))
    return max(0.0, 1.0 - after / before) if before > 0 else 0.0
