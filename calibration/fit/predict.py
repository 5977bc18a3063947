"""Predict records with a profile: :func:`parts_of` splits them by cost model, :func:`predict`
predicts a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from calibration.devices.protocol import INDEX_BYTES, LAYER_LAUNCHES, RECURRENT
from calibration.fit.gemm import weight_copies
from calibration.fit.operators import experts_part, index_sizes
from calibration.fit.recurrent import STATE, recurrent_calls
from calibration.records.screening import LATENT
from calibration.records.timing_table import LAUNCHES, NEEDED, OPERATORS, Records
from simulator.arrays import IndexArray
from simulator.codes import DTYPE_BYTES, DTYPES, ROLES, Kernel
from simulator.hardware.profile import HardwareProfile
from simulator.operators import attention
from simulator.operators.attention import Geometry
from simulator.operators.base import BOTTLENECKS, ELEMENT_BYTES, Estimate, ready
from simulator.operators.collective import collective
from simulator.operators.elementwise import elementwise
from simulator.operators.experts import PARTS, ExpertSizes, experts
from simulator.operators.gemm import Options
from simulator.operators.indexer import indexer
from simulator.uncertainty.factors import (
    COVERAGE_FACTOR,
    ERROR_FACTORS,
    Uncertainty,
    in_order,
)
from simulator.uncertainty.operators import (
    TIMES,
    OperatorTimes,
    gemm_predicted,
    operator_time,
    predicted,
)

UNTIMED = "the time is not positive and finite"


@dataclass(frozen=True)
class Predicted:
    time: OperatorTimes
    uncertainty: Uncertainty | None = None  # None: of the host, or a sum of operators
    sizes: Mapping[str, Any] = field(default_factory=dict)  # for errors by size


def parts_of(
    records: Records, hw: HardwareProfile, skipped: dict[str, int]
) -> Iterator[tuple[str, str, IndexArray]]:
    """Yield operator, number format and rows that the cost models can predict; count the others in
    ``skipped``."""
    timed = records.timed
    if count := int((~timed).sum()):
        skipped[UNTIMED] = count
    # copies are predicted as elementwise operators
    operators = np.where(
        records.is_operator("copy"), OPERATORS.index("elementwise"), records.operator
    )
    labels = records.labels().astype(str)
    for code, label in sorted(
        set(zip(operators[timed].tolist(), labels[timed].tolist(), strict=True))
    ):
        rows, operator = (
            np.flatnonzero(timed & (operators == code) & (labels == label)),
            OPERATORS[code],
        )
        dtype = DTYPES[int(records.dtype[rows[0]])]
        if operator not in SECTIONS:
            reason = f"{operator} is not a single operator of the model"
        elif dtype not in hw.rates:
            reason = f"{hw.name} has no {dtype} arithmetic"
        elif operator == "collective" and (records.launch[rows] == LAUNCHES.index("eager")).all():
            reason = "the time of a collective launched by the host includes the launch"
        elif operator == "collective" and hw.link is None:
            reason = f"{hw.name} has no link to other devices"
        else:
            yield operator, label, rows
            continue
        skipped[reason] = skipped.get(reason, 0) + len(rows)


def predict(r: Records, hw: HardwareProfile) -> Predicted:
    """Return the times of the rows of one part as they were measured: warm or cold, with the same
    rotated weights."""
    options = Options(
        DTYPES[int(r.dtype[0])], DTYPES[int(r.weight_dtype[0])], copies=weight_copies(r)
    )
    operator = OPERATORS[int(r.operator[0])]
    found = _MODELS[operator][1](r, hw, options)
    own = {name: getattr(r, name) for name in NEEDED[operator]}
    return replace(found, sizes=found.sizes or own)


def _summed(parts: Sequence[tuple[Any, OperatorTimes]]) -> OperatorTimes:
    """Return the sums of operators, each with its count: fully correlated errors, the bottleneck of
    the longest."""
    longest = np.argmax([count * t.seconds for count, t in parts], axis=0)
    total = {name: sum(count * getattr(t, name) for count, t in parts) for name in TIMES}
    return OperatorTimes(
        **{**total, "bottleneck": np.choose(longest, [t.bottleneck for _, t in parts])}
    )


def _gemm(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    kernel = Kernel.SPARSE24 if r.is_operator("gemm_2to4")[0] else Kernel.DENSE
    time, errors = gemm_predicted(r.m, r.n, r.k, hw, replace(options, kernel=int(kernel)))
    return Predicted(time, in_order(errors, len(r)))


def _pair(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    shapes = ((r.m, r.rank, r.k), (r.m, r.n, r.rank))
    return Predicted(_summed([(1.0, gemm_predicted(*shape, hw, options)[0]) for shape in shapes]))


def _gathered(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    """Predict a product of some tokens: one kernel, or a dense product between a gather and a
    scatter."""
    options = replace(options, kernel=np.where(r.fused, Kernel.BLOCK_SPARSE, Kernel.DENSE))
    return Predicted(_fused_or_copied(r, (r.rows, r.n, r.k), 1.0, hw, options))


def _grouped(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    """Predict a product of each token with some groups of features: one kernel, or per group a
    gather, a dense product of its tokens and a scatter."""
    outer = r.role == ROLES.index("up")
    kernel = np.where(r.fused, np.where(outer, Kernel.GROUPS_N, Kernel.GROUPS_K), Kernel.DENSE)
    tokens = np.maximum(np.round(r.m * r.density), 1.0)
    n, k = np.where(outer & ~r.fused, r.block, r.n), np.where(~outer & ~r.fused, r.block, r.k)
    groups = np.where(r.fused, 1.0, np.where(outer, r.n, r.k) / np.maximum(r.block, 1))
    time = _fused_or_copied(
        r, (tokens, n, k), groups, hw, replace(options, kernel=kernel, block=r.block)
    )
    shown = {"m": r.m, "n": r.n, "k": r.k, "block": r.block, "density": r.density}
    return Predicted(time, sizes=shown)


def _fused_or_copied(
    r: Records, shape: tuple[Any, Any, Any], count: Any, hw: HardwareProfile, options: Options
) -> OperatorTimes:
    """Return ``count`` products of some tokens, each with a gather and a scatter where it is not a
    single kernel."""
    tokens, n, k = shape
    parts = [(count, gemm_predicted(*shape, hw, options)[0])]
    for role, width in (("gather", k), ("scatter", n)):
        moved = DTYPE_BYTES[r.dtype] * tokens * width
        copy = elementwise(
            moved + INDEX_BYTES * tokens, moved, hw, role=role, dtype=options.dtype, added=True
        )
        parts.append((np.where(r.fused, 0.0, count), operator_time(copy, hw)))
    return _summed(parts)


def _heads(r: Records) -> dict[str, Any]:
    return {
        "batch": r.batch,
        "kv_heads": r.kv_heads,
        "group": r.heads // r.kv_heads,
        "head_dim": r.head_dim,
    }


def _calls(r: Records, q_len: Any, **kind: Any) -> Geometry:
    kind |= {
        "value_dim": r.n if r.is_operator(*LATENT)[0] else 0,
        "window": r.window,
        "density": r.density,
    }
    return Geometry.of(r.batch, q_len, r.kv_len, r.heads, r.kv_heads, r.head_dim, **kind)


def _prefill(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    calls = _calls(r, r.q_len, block=r.block)
    time, uncertainty = predicted(
        attention.prefill(calls, hw, options.dtype, options.weight_dtype), hw
    )
    history = r.kv_len - r.q_len
    return Predicted(time, uncertainty, {"q_len": r.q_len, "history": history, **_heads(r)})


def _decode(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    latent = bool(r.is_operator(*LATENT)[0])

    def call(rows: Records) -> Estimate:
        calls = _calls(rows, 1.0, latent=latent, warm=not rows.cold[0])
        return attention.decode(calls, hw, options.dtype, options.weight_dtype)

    # published tables read one cache repeatedly; measurements of this program rotate caches
    time, uncertainty = _by(r, r.cold, hw, call)
    return Predicted(time, uncertainty, {"kv_len": r.kv_len, **_heads(r)})


def _by(
    r: Records, key: Any, hw: HardwareProfile, call: Callable[[Records], Estimate]
) -> tuple[OperatorTimes, Uncertainty]:
    """Return the times and errors of one kind of operator, by one call per value of a key."""
    groups = [np.flatnonzero(key == value) for value in np.unique(key)]
    found = [predicted(call(r.select(rows)), hw) for rows in groups]
    order = np.argsort(np.concatenate(groups))
    times: dict[str, Any] = {
        name: np.concatenate([getattr(time, name) for time, _ in found])[order] for name in TIMES
    }
    return OperatorTimes(**times), Uncertainty.joined([error for _, error in found], order)


def _collective(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    def call(rows: Records) -> Estimate:
        return collective(rows.n, rows.batch, hw, kind=ROLES[int(rows.role[0])])

    time, uncertainty = _by(r, r.role, hw, call)
    return Predicted(time, uncertainty, {"bytes": r.n, "devices": r.batch, "role": r.role})


def _elementwise(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    # copies have the class of cache writes
    role = np.where(r.is_operator("copy") | (r.role < 0), ROLES.index("cache_write"), r.role)
    time, uncertainty = predicted(
        elementwise(r.read_bytes, r.write_bytes, hw, role=role, dtype=options.dtype), hw
    )
    return Predicted(time, uncertainty, {"bytes": r.read_bytes + r.write_bytes, "role": role})


def _experts(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    def call(rows: Records) -> Estimate:
        sizes = ExpertSizes(rows.m, rows.n, rows.k, rows.experts, rows.active, rows.skew)
        part, warm = PARTS[int(experts_part(rows)[0])], not rows.cold[0]
        return experts(
            sizes, hw, options.dtype, options.weight_dtype, dealt=True, warm=warm, part=part
        )

    time, uncertainty = _by(r, 2 * experts_part(r) + r.cold, hw, call)
    shown = {"m": r.m, "n": r.n, "k": r.k, "experts": r.experts, "active": r.active, "skew": r.skew}
    return Predicted(time, uncertainty, shown)


def _indexer(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    sizes = index_sizes(r, ELEMENT_BYTES[options.dtype])
    time, uncertainty = predicted(indexer(sizes, hw, options.dtype, options.dtype), hw)
    shown = {"batch": r.batch, "q_len": r.q_len, "kv_len": r.kv_len, "heads": r.heads}
    return Predicted(time, uncertainty, shown)


def _recurrent(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    operator = OPERATORS[int(r.operator[0])]
    known = ready(hw, operator, options.dtype, STATE)
    return Predicted(*predicted(known.cost(recurrent_calls(operator, r, known.machine)), hw))


def _layer(r: Records, hw: HardwareProfile, options: Options) -> Predicted:
    """Predict eager layers: the host's launches take the same time for any length of the cache."""
    seconds = np.full(len(r), LAYER_LAUNCHES * hw.section("runtime", "*")["host_op_s"])
    width = math.exp(COVERAGE_FACTOR * ERROR_FACTORS["host"])
    codes = np.full(len(r), BOTTLENECKS.index("host"), dtype=np.int8)
    roofline_s = np.zeros(len(r))
    return Predicted(OperatorTimes(seconds, seconds / width, seconds * width, roofline_s, codes))


# operator of a record -> section of a profile that predicts it, and the function that does
_MODELS: Mapping[str, tuple[str, Callable[[Records, HardwareProfile, Options], Predicted]]] = {
    "gemm": ("gemm", _gemm),
    "gemm_2to4": ("gemm", _gemm),
    "low_rank": ("gemm", _pair),
    "gather_gemm": ("gemm", _gathered),
    "grouped_gemm": ("gemm", _grouped),
    "attention_prefill": ("attention_prefill", _prefill),
    "attention_block_sparse": ("attention_prefill", _prefill),
    "attention_decode": ("attention_decode", _decode),
    "mla_prefill": ("mla_prefill", _prefill),
    "mla_decode": ("mla_decode", _decode),
    "elementwise": ("elementwise", _elementwise),
    "copy": ("elementwise", _elementwise),
    "collective": ("collective", _collective),
    "experts": ("experts", _experts),
    **{name: (name, _recurrent) for name in RECURRENT},
    "layer_eager": ("runtime", _layer),
    "indexer": ("indexer", _indexer),
}
SECTIONS: Mapping[str, str] = MappingProxyType(
    {name: section for name, (section, _) in _MODELS.items()}
)
