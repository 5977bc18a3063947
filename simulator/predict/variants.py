"""Many dense workloads pruned in one call each: the same family at the same sparsity over many batches and lengths.

Use :func:`prune_many`. Most families only look at widths, heads and layers, which requests of one model share, so the rows of many
requests can go through the family's function together; two families look at the prompt's length and take one length at a time. A family
that is not named here is called once a request. That both ways agree is tested for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.kernels.stack import F, Rows, Stack
from simulator.pruning import prune
from simulator.workload import Phase, Workload, role_code

ANY_REQUEST: frozenset[str] = frozenset(
    {
        "depth",
        "width",
        "width_cross",
        "semi_structured",
        "low_rank",
        "unstructured",
        "dynamic_depth",
        "dynamic_width",
        "sparse_attention",
    }
)
"""Families whose function never looks at the prompt's length."""

SAME_LENGTH: frozenset[str] = frozenset({"token", "kv_cache"})
"""Families that take the prompt's length from the workload: one length at a time."""


@dataclass(frozen=True)
class Pruned:
    """Pruned workloads of the requests ``kept`` (their indices), the sparsity each realised, and why others were ``refused``."""

    stack: Stack | None
    kept: Rows
    realised: F
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Requests:
    """Dense workloads of one model, phase and setting over some (batch, seq).

    Attributes
    ----------
    batch, seq : tuple of int
        Of each request.
    workloads : tuple of Workload
    """

    batch: tuple[int, ...]
    seq: tuple[int, ...]
    workloads: tuple[Workload, ...]
    _joined: dict[tuple[int, ...], Workload] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, lower: Callable[[int, int], Workload], shapes: Sequence[tuple[int, int]]) -> Requests:
        """Requests for some (batch, seq), lowered by a function."""
        return cls(tuple(b for b, _ in shapes), tuple(s for _, s in shapes), tuple(lower(b, s) for b, s in shapes))

    def joined(self, group: tuple[int, ...]) -> Workload:
        """The rows of some requests as one workload, made once."""
        if group not in self._joined:
            meta = replace(self.workloads[group[0]].meta, batch=max(self.batch[i] for i in group))
            self._joined[group] = Workload.concat([self.workloads[i] for i in group], meta=meta)
        return self._joined[group]

    def groups(self, family: str) -> Iterator[tuple[int, ...]]:
        """Indices of requests that a family may prune together."""
        every = range(len(self.workloads))
        if family in ANY_REQUEST:
            yield tuple(every)
        elif family in SAME_LENGTH:
            for seq in dict.fromkeys(self.seq):
                group: list[int] = []
                for i in sorted((i for i in every if self.seq[i] == seq), key=lambda i: self.batch[i]):
                    # rows of all tokens must stay apart from those of one a sequence: see token.py
                    if group and self.batch[i] >= self.batch[group[0]] * seq:
                        yield tuple(group)
                        group = []
                    group.append(i)
                yield tuple(group)
        else:
            yield from ((i,) for i in every)


def prune_many(
    requests: Requests, family: str, sparsity: float, *, ideal: bool = False, options: Mapping[str, Any] | None = None
) -> Pruned:
    """Every request pruned by a family at a sparsity, in as few calls as the family allows.

    Parameters
    ----------
    requests : Requests
    family : str
    sparsity : float, [0, 1)
    ideal : bool
    options : mapping, optional

    Returns
    -------
    Pruned
        In the order of the requests.
    """
    stacks: list[tuple[tuple[int, ...], Stack, float]] = []
    refused: dict[str, None] = {}
    for group in requests.groups(family):
        for part in _pruned(requests, group, family, sparsity, ideal, dict(options or {}), refused):
            stacks.append(part)
    if not stacks:
        return Pruned(None, np.zeros(0, dtype=np.intp), np.zeros(0), tuple(refused))
    kept = np.array([i for group, _, _ in stacks for i in group], dtype=np.intp)
    realised = np.array([r for group, _, r in stacks for _ in group])
    stack = Stack.join([s for _, s, _ in stacks])
    order = np.argsort(kept, kind="stable")
    if (order[1:] < order[:-1]).any():
        stack = reordered(stack, order)
    return Pruned(stack, kept[order], realised[order], tuple(refused))


def _pruned(
    requests: Requests,
    group: tuple[int, ...],
    family: str,
    sparsity: float,
    ideal: bool,
    options: dict[str, Any],
    refused: dict[str, None],
) -> Iterator[tuple[tuple[int, ...], Stack, float]]:
    """One group in one call where that works, else one call a request."""
    chosen = [requests.workloads[i] for i in group]
    if len(group) > 1:
        try:
            pruned = prune(requests.joined(group), family, sparsity, ideal=ideal, **options)
        except InputError as error:
            refused[str(error)] = None
            try:
                prune(chosen[0], family, sparsity, ideal=ideal, **options)
            except InputError as alone:
                if str(alone) == str(error):  # it is the sparsity, not the request
                    return
        else:
            lengths = lengths_of(pruned, chosen)
            if lengths is not None:
                sequences = np.array([requests.batch[i] for i in group], dtype=np.intp)
                yield group, Stack(pruned, lengths, sequences), pruned.meta.applied[-1].realised
                return
    for i, dense in zip(group, chosen):
        try:
            pruned = prune(dense, family, sparsity, ideal=ideal, **options)
        except InputError as error:
            refused[str(error)] = None
        else:
            yield (i,), Stack.of([pruned]), pruned.meta.applied[-1].realised


def lengths_of(pruned: Workload, dense: Sequence[Workload]) -> NDArray[np.intp] | None:
    """Rows of each request in a workload of several: a pass begins with its embedding. None where that does not tell them apart."""
    passes = len({int(p) for p in np.unique(dense[0].phase)} & {int(Phase.PREFILL), int(Phase.DECODE)})
    begins = np.flatnonzero(pruned.role == role_code("embedding")[0])
    if len(begins) != passes * len(dense) or begins[0] != 0:
        return None
    return np.diff(np.append(begins[::passes], len(pruned)))


def reordered(stack: Stack, order: NDArray[Any]) -> Stack:
    """The workloads of a stack in another order."""
    lengths = stack.lengths[order]
    rows = np.repeat(stack.starts[order] - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
    return Stack(stack.rows.take(rows), lengths, None if stack.sequences is None else stack.sequences[order])
