"""Insert the kernels that a method adds: products, copies, selections, and kernels of a known
time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.arrays import Array, FloatArray
from simulator.codes import Part, Phase
from simulator.errors import InputError
from simulator.pruning.described.changes import Kept
from simulator.pruning.described.description import Addition
from simulator.pruning.described.sizes import in_layers, row_sizes
from simulator.pruning.dynamic import rows as _rows
from simulator.pruning.dynamic.dynamic_depth import layer_ends
from simulator.workload import Workload


@dataclass(frozen=True)
class Additions:
    """The kernels that a method adds, and what their expressions name."""

    method: str
    additions: Sequence[Addition]
    s: float | FloatArray  # sparsity of all layers, or (L,)
    kept: Kept | None = None

    def insert(self, w: Workload) -> Workload:
        parts: _rows.Inserted = []
        for addition in self.additions:
            at, place = self._places(w, addition)
            if len(at):
                parts.append((place, self._rows(w, at, addition)))
        return _rows.insert(w, parts) if parts else w

    def _places(self, w: Workload, addition: Addition) -> tuple[Array, Array]:
        """Return the rows that give an addition its tokens, layers and executions, and the place of
        each added row (see :func:`simulator.pruning.dynamic.rows.insert`)."""
        after, _, what = addition.place.partition(" ")
        before = after == "before"
        if addition.every == "pass":
            at = np.flatnonzero(w.is_role("embedding"))
            place = at + 0.5
        elif addition.every == "drop":
            if self.kept is None:
                raise InputError(f"{self.method}: every: drop: expected a change of the prompt")
            at = np.flatnonzero(self.kept.drops)
            place = _rows.before_sublayer(w, at)
        elif what == "attention":
            at = np.flatnonzero(w.is_attention)
            place = at + (-0.5 if before else 0.5)
        else:
            at = np.flatnonzero(_rows.sublayer_ends(w))
            if what == "mlp":
                at = at[w.part[at] == Part.MLP]
            elif what == "layer":
                at = layer_ends(w, at)[0 if before else 1]
            place = _rows.before_sublayer(w, at) if before else at + 0.5
        kept = np.isin(w.phase[at], [Phase[name.upper()] for name in addition.phases])
        if addition.layers is not None and addition.every != "pass":
            kept &= in_layers(w, addition.layers)[at]
        if addition.when is not None:
            sizes = self._sizes(w, at, addition.when.names)
            kept &= np.broadcast_to(np.asarray(addition.when.value(sizes)) > 0, at.shape)
        return at[kept], place[kept]

    def _sizes(self, w: Workload, at: Array, names: frozenset[str]) -> dict[str, Any]:
        sizes: dict[str, Any] = row_sizes(w, at, names, self.s)
        if "kept" in names:
            if self.kept is None:
                raise InputError(f"{self.method}: kept: expected a change of the prompt or cache")
            sizes["kept"] = self.kept.stay[at].astype(np.float64)
        return sizes

    def _rows(self, w: Workload, at: Array, addition: Addition) -> Workload:
        named = frozenset(n for one in addition.sizes.values() for n in one.names)
        sizes = self._sizes(w, at, named | {"tokens"})
        if addition.every == "drop" and self.kept is not None:
            sizes["tokens"] = self.kept.reach[at].astype(np.float64)
        values = {
            name: np.broadcast_to(np.asarray(one.value(sizes), dtype=np.float64), at.shape)
            for name, one in addition.sizes.items()
        }
        self._check(addition, values)
        count = w.count[at] * addition.kernels
        # rows without tokens (m) keep their bytes where a change drops tokens
        columns: dict[str, Any] = {"count": count, "m": _whole(sizes["tokens"])}
        if addition.every == "drop":
            once = count / np.maximum(w.layers[at], 1)
            columns = {"layers": np.ones(len(at)), "count": once, "m": 0}
        role = "post_norm" if addition.role == "norm" else addition.role
        if addition.kind == "gemm":
            m, n, k = (_whole(values[name]) for name in "mnk")
            return _rows.overhead_gemm(w, at, role, n, k, **{**columns, "m": m})
        if addition.kind == "time":
            columns["k"] = _whole(values["seconds"] * 1e9)
        else:
            columns |= {f"{name}_bytes": value for name, value in values.items()}
        return _rows.overheads(w, at, role, **columns)

    def _check(self, addition: Addition, values: dict[str, FloatArray]) -> None:
        above = addition.kind == "gemm"
        for name, value in values.items():
            if (value < 0.0).any() or (above and (value <= 0.0).any()):
                raise InputError(
                    f"{self.method}: {addition.role} {name} {addition.sizes[name].text!r}: expected"
                    f" a number {'above 0' if above else 'from 0 up'}, got {value.min():g}"
                )


def _whole(values: FloatArray) -> Array:
    return np.ceil(values - 1e-9).astype(np.int64)
