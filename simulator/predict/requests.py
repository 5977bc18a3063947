"""Many dense workloads of one model pruned in few calls: one family at one sparsity over many batches and lengths.

Use :func:`prune_all`. Most families only look at widths, heads and layers, which requests of one model share, so the
rows of many requests go through the family's function together; what a family allows it says itself
(``Family.together``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.arrays import IndexArray
from simulator.errors import InputError
from simulator.pruning import FAMILIES, prune
from simulator.pruning._methods import Method, load_method
from simulator.workload import Phase, Workload, role_code
from simulator.workload_batch import WorkloadBatch

if TYPE_CHECKING:
    from simulator.models.config import ModelConfig
    from simulator.predict.settings import Setting

Group = tuple[int, ...]
"""Indices of some requests."""


@dataclass(frozen=True)
class Requests:
    """Dense workloads of one model, phase and setting, one for each (batch, seq)."""

    shapes: tuple[tuple[int, int], ...]
    workloads: tuple[Workload, ...]

    @classmethod
    def of(cls, model: ModelConfig, setting: Setting, phase: str, shapes: tuple[tuple[int, int], ...]) -> Requests:
        return cls(shapes, tuple(setting.lower(model, phase, b, s) for b, s in shapes))

    @cached_property
    def together(self) -> dict[str, list[tuple[Group, Workload]]]:
        """What families say they can prune together -> the requests of each call, and their rows as one workload."""
        groups = {"any": [tuple(range(len(self.shapes)))], "equal length": _by_length(self.shapes)}
        return {name: [(group, self._joined(group)) for group in found] for name, found in groups.items()}

    def _joined(self, group: Group) -> Workload:
        workloads, batch = [self.workloads[i] for i in group], max(self.shapes[i][0] for i in group)
        return Workload.concat(workloads, meta=replace(workloads[0].meta, batch=batch))


def _by_length(shapes: Sequence[tuple[int, int]]) -> list[Group]:
    groups: list[list[int]] = []
    for length in dict.fromkeys(seq for _, seq in shapes):
        first = len(groups)
        for i in sorted((i for i, (_, seq) in enumerate(shapes) if seq == length), key=lambda i: shapes[i][0]):
            # rows of all tokens must stay apart from those of one a sequence, which token pruning tells by their number
            if len(groups) == first or shapes[i][0] >= shapes[groups[-1][0]][0] * length:
                groups.append([])
            groups[-1].append(i)
    return [tuple(g) for g in groups]


def prune_all(
    requests: Requests,
    family: str,
    sparsity: Any,
    *,
    ideal: bool = False,
    options: Mapping[str, Any] | None = None,
    method: str = "",
) -> tuple[list[tuple[Group, WorkloadBatch]], tuple[str, ...]]:
    """Requests pruned by a family, some at a time, and why others are refused; arguments as those of
    :func:`simulator.prune`. A published method, where one is named, knows its families and options itself."""
    refused: dict[str, None] = {}
    chosen = load_method(method) if method else FAMILIES[family]
    if isinstance(chosen, Method):
        call = partial(chosen.prune, sparsity=sparsity, ideal=ideal)
    else:
        call = partial(prune, family=family, sparsity=sparsity, ideal=ideal, **(options or {}))
    groups = requests.together[chosen.together]
    return [part for group, joined in groups for part in _prune(requests, group, joined, call, refused)], tuple(refused)


def _prune(
    requests: Requests, group: Group, joined: Workload, call: Callable[[Workload], Workload], refused: dict[str, None]
) -> list[tuple[Group, WorkloadBatch]]:
    """A group in one call where that works, else one call a request."""
    try:
        pruned = call(joined)
    except InputError as error:
        refused[str(error)] = None
        if len(group) == 1 or _refusal(call, requests.workloads[group[0]]) == str(error):
            return []  # it is the sparsity, not the request
    else:
        lengths = _lengths(pruned, requests.workloads[0], len(group))
        if lengths is not None:
            sequences = np.array([requests.shapes[i][0] for i in group], dtype=np.intp)
            return [(group, WorkloadBatch(pruned, lengths, sequences))]
    return [part for i in group for part in _prune(requests, (i,), requests.workloads[i], call, refused)]


def _refusal(call: Callable[[Workload], Workload], dense: Workload) -> str:
    try:
        call(dense)
    except InputError as error:
        return str(error)
    return ""


def _lengths(pruned: Workload, dense: Workload, many: int) -> IndexArray | None:
    """Rows of each of ``many`` requests: a pass begins with its embedding. None where that does not tell them apart."""
    if many == 1:
        return np.array([len(pruned)])
    passes = len({int(p) for p in np.unique(dense.phase)} & {int(Phase.PREFILL), int(Phase.DECODE)})
    begins = np.flatnonzero(pruned.role == role_code("embedding")[0])
    if len(begins) != passes * many or begins[0] != 0:
        return None
    return np.diff(np.append(begins[::passes], len(pruned)))
