"""Check a method: M, N and K of each operator before and after, removed and added work, kernels and
their evidence, and warnings: :func:`check_method`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from simulator.arrays import BoolArray, FloatArray
from simulator.capacity import memory
from simulator.codes import DTYPE_BYTES, DTYPES, ROLES, Kernel, Kind
from simulator.errors import InputError
from simulator.files.yaml import Problems
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.operators import BY_CODE
from simulator.passes import section_of
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import request_results
from simulator.prediction.prunings import Pruning
from simulator.prediction.requests import on, requests_of
from simulator.prediction.result import Result
from simulator.pruning._family import SUFFIXES
from simulator.pruning._methods import Method, load_method
from simulator.pruning.described.changes import PRODUCTS
from simulator.pruning.described.description import Description
from simulator.uncertainty.forward import forward_passes
from simulator.units import percent, seconds
from simulator.workload import Workload

SPARSITY = 0.5  # sparsity of a method whose paper has none
FAST_BYTES = 16  # rows of other multiples use slower kernels
PHASES = ("prefill", "decode")  # phases of one pass

_OPERATOR = {role: operator for operator, roles in PRODUCTS.items() for role in roles}
_NAMES: Mapping[int, str] = {
    Kernel.SPARSE24: "2:4",
    Kernel.UNSTRUCTURED: "scattered zeros",
    Kernel.BLOCK_SPARSE: "block-sparse",
    Kernel.GROUPS_N: "grouped (N)",
    Kernel.GROUPS_K: "grouped (K)",
    Kernel.SPMV: "SpMV",
}
_ASSUMED: Mapping[int, str] = {
    Kernel.SPARSE24: "rate of the architecture relative to dense",
    Kernel.UNSTRUCTURED: "computes the zeros, timed as dense",
    Kernel.BLOCK_SPARSE: "assumed: about in proportion to what stays",
    Kernel.GROUPS_N: "assumed from one GPU (RTX 5090) relative to dense",
    Kernel.GROUPS_K: "assumed from one GPU (RTX 5090) relative to dense",
}
# operators and axes that have the same heads or channels
_SAME = (
    (("gate_up", "n"), ("down", "k")),
    (("qkv", "n"), ("attention", "heads")),
    (("attention", "heads"), ("o", "k")),
)

Pair = tuple[float, float]  # dense, pruned


@dataclass(frozen=True)
class OperatorCheck:
    """One operator in the layers that a method changes, dense and pruned."""

    operator: str  # an operator of a method file, "added ROLE", or "other kernels"
    layers: int  # changed layers; 0 outside the layers
    # means over these layers: tokens, output and input features of products; tokens, keys per query
    # and features of all heads of attention; 0: no product
    m: Pair
    n: Pair
    k: Pair
    flops: float  # pruned less dense, of the pass
    bytes: float
    seconds: float  # with the gaps between kernels
    kernels: Mapping[str, str]  # kernel -> how its time is known

    @property
    def added(self) -> bool:
        return self.operator.startswith("added ")


@dataclass(frozen=True)
class PhaseCheck:
    """A method in one phase: the prediction, and the operators that change."""

    result: Result
    operators: tuple[OperatorCheck, ...]
    unchanged: tuple[str, ...]
    cache_bytes: Pair  # on a device


@dataclass(frozen=True)
class MethodCheck:
    method: str
    sparsity: float | None
    layers: int
    phases: tuple[PhaseCheck, ...]
    warnings: tuple[str, ...]


def problems_of(file: str) -> list[str]:
    """Return all problems of a method file, one line each."""
    problems = Problems(file)
    if file.endswith(SUFFIXES):
        with contextlib.suppress(InputError):
            Description.read(file, problems)
    return problems.lines


def check_method(
    name: str | Method,
    model: str | Model = "llama-3.1-8b",
    hardware: str | HardwareProfile = "h100",
    sparsity: float | None = None,
    **settings: Any,
) -> MethodCheck:
    """Check a method, by name, file or object, in the phases of one pass; the settings are those of
    :func:`simulator.table`. Without a sparsity, it is the first of the method's paper, or
    :data:`SPARSITY`."""
    method, config, hw = load_method(name), load_model(model), load_hardware(hardware)
    if method.takes_sparsity and sparsity is None:
        sparsity = method.sparsities[0] if method.sparsities else SPARSITY
    pruning = Pruning.of(method if isinstance(name, Method) else name, sparsity)
    settings = {"phase": [one for one in PHASES if one in method.phases], **settings}
    phases, warnings, pairs = [], [], []
    for request in requests_of([config], settings):
        if request.phase not in PHASES:
            raise InputError(f"phase: expected {' or '.join(PHASES)}, got {request.phase}")
        (one,) = on([request], hw)
        dense = lower(one)
        pruned = pruning.apply(dense, one)
        result = request_results([one], [pruning], [hw])[0]
        phases.append(_phase(result, dense, pruned, hw))
        warnings += [*_work_warnings(phases[-1]), *_misaligned(dense, pruned)]
        pairs.append(dense)
    warnings += [*_unmatched(method), *_idle(method, sparsity, pairs)]
    every = tuple(dict.fromkeys(warnings))
    return MethodCheck(method.name, sparsity, len(config.layers), tuple(phases), every)


def _work_warnings(phase: PhaseCheck) -> Iterator[str]:
    name = phase.result.phase
    if not phase.operators:
        yield f"{name}: nothing changes"
    added = sum(one.seconds for one in phase.operators if one.added)
    saved = -sum(one.seconds for one in phase.operators if not one.added)
    if added > max(saved, 0.0):
        less = f"saves {seconds(saved)}" if saved > 0 else "saves nothing"
        yield f"{name}: the added work takes {seconds(added)} and {less}"


def _misaligned(dense: Workload, pruned: Workload) -> Iterator[str]:
    w = pruned.take((pruned.kind == Kind.GEMM) & ~pruned.overhead)
    multiple = np.round(FAST_BYTES / DTYPE_BYTES[w.dtype]).astype(np.int64)
    for axis in ("n", "k"):
        sizes = getattr(w, axis)
        for i in np.flatnonzero((sizes % multiple > 0) & ~np.isin(sizes, getattr(dense, axis))):
            yield (
                f"{ROLES[w.role[i]]} {axis} {sizes[i]:,}: not a multiple of {multiple[i]}, so its"
                f" kernel is slower; align: {multiple[i]} rounds up"
            )


def _unmatched(method: Method) -> Iterator[str]:
    """Yield products whose N has another share than the K that reads it, or the reverse."""
    stays = {(one.operator, one.axis): str(one.stays) for one in method.description.dynamic}
    for pair in _SAME:
        first, second = (stays.get(one, "1") for one in pair)
        if first != second:
            names = [f"{operator} {axis}" for operator, axis in pair]
            yield (
                f"{names[0]} keeps {first} but {names[1]} {second}: they have the same"
                f" {'heads' if 'attention' in str(pair) else 'channels'}, so one cut allows both"
            )


def _idle(method: Method, s: float | None, dense: Sequence[Workload]) -> Iterator[str]:
    """Yield parts that alone change nothing, and gathers without a selection."""
    about = method.description
    empty: Any = {"prune": (), "dynamic": (), "adds": ()}
    parts: list[tuple[str, Any]] = [(one.family, {"prune": (one,)}) for one in about.prune]
    parts += [(one.operator, {"dynamic": (one,)}) for one in about.dynamic]
    for name, part in parts:
        alone = replace(method, description=replace(about, **{**empty, **part}))
        own = s if alone.takes_sparsity else None
        if all(_totals(w) == _totals(alone.prune(w, own)) for w in dense):
            yield f"{name}: removes nothing"
    selects = any(one.role in ("router", "select", "sort") for one in about.adds)
    gathers = [one.operator for one in about.dynamic if one.kernel in ("gather", "looped")]
    if gathers and not selects:
        names = ", ".join(gathers)
        yield f"{names}: gathers without an added router or selection, so the choice is free"


def _totals(w: Workload) -> list[float]:
    columns = (w.flops, w.bytes, w.count, w.kv_len * w.count)
    return [float(f"{column.sum():.12g}") for column in columns]


def _phase(result: Result, dense: Workload, pruned: Workload, hw: HardwareProfile) -> PhaseCheck:
    rows = _Rows.of(dense, pruned, hw)
    changed = {key: rows.operator(key) for key in dict.fromkeys(rows.key)}
    before, after = (memory(w, hw).cache_bytes for w in (dense, pruned))
    return PhaseCheck(
        result,
        tuple(one for one in changed.values() if one is not None),
        tuple(key[0] for key, one in changed.items() if one is None),
        (before, after),
    )


# operator, and of an added product the part of the decoder, N and K
Key = tuple[str, int, int, int]


@dataclass(frozen=True)
class _Rows:
    """Rows of a dense and a pruned workload, one per layer."""

    w: Workload
    is_pruned: BoolArray
    work: FloatArray  # FLOPs, bytes, executions and seconds (4, rows)
    hw: HardwareProfile  # as the engine uses it

    @classmethod
    def of(cls, dense: Workload, pruned: Workload, hw: HardwareProfile) -> _Rows:
        batch = batch_with(dense.expand(), [pruned.expand()])
        p, w, groups = forward_passes(batch, hw), batch.rows, batch.groups
        count = groups.count.ravel()[groups.cell]
        gap = p.group_gap_s.ravel()[groups.cell] * w.count / np.maximum(count, 1e-300)
        work = np.array([w.flops, w.bytes, w.count, p.row_s + gap])
        return cls(w, batch.owner > 0, work, p.hw)

    @cached_property
    def key(self) -> list[Key]:
        w = self.w
        return [_key(w, i) for i in range(len(w))]

    @cached_property
    def shape(self) -> FloatArray:
        """M, N and K of each row (3, rows)."""
        w = self.w
        zeros = np.isin(w.kernel, [Kernel.SPARSE24, Kernel.UNSTRUCTURED, Kernel.SPMV])
        density = np.where(zeros, 1.0, w.density)
        # attention skips blocks of keys, or else queries of a prompt and heads of a step
        keys = np.where(w.block > 0, density, 1.0)
        m = np.where((w.kind == Kind.PREFILL_ATTENTION) & (w.block == 0), density, 1.0)
        queries = np.maximum(w.q_len, 1)
        attention = [
            w.batch * queries * m,
            w.pairs / queries * keys,
            w.heads * w.head_dim * density / (keys * m),
        ]
        experts = np.where(w.kind == Kind.EXPERTS, w.active, 1.0)
        products = [w.m * density * experts, w.n, w.k]
        shape = np.where(w.is_attention, attention, products)
        return shape * (w.is_attention | np.isin(w.kind, [Kind.GEMM, Kind.EXPERTS]))

    def operator(self, key: Key) -> OperatorCheck | None:
        """Return an operator in the layers that change; None if none does."""
        rows = np.array([one == key for one in self.key])
        place, layers = self.w.layer + 1, int(self.w.layer.max()) + 2
        cell = place + layers * self.is_pruned
        sums = [np.bincount(cell[rows], one[rows], 2 * layers) for one in self.work[:3]]
        before, after = np.reshape(sums, (3, 2, layers)).transpose(1, 0, 2)
        changed = (np.abs(after - before) > 1e-9 * before).any(axis=0)
        if not changed.any():
            return None
        rows &= changed[place]
        old, new = rows & ~self.is_pruned, rows & self.is_pruned
        runs = self.work[2][new].sum() / len(set(self.w.role[new].tolist()) or [0])
        many = float(changed.sum() if old.any() else runs)
        shapes = [self._mean(one, many) for one in (old, new)]
        if not new.any():  # removed layers
            shapes[1] = (0.0, *shapes[0][1:])
        flops, moved, _, time = self.work[:, new].sum(axis=1) - self.work[:, old].sum(axis=1)
        m, n, k = zip(*shapes)
        kernels = dict(_kernel(self.w, i, self.hw) for i in np.flatnonzero(new).tolist())
        work = (float(flops), float(moved), float(time))
        return OperatorCheck(key[0], int(changed[1:].sum()), m, n, k, *work, kernels)

    def _mean(self, rows: BoolArray, many: float) -> tuple[float, float, float]:
        """Return means of M, N and K of some rows; N is the sum over products side by side."""
        (m, n, k), role = self.shape[:, rows], self.w.role[rows]
        tokens = m * self.work[2][rows]
        by_role, wide = np.bincount(role, tokens), np.bincount(role, tokens * n)
        if not wide.any():
            return 0.0, 0.0, 0.0
        each_n = wide / np.maximum(by_role, 1e-300)
        mean_m = float(wide.sum() / each_n.sum() / many)
        return mean_m, float(each_n.sum()), float((tokens * n * k).sum() / wide.sum())


def _key(w: Workload, i: int) -> Key:
    role = ROLES[w.role[i]]
    if w.overhead[i]:
        product = (w.part[i], w.n[i], w.k[i]) if w.kind[i] == Kind.GEMM else (0, 0, 0)
        part, n, k = map(int, product)
        return f"added {role}", part, n, k
    name = "attention" if w.is_attention[i] else _OPERATOR.get(role, "other kernels")
    first = w.stage[i] == 1 and not w.is_attention[i]
    return f"{name} (first factor)" if first else name, 0, 0, 0


def _kernel(w: Workload, i: int, hw: HardwareProfile) -> tuple[str, str]:
    """Return the kernel of a row, and how its time is known."""
    operator, kernel = BY_CODE[int(w.kind[i])], int(w.kernel[i])
    name = (operator.titles or (operator.name,))[0].removesuffix(" operators")
    name = f"{_NAMES[kernel]} {name}" if kernel else name
    if w.kind[i] == Kind.ELEMENTWISE and w.k[i] > 0:
        return f"{name} of a known time", "the time in the file, without error"
    formats = DTYPES[w.dtype[i]], DTYPES[w.weight_dtype[i]]
    section = hw.section(section_of(w, i), operator.label(*formats))
    about, error = section.provenance, section.accuracy.get("mape")
    known = "not fitted on this device: defaults"
    if section.status != "default" and about is not None:
        known = f"fitted to {about.rows:,} rows of {section.stack or 'this machine'}"
        known += "" if error is None else f", error {percent(error)}"
    added = w.overhead[i] and w.kind[i] == Kind.ELEMENTWISE
    differ = "; implementations of added kernels differ, so its interval is wide" if added else ""
    assumed = f"{_ASSUMED[kernel]}; dense: " if kernel in _ASSUMED else ""
    return name if not added else f"added {name}", f"{assumed}{known}{differ}"
