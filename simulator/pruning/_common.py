"""What all pruning families share: the description of a family, the sparsity of every row, and the arithmetic of shrinking rows.

A family is one file of this package with a constant ``FAMILY``; nothing else lists it. Its function takes a workload and a
:class:`Choice` (the sparsity of every row, already checked) and returns the pruned workload and the sparsity it realised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.columns import Array
from simulator.errors import InputError
from simulator.workload import DTYPE_BYTES, Kernel, Kind, Part, Phase, Workload, dtype_code, role_code

F = NDArray[np.float64]

_GEMM = int(Kind.GEMM)

QKV: tuple[str, ...] = ("q", "k", "v", "qkv")
INPUTS: tuple[str, ...] = (*QKV, "gate", "up", "gate_up")
"""Projections that read the hidden state."""
OUTPUTS: tuple[str, ...] = ("o", "down")
"""Projections that write the hidden state."""
PROJECTIONS: tuple[str, ...] = (*QKV, "o", "gate", "up", "gate_up", "down")
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"attention": (*QKV, "o"), "mlp": ("gate", "up", "gate_up", "down"), "qkv": QKV}
)
"""Names that stand for several projections in a per-projection sparsity."""

SUBLAYERS: tuple[str, ...] = ("attention", "mlp")

SCORE_BYTES = 4.0
"""A score or an index of a selection: fp32 or int32."""


@dataclass(frozen=True)
class Choice:
    """The sparsity asked for, resolved to rows.

    Attributes
    ----------
    rows : float64 array, [0, 1)
        Of every row of the workload; 0 outside the layers and where a projection is not named.
    asked : float
        The scalar asked for, or the mean of a choice: over layers, or over the parameters of the projections.
    form : {"scalar", "projection", "layer"}
        How it was given.
    """

    rows: F
    asked: float
    form: str = "scalar"


Function = Callable[..., tuple[Workload, float]]


@dataclass(frozen=True)
class Family:
    """A way to prune a decoder.

    Attributes
    ----------
    name, axis, summary, cost : str
        Name; logical GEMM dimension it changes; what it does; what it costs beside what it saves.
    dynamic : bool
        Decided per token at inference.
    function : callable
        ``(workload, choice, *, ideal, **options) -> (workload, realised sparsity)``.
    order : int
        Place in tables.
    realised : str
        Definition of its realised sparsity.
    options : mapping
        Options and their defaults.
    support : tuple of str
        Phases in which it can save time. In others it may still cost (a selection) and is allowed.
    targets : tuple of str
        Names a per-projection sparsity may use.
    per_layer : bool
        Whether a per-layer sparsity means something.
    """

    name: str
    axis: str
    dynamic: bool
    summary: str
    cost: str
    function: Function = field(repr=False)
    order: int
    realised: str
    options: Mapping[str, Any] = field(default_factory=dict)
    support: tuple[str, ...] = ("prefill", "decode", "generate")
    targets: tuple[str, ...] = ()
    per_layer: bool = True


# -- options ---------------------------------------------------------------------------------------------------------------------


def whole(name: str, value: Any, low: int = 1) -> int:
    """An option that is a whole number from ``low`` up."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise InputError(f"option {name}: expected a whole number from {low} up, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """An option that is true or false."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"option {name}: expected true or false, got {value!r}")
    return bool(value)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """An option that is one of a few values."""
    if isinstance(value, bool) or value not in choices:
        raise InputError(f"option {name}: expected {' or '.join(map(str, choices))}, got {value!r}")
    return value


# -- finding rows ----------------------------------------------------------------------------------------------------------------


def layer_count(w: Workload) -> int:
    """Layers the rows are numbered by (fewer than the model's once depth pruning has removed some)."""
    return int((w.layer + w.layers).max(initial=0))


def has_role(w: Workload, *names: str) -> Array:
    """Mask of the rows with one of these roles; a table look-up, as pruning asks often."""
    return w.is_role(*names)


def projections(w: Workload, *names: str) -> Array:
    """Mask of projections inside the layers, all seven unless some are named."""
    mask: Array = w.is_role(*(names or PROJECTIONS)) & (w.layer >= 0)
    return mask


def part_rows(w: Workload, part: Part) -> Array:
    """Mask of a part's rows inside the layers."""
    mask: Array = (w.part == part) & (w.layer >= 0)
    return mask


def attention_rows(w: Workload) -> Array:
    """Mask of prefill and decode attention."""
    return w.is_attention


def covering(w: Workload, mask: Array, values: Array) -> Array:
    """Of every row: the value of the masked row that covers its (first) layer; 0 where there is none."""
    at = np.flatnonzero(mask)
    if not len(at):
        return np.zeros(len(w), dtype=values.dtype)
    at = at[np.argsort(w.layer[at], kind="stable")]
    place = np.searchsorted(w.layer[at], w.layer, side="right") - 1
    return np.where((place >= 0) & (w.layer >= 0), values[at[np.maximum(place, 0)]], 0)


def parameters_of(w: Workload, mask: Array | None = None) -> float:
    """Parameters of the projections' weights (those masked), biases left out."""
    chosen = projections(w) if mask is None else mask & projections(w)
    return float(((w.params - np.where(has_bias(w), w.n, 0)) * w.count)[chosen].sum())


def removed(before: float, after: float) -> float:
    """Fraction removed; 0 of nothing."""
    return max(0.0, 1.0 - after / before) if before > 0 else 0.0


def owns_parameters(w: Workload) -> Array:
    """Mask of rows whose phase carries the parameters: all, but the decodes of a generate."""
    mask: Array = (w.phase == Phase.PREFILL) | ~(w.phase == Phase.PREFILL).any()
    return mask


def sublayer_ends(w: Workload) -> Array:
    """One row a sublayer, run of layers and phase: its last projection. Templates for rows that pruning adds."""
    mask: Array = projections(w, *OUTPUTS) & (w.stage != 1)
    return mask


def sublayer_starts(w: Workload, ends: Array) -> Array:
    """First row of the sublayer that ends at each of ``ends``."""
    change = np.zeros(len(w), dtype=bool)
    change[1:] = (w.part[1:] != w.part[:-1]) | (w.phase[1:] != w.phase[:-1])
    begin: F = np.maximum.accumulate(np.where(change, np.arange(len(w)), 0))[ends].astype(np.float64)
    return begin


# -- shrinking rows --------------------------------------------------------------------------------------------------------------


def whole_share(share: Array | float, of: Array | float) -> Array:
    """``share`` of ``of``, rounded to the nearest whole (halves up)."""
    rounded: Array = np.floor(np.asarray(share) * np.asarray(of) + 0.5).astype(np.int64)
    return rounded


def aligned(width: Array, keep: Array, align: int) -> Array:
    """``keep`` of ``width`` rounded up to a multiple of ``align``, and no more than ``width``.

    >>> aligned(np.array([11008, 100]), np.array([0.8, 0.99]), 16).tolist()
    [8816, 100]
    """
    wanted = np.ceil(keep * width / align - 1e-9).astype(np.int64) * align
    return np.minimum(np.maximum(wanted, align), width)


def has_bias(w: Workload) -> Array:
    """Mask of GEMM rows that own a bias (N parameters) besides their weight."""
    weight: Array = w.n.astype(np.float64) * w.k
    if np.count_nonzero(w.kernel):
        weight = np.where((w.kernel == Kernel.SPARSE24) | (w.kernel == Kernel.UNSTRUCTURED), w.density, 1.0) * weight
    mask: Array = (w.kind == _GEMM) & (w.params > 0) & (np.abs(w.params - weight - w.n) < 0.5)
    return mask


def resized(w: Workload, n: Array, k: Array, **columns: Any) -> Workload:
    """GEMMs with other N and K; the parameters follow, with the bias (N of them) where a row has one."""
    bias = np.where(has_bias(w), w.n, 0.0)
    before = np.maximum(w.n.astype(np.float64) * w.k, 1.0)
    params = (w.params - bias) * (n.astype(np.float64) * k / before) + np.where(bias > 0, n, 0.0)
    return w.replace(n=n, k=k, params=np.where(w.kind == _GEMM, params, w.params), **columns)


def split_at(w: Workload, layer: int) -> Workload:
    """Rows that stand for layers on both sides of the start of one as two rows, the counts shared out; :func:`merge_runs` undoes it."""
    across = (w.layer >= 0) & (w.layer < layer) & (w.layer + w.layers > layer)
    if not across.any():
        return w
    index = np.repeat(np.arange(len(w)), np.where(across, 2, 1))
    second = np.r_[False, index[1:] == index[:-1]]
    out, two = w.take(index), across[index]
    before = layer - out.layer
    layers = np.where(two, np.where(second, out.layers - before, before), out.layers)
    return out.replace(
        layer=np.where(two & second, layer, out.layer),
        layers=layers,
        count=out.count * np.where(two, layers / np.maximum(out.layers, 1), 1.0),
    )


def merge_runs(w: Workload) -> Workload:
    """Neighbouring rows that are equal and stand for consecutive layers merged: undoes :meth:`Workload.expand` run by run."""
    if len(w) < 2:
        return w
    new = np.ones(len(w), dtype=bool)
    new[1:] = (w.layer[1:] != w.layer[:-1] + w.layers[:-1]) | (w.layers[1:] == 0)
    for name in Workload.SCHEMA:
        if name not in ("count", "layer", "layers"):
            column = getattr(w, name)
            new[1:] |= column[1:] != column[:-1]
    start = np.flatnonzero(new)
    if len(start) == len(w):
        return w
    return w.take(start).replace(count=np.add.reduceat(w.count, start), layers=np.add.reduceat(w.layers, start))


def stream_dtype(w: Workload, at: Array) -> Array:
    """Codes of the residual stream's format at some rows: the rows' own, or bf16 where they compute in 8 bits or fewer."""
    own = w.dtype[at]
    return np.where(DTYPE_BYTES[own] < 2.0, dtype_code("bf16"), own)


def overheads(w: Workload, at: Array, role: str, kind: Kind = Kind.ELEMENTWISE, **columns: Any) -> Workload:
    """Rows that pruning adds, one for each row index in ``at``, whose layer, part, phase and count they take, in the stream's format."""
    base = {name: getattr(w, name)[at] for name in ("part", "phase", "layer", "layers", "count")}
    stream = stream_dtype(w, at)
    code = np.full(len(at), role_code(role)[0])
    columns = {**base, "dtype": stream, "weight_dtype": stream, **columns}
    return Workload.from_columns(w.meta, size=len(at), kind=kind, role=code, overhead=True, **columns)


def insert(w: Workload, parts: list[tuple[Array, Workload]]) -> Workload:
    """Rows of ``parts`` put before the rows of ``w`` whose (possibly fractional) positions they name; equal positions keep their order."""
    parts = [(at, rows) for at, rows in parts if len(rows)]
    if not parts:
        return w
    place = np.concatenate([np.arange(len(w), dtype=np.float64), *[at for at, _ in parts]])
    order = np.argsort(place, kind="stable")
    return Workload.concat([w, *[rows for _, rows in parts]]).take(order)
