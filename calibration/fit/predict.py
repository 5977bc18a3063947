"""Predict records with a profile: :func:`parts_of` splits records by cost model, :func:`predict` returns the times of a
part with their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.devices.protocol import INDEX_BYTES, LAYER_LAUNCHES
from calibration.fit.experts import experts_part
from calibration.fit.gemm import weight_copies
from calibration.records.screening import LATENT
from calibration.records.timing_table import LAUNCHES, OPERATORS, Records
from simulator.arrays import IndexArray
from simulator.codes import DTYPE_BYTES, DTYPES, ROLES, Kernel
from simulator.hardware.profile import HardwareProfile
from simulator.operators import attention
from simulator.operators.attention import Geometry
from simulator.operators.base import Estimate, bottleneck
from simulator.operators.collective import collective
from simulator.operators.elementwise import elementwise
from simulator.operators.experts import PARTS, ExpertSizes, experts
from simulator.operators.gemm import Options
from simulator.uncertainty.factors import (
    COVERAGE_FACTOR,
    ERROR_FACTORS,
    HOST_KIND,
    Uncertainty,
    in_order,
    level_scale,
    posterior_of,
)
from simulator.uncertainty.forward import host_launch
from simulator.uncertainty.operators import OperatorTimes, gemm_predicted, operator_time, predicted

UNTIMED = "the time is not positive and finite"

# Errors of an eager layer's time, log units. Independent; common to all rows, because the layer of a model differs
# from the measured one and a pass has more than its layers; common to rows measured without the GPU, whose driver may
# take as long as the framework. The last two are assumed.
LAYER_OWN, LAYER_COMMON, LAYER_WITHOUT_GPU = 0.03, 0.10, 0.50


@dataclass(frozen=True)
class RowFormats:
    """Number formats of rows, and the level of their intervals."""

    dtype: str
    weight: str  # of weights; for attention, of the cache
    level: float


@dataclass(frozen=True)
class Predicted:
    """Times of the rows of an operator with their errors."""

    time: OperatorTimes
    sizes: Mapping[str, Any]  # for errors by size
    uncertainty: Uncertainty | None = None  # None: the time is a sum of operators


def parts_of(records: Records, hw: HardwareProfile, skipped: dict[str, int]) -> Iterator[tuple[str, str, IndexArray]]:
    """Yield operator, number format and rows that the cost models can predict; count the others in ``skipped``."""
    timed = records.timed
    if count := int((~timed).sum()):
        skipped[UNTIMED] = count
    # copies belong to the elementwise operators
    operators = np.where(records.is_operator("copy"), OPERATORS.index("elementwise"), records.operator)
    labels = records.labels().astype(str)
    for code, label in sorted(set(zip(operators[timed].tolist(), labels[timed].tolist(), strict=True))):
        rows, operator = np.flatnonzero(timed & (operators == code) & (labels == label)), OPERATORS[code]
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


def predict(r: Records, hw: HardwareProfile, level: float = 0.9) -> Predicted:
    """Return the times of the rows of one part as they were measured: warm or cold, with the same rotated weights."""
    formats = RowFormats(DTYPES[int(r.dtype[0])], DTYPES[int(r.weight_dtype[0])], level)
    return _MODELS[OPERATORS[int(r.operator[0])]][1](r, hw, formats)


def _each(array: Callable[[str], Any]) -> OperatorTimes:
    return OperatorTimes(*map(array, ("seconds", "lower", "upper", "roofline_s", "bottleneck")))


def _summed(times: Sequence[OperatorTimes]) -> OperatorTimes:
    """Return the sums of operators in sequence, with fully correlated errors and the bottleneck of the longest."""
    longest = np.argmax([t.seconds for t in times], axis=0)
    bottleneck = np.choose(longest, [t.bottleneck for t in times])
    return _each(lambda name: bottleneck if name == "bottleneck" else sum(getattr(t, name) for t in times))


def _scaled(time: OperatorTimes, factor: Any) -> OperatorTimes:
    return _each(lambda name: time.bottleneck if name == "bottleneck" else factor * getattr(time, name))


def _gemm(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    kernel = Kernel.SPARSE24 if r.is_operator("gemm_2to4")[0] else Kernel.DENSE
    options = Options(formats.dtype, formats.weight, int(kernel), copies=weight_copies(r))
    time, errors = gemm_predicted(r.m, r.n, r.k, hw, options, formats.level)
    return Predicted(time, {"m": r.m, "n": r.n, "k": r.k}, in_order(errors, len(r)))


def _pair(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    options = Options(formats.dtype, formats.weight, copies=weight_copies(r))
    shapes = ((r.m, r.rank, r.k), (r.m, r.n, r.rank))
    time = _summed([gemm_predicted(*shape, hw, options, formats.level)[0] for shape in shapes])
    return Predicted(time, {"m": r.m, "n": r.n, "k": r.k, "rank": r.rank})


def _gathered(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    """Predict a product of some tokens: one kernel, or a dense product between a gather and a scatter."""
    kernel = np.where(r.fused, Kernel.BLOCK_SPARSE, Kernel.DENSE)
    options = Options(formats.dtype, formats.weight, kernel, copies=weight_copies(r))
    product = gemm_predicted(r.rows, r.n, r.k, hw, options, formats.level)[0]
    time = _copied(product, r, r.rows, r.n, r.k, hw, formats)
    return Predicted(time, {"m": r.m, "n": r.n, "k": r.k, "rows": r.rows})


def _grouped(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    """Predict a product of each token with some groups of features: one kernel, or per group a gather, a dense product
    of its tokens and a scatter."""
    outer = r.role == ROLES.index("up")
    kernel = np.where(r.fused, np.where(outer, Kernel.GROUPS_N, Kernel.GROUPS_K), Kernel.DENSE)
    tokens = np.maximum(np.round(r.m * r.density), 1.0)
    n, k = np.where(outer & ~r.fused, r.block, r.n), np.where(~outer & ~r.fused, r.block, r.k)
    options = Options(formats.dtype, formats.weight, kernel, copies=weight_copies(r), block=r.block)
    product = gemm_predicted(tokens, n, k, hw, options, formats.level)[0]
    groups = np.where(r.fused, 1.0, np.where(outer, r.n, r.k) / np.maximum(r.block, 1))
    time = _scaled(_copied(product, r, tokens, n, k, hw, formats), groups)
    return Predicted(time, {"m": r.m, "n": r.n, "k": r.k, "block": r.block, "density": r.density})


def _copied(
    product: OperatorTimes, r: Records, tokens: Any, n: Any, k: Any, hw: HardwareProfile, formats: RowFormats
) -> OperatorTimes:
    """Return a product of some tokens, plus gather and scatter where the rows are not a single kernel."""
    times: list[OperatorTimes] = [product]
    for role, width in (("gather", k), ("scatter", n)):
        moved = DTYPE_BYTES[r.dtype] * tokens * width
        copy = elementwise(moved + INDEX_BYTES * tokens, moved, hw, role=role, dtype=formats.dtype, added=True)
        times.append(_scaled(operator_time(copy, hw, formats.level), np.where(r.fused, 0.0, 1.0)))
    return _summed(times)


def _heads(r: Records) -> dict[str, Any]:
    return {"batch": r.batch, "kv_heads": r.kv_heads, "group": r.heads // r.kv_heads, "head_dim": r.head_dim}


def _calls(r: Records, q_len: Any, **options: Any) -> Geometry:
    options |= {"value_dim": r.n if r.is_operator(*LATENT)[0] else 0, "window": r.window, "density": r.density}
    return Geometry.of(r.batch, q_len, r.kv_len, r.heads, r.kv_heads, r.head_dim, **options)


def _prefill(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    calls = _calls(r, r.q_len, block=r.block)
    time, uncertainty = predicted(attention.prefill(calls, hw, formats.dtype, formats.weight), hw, formats.level)
    return Predicted(time, {"q_len": r.q_len, "history": r.kv_len - r.q_len, **_heads(r)}, uncertainty)


def _decode(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    latent = bool(r.is_operator(*LATENT)[0])

    def call(rows: Records) -> Estimate:
        calls = _calls(rows, 1.0, latent=latent, warm=not rows.cold[0])
        return attention.decode(calls, hw, formats.dtype, formats.weight)

    # the published tables read one cache repeatedly, measurements of this program do not
    time, uncertainty = _by(r, r.cold, hw, formats.level, call)
    return Predicted(time, {"kv_len": r.kv_len, **_heads(r)}, uncertainty)


def _by(
    r: Records, key: Any, hw: HardwareProfile, level: float, call: Callable[[Records], Estimate]
) -> tuple[OperatorTimes, Uncertainty]:
    """Return the times and errors of one kind of operator, by one call per value of a key."""
    groups = [np.flatnonzero(key == value) for value in np.unique(key)]
    found = [predicted(call(r.select(rows)), hw, level) for rows in groups]
    order = np.argsort(np.concatenate(groups))
    times = _each(lambda name: np.concatenate([getattr(time, name) for time, _ in found])[order])
    return times, Uncertainty.joined([error for _, error in found], order)


def _collective(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    def call(rows: Records) -> Estimate:
        return collective(rows.n, rows.batch, hw, kind=ROLES[int(rows.role[0])])

    time, uncertainty = _by(r, r.role, hw, formats.level, call)
    return Predicted(time, {"bytes": r.n, "devices": r.batch, "role": r.role}, uncertainty)


def _elementwise(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    # copies have the class of cache writes
    role = np.where(r.is_operator("copy") | (r.role < 0), ROLES.index("cache_write"), r.role)
    e = elementwise(r.read_bytes, r.write_bytes, hw, role=role, dtype=formats.dtype)
    time, uncertainty = predicted(e, hw, formats.level)
    return Predicted(time, {"bytes": r.read_bytes + r.write_bytes, "role": role}, uncertainty)


def _experts(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    def call(rows: Records) -> Estimate:
        sizes = ExpertSizes(rows.m, rows.n, rows.k, rows.experts, rows.active, rows.skew)
        part, warm = PARTS[int(experts_part(rows)[0])], not rows.cold[0]
        return experts(sizes, hw, formats.dtype, formats.weight, dealt=True, warm=warm, part=part)

    time, uncertainty = _by(r, 2 * experts_part(r) + r.cold, hw, formats.level, call)
    shown = {"m": r.m, "n": r.n, "k": r.k, "experts": r.experts, "active": r.active, "skew": r.skew}
    return Predicted(time, shown, uncertainty)


@dataclass(frozen=True)
class LaunchTime:
    """Host time of an eager launch in a pass."""

    launch_s: float
    half: float  # half-width of its 90 % interval, log

    @classmethod
    def of(cls, hw: HardwareProfile) -> LaunchTime:
        launch_s, log_sd = host_launch(hw)
        posterior = posterior_of(hw)
        return cls(launch_s, log_sd * (COVERAGE_FACTOR if posterior is None else posterior.coverage_factor))

    @property
    def layer_s(self) -> float:
        return LAYER_LAUNCHES * self.launch_s


def without_gpu(r: Records, hw: HardwareProfile) -> NDArray[np.bool_]:
    """Return a mask of the rows that were measured on a CPU (their sources name threads) for a GPU's profile."""
    on_cpu = np.array(["threads" in source.stack for source in r.sources], dtype=bool)
    return np.asarray(on_cpu[r.source] & (hw.architecture != "cpu"))


def _layer(r: Records, hw: HardwareProfile, formats: RowFormats) -> Predicted:
    """Predict eager layers: the host's launches, independent of the length of the cache."""
    rows, host = len(r), LaunchTime.of(hw)
    nothing, seconds = np.zeros(rows), np.full(rows, host.layer_s)
    uncertainty = Uncertainty(
        factors=("host",),
        systematic=np.full((1, rows), ERROR_FACTORS["host"]),
        correlated=np.where(without_gpu(r, hw), LAYER_WITHOUT_GPU, LAYER_COMMON),
        independent=np.full(rows, LAYER_OWN**2),
        coordinates=np.zeros((rows, 3)),
        kind=HOST_KIND,
    )
    width = math.exp(host.half * level_scale(formats.level))
    codes = np.full(rows, bottleneck("host"), dtype=np.int8)
    time = OperatorTimes(seconds, seconds / width, seconds * width, nothing, codes)
    return Predicted(time, {"kv_len": r.kv_len}, uncertainty)


# operator of a record -> section of a profile that predicts it, and the function that does
_MODELS: Mapping[str, tuple[str, Callable[[Records, HardwareProfile, RowFormats], Predicted]]] = {
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
    "layer_eager": ("runtime", _layer),
}
SECTIONS: Mapping[str, str] = MappingProxyType({name: section for name, (section, _) in _MODELS.items()})
