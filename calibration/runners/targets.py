"""What to measure for a model that is asked about: its operators, those first that narrow its speedups most.

Use :func:`asked_workloads` to lower and prune it, :func:`asked_operators` to order what can be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from calibration.devices.protocol import ELEMENTWISE_ROLES, OPERATORS, Operator
from calibration.measure.plan import next_rows
from simulator.cost.forward import forward_passes
from simulator.engines import DEFAULT_ENGINE
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.predict.scenario import Scenario
from simulator.pruning import prune
from simulator.workload import DTYPES, ROLES, Kernel, Kind, Workload
from simulator.workload_batch import WorkloadBatch

MOST_ROWS = 400
"""Operators that are ordered; the posterior of more is hardly narrower."""

Asked = Sequence[Sequence[Workload]]
"""Dense workloads, each followed by its pruned ones."""


def asked_workloads(
    model: str,
    *,
    phases: Sequence[str] = ("prefill", "decode"),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    dtype: str = "bf16",
    families: Sequence[str] = ("depth", "width", "width_cross", "low_rank"),
    sparsities: Sequence[float] = (0.25, 0.5),
    engine: str = DEFAULT_ENGINE,
) -> Asked:
    """A model (a name, or a config.json) in all combinations of settings, dense and pruned, fused as in an engine."""
    template = Scenario(model=load_model(model), dtype=dtype, engine=engine)
    out = []
    for phase, b, s in product(phases, batch, seq):
        (dense,) = replace(template, phase=phase, shapes=((b, s),)).workloads
        out.append([dense, *(prune(dense, family, sparsity) for family in families for sparsity in sparsities)])
    return out


def asked_operators(asked: Asked, hw: HardwareProfile, every: bool = True) -> list[Operator]:
    """The operators of workloads that can be measured, once each, best first (``next_rows``): dense GEMMs, with
    ``every`` also attention and elementwise operators."""
    stack = WorkloadBatch.of([w for workloads in asked for w in workloads])
    lengths = np.array([len(workloads) for workloads in asked])
    dense = np.repeat(np.cumsum(lengths) - lengths, lengths)
    p = forward_passes(stack, hw)
    shapes, _ = stack.shapes
    found: dict[Operator, int] = {}
    for row in range(len(shapes)):
        op = operator_of(shapes, row)
        if op is not None and (every or op.kind == "gemm"):
            found.setdefault(op, row)
    at, operators = np.array(list(found.values()), dtype=np.intp), list(found)
    assert p.each.uncertainty is not None
    rows = {name: column[at] for name, column in p.each.uncertainty.columns().items()} | {"kind": shapes.kind[at]}
    covariance = p.uncertainty.covariance(rows["shared"], rows["local"], rows["place"], rows["kind"])
    order = next_rows(rows, covariance[dense] - covariance, MOST_ROWS)
    return [operators[i] for i in (*order, *sorted(set(range(len(at))) - set(order)))]


def operator_of(w: Workload, row: int) -> Operator | None:
    """What a device is asked to time for a row of a workload; None for what it cannot be."""
    kind, dtype, role = int(w.kind[row]), DTYPES[int(w.dtype[row])], ROLES[int(w.role[row])]
    plain = w.dtype[row] == w.weight_dtype[row] and not w.window[row] and not w.block[row]
    if kind == Kind.GEMM and plain and w.kernel[row] == Kernel.DENSE:
        return Operator("gemm", dtype, m=max(round(float(w.m[row])), 1), n=int(w.n[row]), k=int(w.k[row]))
    if kind == Kind.ELEMENTWISE and role in ELEMENTWISE_ROLES:
        return Operator("elementwise", dtype, m=max(int(w.m[row]), 1), n=int(w.n[row]), role=role, cold=False)
    if kind in (Kind.PREFILL_ATTENTION, Kind.DECODE_ATTENTION) and plain and w.density[row] == 1.0:
        sizes: Any = {name: int(getattr(w, name)[row]) for name in OPERATORS["attention_decode"]}
        decode = kind == Kind.DECODE_ATTENTION
        return Operator(f"attention_{'decode' if decode else 'prefill'}", dtype, **sizes, cold=decode)
    return None
