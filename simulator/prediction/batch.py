"""Prune requests that differ only in shape by every pruning, into one batch of workloads:
:func:`batch_of`.

Most families depend only on widths, heads and layers, which all requests of a model share. One call
of such a family prunes the rows of many requests; ``Family.together`` states which requests it
accepts together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from simulator.arguments import instance, listed
from simulator.arrays import IndexArray
from simulator.codes import Kernel, role_code
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.passes import refusal
from simulator.prediction.prunings import Pruning, check_alike
from simulator.prediction.requests import by_key
from simulator.request import Request
from simulator.workload import Workload, WorkloadBatch, model_array

_EMBEDDING = role_code("embedding")[0]
OPERATOR_ROWS = 120_000  # operators computed together, about: 25 MB of columns, 100 MB in between
RequestGroup = tuple[int, ...]  # indices of some requests
# requests, their pruned rows, and rows of each
GroupRows = tuple[RequestGroup, Workload, IndexArray]
Together = Mapping[str, Sequence[tuple[RequestGroup, Workload]]]
"""``Family.together`` -> the requests of each call, and their rows as one workload."""

Reject = Callable[[int | None, str, str], None]
"""Receives an exclusion: index of the pruning (None: the dense model), reason, and device ("":
all). It may raise."""


def rejecting(_pruning: int | None, reason: str, _device: str = "") -> None:
    """Raise InputError: the default :data:`Reject`."""
    raise InputError(reason)


def batch_of(
    requests: Sequence[Request], prunings: Sequence[Pruning], reject: Reject
) -> WorkloadBatch:
    """Return the dense workloads of requests that differ only in shape, then their pruned versions
    by pruning. Versions that a family or the engine does not support go to ``reject``."""
    workloads = [lower(request) for request in requests]
    dense = WorkloadBatch.of(workloads)
    if unable := refusal(dense):
        reject(None, unable, "")
    together = _together(workloads)
    batches = [dense]
    for i, pruning in enumerate(prunings):
        reasons: dict[str, None] = {}
        for part in _parts(requests, pruning, together, reasons):
            batch = _pruned(requests, *part, pruning, i)
            # other prunings have the number formats of the dense model
            other = pruning.other or (batch.rows.kernel == Kernel.SPARSE24).any()
            if reason := unable or (refusal(batch) if other else ""):
                reasons[reason] = None
            else:
                batches.append(batch)
        for reason in reasons:
            reject(i, reason, "")
    return WorkloadBatch.join(batches)


def batch_with(dense: Workload, pruned: Iterable[Workload]) -> WorkloadBatch:
    """Return a dense workload and its pruned versions, of one request; pruning ``i`` is the i-th
    version."""
    versions = listed("pruned", pruned)
    instance("dense", dense, Workload, "simulator.lower")
    for w in versions:
        check_alike(dense, instance("pruned", w, Workload, "simulator.lower"))
    of_dense, pruning = np.zeros(1 + len(versions), dtype=np.intp), np.arange(-1, len(versions))
    return WorkloadBatch.of([dense, *versions], dense=of_dense, pruning=pruning)


def _pruned(
    requests: Sequence[Request],
    group: RequestGroup,
    rows: Workload,
    lengths: IndexArray,
    pruning: Pruning,
    index: int,
) -> WorkloadBatch:
    many, steps = len(group), rows.meta.applied
    return WorkloadBatch(
        rows=rows,
        lengths=lengths,
        sequences=np.array([requests[i].batch for i in group], dtype=np.intp),
        dense=np.array(group, dtype=np.intp),
        pruning=np.full(many, index),
        sparsity=np.full(many, pruning.requested(rows)),
        realised=np.full(many, 1.0 - math.prod(1.0 - step.realised for step in steps)),
        models=model_array([rows.meta.config] * many),
    )


def _together(workloads: Sequence[Workload]) -> Together:
    every = tuple(range(len(workloads)))
    lengths = by_key(every, lambda i: workloads[i].meta.seq)
    groups: Mapping[str, list[RequestGroup]] = {
        "any": [every],
        "equal length": [tuple(group) for group in lengths.values()],
        "one": [(i,) for i in every],
    }
    return {
        name: [(group, _joined([workloads[i] for i in group])) for group in some]
        for name, some in groups.items()
    }


def _joined(workloads: Sequence[Workload]) -> Workload:
    if len(workloads) == 1:
        return workloads[0]
    meta = replace(workloads[0].meta, batch=max(w.meta.batch for w in workloads))
    return Workload.concat(workloads, meta=meta)


def _parts(
    requests: Sequence[Request], pruning: Pruning, together: Together, reasons: dict[str, None]
) -> list[GroupRows]:
    """Prune the requests, in groups; reasons of rejected ones go to ``reasons``."""
    if lacks := pruning.lacking(load_model(requests[0].model)):
        reasons[lacks] = None
        return []
    if pruning.other:
        try:
            pruned = [pruning.apply(lower(request), request) for request in requests]
        except InputError as error:
            reasons[str(error)] = None
            return []
        return [((i,), w, np.array([len(w)])) for i, w in enumerate(pruned)]
    return [
        part
        for group, rows in together[pruning.together]
        for part in _prune(requests, group, rows, pruning, reasons)
    ]


def _prune(
    requests: Sequence[Request],
    group: RequestGroup,
    rows: Workload,
    pruning: Pruning,
    reasons: dict[str, None],
) -> list[GroupRows]:
    """Prune a group in one call if possible, else in one call per request."""

    def lowered(model: Model) -> Workload:
        return _joined([lower(replace(requests[i], model=model)) for i in group])

    try:
        pruned = pruning.apply(rows, requests[0], lowered)
    except InputError as error:
        reasons[str(error)] = None
        if len(group) == 1 or _refusal(pruning, requests[group[0]]) == str(error):
            return []  # the sparsity is the reason, not the request
    else:
        passes = [int((lower(requests[i]).role == _EMBEDDING).sum()) for i in group]
        lengths = _lengths(pruned, passes)
        if lengths is not None:
            return [(group, pruned, lengths)]
    return [
        part for i in group for part in _prune(requests, (i,), lower(requests[i]), pruning, reasons)
    ]


def _refusal(pruning: Pruning, request: Request) -> str:
    try:
        pruning.apply(lower(request), request)
    except InputError as error:
        return str(error)
    return ""


def _lengths(pruned: Workload, passes: Sequence[int]) -> IndexArray | None:
    """Return the number of rows of each request, whose ``passes`` begin with an embedding; else
    None."""
    if len(passes) == 1:
        return np.array([len(pruned)])
    begins = np.flatnonzero(pruned.role == _EMBEDDING)
    if len(begins) != sum(passes) or begins[0] != 0:
        return None
    first = np.cumsum([0, *passes[:-1]])
    return np.diff(np.append(begins[first], len(pruned)))
