"""Select the operators to measure for a given model: first those that narrow its speedups most.

Use :func:`target_workloads` to lower and prune the model, :func:`target_operators` to order its operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from calibration.devices.protocol import ELEMENTWISE_ROLES, Operator
from calibration.measure.plan import next_rows
from simulator.codes import DTYPES, ROLES, Kernel, Kind
from simulator.engines import DEFAULT_ENGINE
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.prediction.scenario import Scenario
from simulator.pruning import prune
from simulator.uncertainty.factors import in_order
from simulator.uncertainty.forward import forward_passes
from simulator.workload import Workload, WorkloadBatch

MOST_ROWS = 400
"""Number of ordered operators; more would hardly narrow the posterior."""

TargetModels = Sequence[Sequence[Workload]]
"""Dense workloads, each followed by its pruned workloads."""


def target_workloads(
    model: str,
    *,
    phases: Sequence[str] = ("prefill", "decode"),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    dtype: str = "bf16",
    families: Sequence[str] = ("depth", "width", "width_cross", "low_rank"),
    sparsities: Sequence[float] = (0.25, 0.5),
    engine: str = DEFAULT_ENGINE,
) -> TargetModels:
    """Return a model (name or config.json) in all combinations of settings, dense and pruned, fused as in an engine."""
    template = Scenario(model=load_model(model), dtype=dtype, engine=engine)
    out = []
    for phase, b, s in product(phases, batch, seq):
        (dense,) = replace(template, phase=phase, shapes=((b, s),)).workloads
        out.append([dense, *(prune(dense, family, sparsity) for family in families for sparsity in sparsities)])
    return out


def target_operators(targets: TargetModels, hw: HardwareProfile, every: bool = True) -> list[Operator]:
    """Return the measurable operators of workloads, each once, best first (``next_rows``).

    They are dense GEMMs; with ``every`` also attention and elementwise operators.
    """
    batch = WorkloadBatch.of([w for workloads in targets for w in workloads])
    lengths = np.array([len(workloads) for workloads in targets])
    dense = np.repeat(np.cumsum(lengths) - lengths, lengths)
    p = forward_passes(batch, hw)
    shapes, _ = batch.shapes
    found: dict[Operator, int] = {}
    for row in range(len(shapes)):
        op = operator_of(shapes, row)
        if op is not None and (every or op.kind == "gemm"):
            found.setdefault(op, row)
    at, operators = np.array(list(found.values()), dtype=np.intp), list(found)
    rows, kind = in_order(p.errors, len(shapes)).take(at), shapes.kind[at].astype(np.intp)
    covariance = p.uncertainty.covariance(rows.wide(), rows.correlated, rows.coordinates, kind)
    order = next_rows(rows, kind, covariance[dense] - covariance, MOST_ROWS)
    return [operators[i] for i in (*order, *sorted(set(range(len(at))) - set(order)))]


def operator_of(w: Workload, row: int) -> Operator | None:
    """Return the operator that times a row of a workload; None if no operator does."""
    kind, dtype, role = int(w.kind[row]), DTYPES[int(w.dtype[row])], ROLES[int(w.role[row])]
    plain = w.dtype[row] == w.weight_dtype[row] and not w.window[row] and not w.block[row]
    if kind == Kind.GEMM and plain and w.kernel[row] == Kernel.DENSE:
        return Operator("gemm", dtype, m=max(round(float(w.m[row])), 1), n=int(w.n[row]), k=int(w.k[row]))
    if kind == Kind.ELEMENTWISE and role in ELEMENTWISE_ROLES:
        return Operator("elementwise", dtype, m=max(int(w.m[row]), 1), n=int(w.n[row]), role=role, cold=False)
    if kind in (Kind.PREFILL_ATTENTION, Kind.DECODE_ATTENTION) and plain and w.density[row] == 1.0:
        decode = kind == Kind.DECODE_ATTENTION
        return Operator(
            "attention_decode" if decode else "attention_prefill",
            dtype,
            batch=int(w.batch[row]),
            q_len=int(w.q_len[row]),
            kv_len=int(w.kv_len[row]),
            heads=int(w.heads[row]),
            kv_heads=int(w.kv_heads[row]),
            head_dim=int(w.head_dim[row]),
            cold=decode,
        )
    return None
