"""What a profile says of records: the time of each row by its operator's cost model, with its doubt.

Use :func:`parts_of` to split records into what one cost model takes, :func:`predict` on each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.devices.protocol import INDEX_BYTES, LAYER_LAUNCHES
from calibration.fit.core import weight_copies
from calibration.records.screening import LATENT
from calibration.records.timing_table import LAUNCHES, OPERATORS, Records
from simulator.arrays import IndexArray
from simulator.cost.attention import decode_attention_time, prefill_attention_time
from simulator.cost.collective import collective_time
from simulator.cost.elementwise import elementwise_time
from simulator.cost.experts import experts_time
from simulator.cost.forward import TIMES
from simulator.cost.gemm import gemm_time
from simulator.hardware.profile import HardwareProfile
from simulator.uncertainty.error_model import (
    BOTTLENECKS,
    COVERAGE_FACTOR,
    ERROR_FACTORS,
    FACTOR_INDEX,
    HOST_KIND,
    OperatorTimes,
    Uncertainty,
    level_scale,
    posterior_of,
)
from simulator.workload import DTYPE_BYTES, DTYPES, ROLES, Kernel

UNTIMED = "the time is no positive number"

LAYER_OWN, LAYER_COMMON, LAYER_WITHOUT_GPU = 0.03, 0.10, 0.50
"""Error of an eager layer's time, log units: a row's own, and what all have in common, because a layer of Transformers
is not the one that is measured and a pass is more than its layers; of a GPU's host, if they were measured without the
GPU, whose driver may take as long as the framework does. The last two are assumed."""


@dataclass(frozen=True)
class Predicted:
    """Times of the rows of an operator, with their doubt unless they are a sum; sizes that errors are shown against."""

    time: OperatorTimes
    sizes: Mapping[str, Any]


def parts_of(records: Records, hw: HardwareProfile, skipped: dict[str, int]) -> Iterator[tuple[str, str, IndexArray]]:
    """Operator, number format (as :meth:`Records.labels` names it) and rows of what the device's cost models can
    predict; the others are counted in ``skipped`` by reason."""
    timed = records.timed
    if count := int((~timed).sum()):
        skipped[UNTIMED] = count
    # copies are one with the elementwise operators
    operators = np.where(records.is_operator("copy"), OPERATORS.index("elementwise"), records.operator)
    labels = records.labels().astype(str)
    for code, label in sorted(set(zip(operators[timed].tolist(), labels[timed].tolist(), strict=True))):
        rows, operator = np.flatnonzero(timed & (operators == code) & (labels == label)), OPERATORS[code]
        dtype = DTYPES[int(records.dtype[rows[0]])]
        if operator not in SECTIONS:
            reason = f"{operator} is no single operator of the model"
        elif dtype not in hw.rates:
            reason = f"{hw.name} has no {dtype} arithmetic"
        elif operator == "collective" and (records.launch[rows] == LAUNCHES.index("eager")).all():
            reason = "a collective launched by the host is timed with it"
        elif operator == "collective" and hw.link is None:
            reason = f"{hw.name} has no link to other devices"
        else:
            yield operator, label, rows
            continue
        skipped[reason] = skipped.get(reason, 0) + len(rows)


def predict(r: Records, hw: HardwareProfile, level: float = 0.9) -> Predicted:
    """Times of the rows of one part, as they were measured: warm or cold, so many weights in turn."""
    operator = OPERATORS[int(r.operator[0])]
    options = {"dtype": DTYPES[int(r.dtype[0])], "weight_dtype": DTYPES[int(r.weight_dtype[0])], "level": level}
    return _PREDICT[SECTIONS[operator]](r, hw, options)


def joined(times: Sequence[OperatorTimes]) -> OperatorTimes:
    """Times of several calls, one after the other, without their doubt."""
    columns: dict[str, Any] = {name: np.concatenate([getattr(t, name) for t in times]) for name in TIMES}
    return OperatorTimes(**columns)


def _summed(times: Sequence[OperatorTimes]) -> OperatorTimes:
    """Operators that run one after the other, a row each; their errors taken for one, and the limit that of the
    longest."""
    columns: dict[str, Any] = {name: sum(getattr(t, name) for t in times) for name in TIMES if name != "bound"}
    longest = np.argmax([t.seconds for t in times], axis=0)
    return OperatorTimes(**columns, bound=np.choose(longest, [t.bound for t in times]))


def _gemm(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    if r.is_operator("low_rank")[0]:
        return _pair(r, hw, options)
    if r.is_operator("gather_gemm")[0]:
        return _gathered(r, hw, options)
    if r.is_operator("grouped_gemm")[0]:
        return _grouped(r, hw, options)
    kernel = 1 if r.is_operator("gemm_2to4")[0] else 0
    t = gemm_time(r.m, r.n, r.k, hw, kernel=kernel, copies=weight_copies(r), uncertainty=True, **options)
    return Predicted(t, {"m": r.m, "n": r.n, "k": r.k})


def _pair(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    """The two products of a low-rank pair, k -> rank -> n."""
    copies = weight_copies(r)
    shapes = ((r.m, r.rank, r.k), (r.m, r.n, r.rank))
    t = _summed([gemm_time(*shape, hw, copies=copies, **options) for shape in shapes])
    return Predicted(t, {"m": r.m, "n": r.n, "k": r.k, "rank": r.rank})


def _gathered(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    """A product of some tokens: one kernel that skips the others, or a dense one between a gather and a scatter."""
    kernel = np.where(r.fused, Kernel.BLOCK_SPARSE, Kernel.DENSE)
    product = gemm_time(r.rows, r.n, r.k, hw, kernel=kernel, copies=weight_copies(r), **options)
    return Predicted(_copied(product, r, r.rows, r.n, r.k, hw, options), {"m": r.m, "n": r.n, "k": r.k, "rows": r.rows})


def _grouped(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    """A product of each token by some groups of features: one kernel that skips the others, or for each group a dense
    one, of the tokens that use it, between a gather and a scatter."""
    outer = r.role == ROLES.index("up")
    kernel = np.where(r.fused, np.where(outer, Kernel.GROUPS_N, Kernel.GROUPS_K), Kernel.DENSE)
    tokens = np.maximum(np.round(r.m * r.density), 1.0)
    n, k = np.where(outer & ~r.fused, r.block, r.n), np.where(~outer & ~r.fused, r.block, r.k)
    product = gemm_time(tokens, n, k, hw, kernel=kernel, block=r.block, copies=weight_copies(r), **options)
    each = _copied(product, r, tokens, n, k, hw, options)
    groups = np.where(r.fused, 1.0, np.where(outer, r.n, r.k) / np.maximum(r.block, 1))
    whole = {name: groups * getattr(each, name) for name in TIMES if name != "bound"}
    sizes = {"m": r.m, "n": r.n, "k": r.k, "block": r.block, "density": r.density}
    return Predicted(replace(each, **whole), sizes)


def _copied(
    product: OperatorTimes, r: Records, tokens: Any, n: Any, k: Any, hw: HardwareProfile, options: Mapping[str, Any]
) -> OperatorTimes:
    """A product of m tokens and, where the rows are no one kernel, the gather before and the scatter after it."""
    times: list[OperatorTimes] = [product]
    known: dict[str, Any] = {"dtype": options["dtype"], "level": options["level"], "added": True}
    for role, width in (("gather", k), ("scatter", n)):
        moved = DTYPE_BYTES[r.dtype] * tokens * width
        copy = elementwise_time(moved + INDEX_BYTES * tokens, moved, hw, role=role, **known)
        none = {name: np.where(r.fused, 0.0, getattr(copy, name)) for name in TIMES if name != "bound"}
        times.append(replace(copy, **none, uncertainty=None))
    return _summed(times)


def _attention(
    r: Records, hw: HardwareProfile, time: Callable[..., OperatorTimes], options: Mapping[str, Any]
) -> OperatorTimes:
    common = {"dtype": options["dtype"], "kv_dtype": options["weight_dtype"], "level": options["level"]}
    decode = r.is_operator("attention_decode", "mla_decode")[0]
    lengths = ["kv_len"] if decode else ["q_len", "kv_len"]
    shape = [getattr(r, name) for name in ("batch", *lengths, "heads", "kv_heads", "head_dim")]
    more: dict[str, Any] = {"cold": bool(r.cold[0])} if decode else {"block": r.block}
    if r.is_operator(*LATENT)[0]:
        more |= {"value_dim": r.n, "latent": decode}
    return time(*shape, hw, window=r.window, density=r.density, **common, **more)


def _heads(r: Records) -> dict[str, Any]:
    return {"batch": r.batch, "kv_heads": r.kv_heads, "group": r.heads // r.kv_heads, "head_dim": r.head_dim}


def _prefill(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    t = _attention(r, hw, prefill_attention_time, options)
    return Predicted(t, {"q_len": r.q_len, "history": r.kv_len - r.q_len, **_heads(r)})


def _decode(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    # the published tables read one cache again and again, this program's own measurements do not
    t = _by(r, r.cold, lambda rows: _attention(rows, hw, decode_attention_time, options))
    return Predicted(t, {"kv_len": r.kv_len, **_heads(r)})


def _by(r: Records, key: Any, call: Callable[[Records], OperatorTimes]) -> OperatorTimes:
    """Times of one kind of operator, of which one call takes those of one value of a key."""
    groups = [np.flatnonzero(key == value) for value in np.unique(key)]
    times, back = [call(r.select(rows)) for rows in groups], np.argsort(np.concatenate(groups))
    whole = joined(times)
    columns: dict[str, Any] = {name: getattr(whole, name)[back] for name in TIMES}
    found = [t.uncertainty.columns() for t in times if t.uncertainty is not None]
    uncertainty = {name: np.concatenate([c[name] for c in found])[back] for name in found[0]}
    kinds = [t.uncertainty.kind for t in times if t.uncertainty is not None]
    return OperatorTimes(**columns, uncertainty=Uncertainty.from_columns(uncertainty, kinds[0]))


def _collective(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    def call(rows: Records) -> OperatorTimes:
        return collective_time(rows.n, rows.batch, hw, kind=ROLES[int(rows.role[0])], level=options["level"])

    t = _by(r, r.role, call)
    return Predicted(t, {"bytes": r.n, "devices": r.batch, "role": r.role})


def _elementwise(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    # a copy is of the class of copies
    role = np.where(r.is_operator("copy") | (r.role < 0), ROLES.index("cache_write"), r.role)
    known = {"dtype": options["dtype"], "level": options["level"]}
    t = elementwise_time(r.read_bytes, r.write_bytes, hw, role=role, **known)
    return Predicted(t, {"bytes": r.read_bytes + r.write_bytes, "role": role})


def _experts(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    # the tables deal tokens out and keep the weights warm
    t = experts_time(r.m, r.n, r.k, r.experts, r.active, hw, skew=r.skew, dealt=True, **options)
    return Predicted(t, {"m": r.m, "n": r.n, "k": r.k, "experts": r.experts, "active": r.active, "skew": r.skew})


@dataclass(frozen=True)
class HostTime:
    """What an eager launch takes the host, as passes are predicted with it."""

    launch_s: float
    half: float  # of its 90 % interval, in its log

    @classmethod
    def of(cls, hw: HardwareProfile) -> HostTime:
        """By a profile and its anchor."""
        launch_s, posterior = hw.section("runtime", "*")["host_op_s"], posterior_of(hw)
        if posterior is None:
            return cls(launch_s, COVERAGE_FACTOR * ERROR_FACTORS["host"])
        mean, sd = (float(column[FACTOR_INDEX["host"]]) for column in posterior.columns)
        return cls(launch_s * math.exp(mean), posterior.coverage_factor * sd)

    @property
    def layer_s(self) -> float:
        """Time to launch an eager decoder layer."""
        return LAYER_LAUNCHES * self.launch_s


def without_gpu(r: Records, hw: HardwareProfile) -> NDArray[np.bool_]:
    """Mask of the rows that were measured on a CPU, which says its threads, though the profile is of a GPU."""
    on_cpu = np.array(["threads" in source.stack for source in r.sources], dtype=bool)
    return np.asarray(on_cpu[r.source] & (hw.architecture != "cpu"))


def _layer(r: Records, hw: HardwareProfile, options: Mapping[str, Any]) -> Predicted:
    """Eager layers: the host's launches, whatever the length of the cache."""
    rows, host = len(r), HostTime.of(hw)
    nothing, seconds = np.zeros(rows), np.full(rows, host.layer_s)
    common = np.where(without_gpu(r, hw), LAYER_WITHOUT_GPU, LAYER_COMMON)
    shared, own = np.full((1, rows), ERROR_FACTORS["host"]), np.full(rows, LAYER_OWN**2)
    uncertainty = Uncertainty(("host",), shared, common, own, np.zeros((rows, 3)), HOST_KIND)
    width = math.exp(host.half * level_scale(options["level"]))
    bound = np.full(rows, BOTTLENECKS.index("host"), dtype=np.int8)
    time = OperatorTimes(seconds, seconds / width, seconds * width, nothing, bound, uncertainty=uncertainty)
    return Predicted(time, {"kv_len": r.kv_len})


SECTIONS: Mapping[str, str] = MappingProxyType(
    {
        "gemm": "gemm",
        "gemm_2to4": "gemm",
        "low_rank": "gemm",
        "gather_gemm": "gemm",
        "grouped_gemm": "gemm",
        "attention_prefill": "attention_prefill",
        "attention_block_sparse": "attention_prefill",
        "attention_decode": "attention_decode",
        "mla_prefill": "mla_prefill",
        "mla_decode": "mla_decode",
        "elementwise": "elementwise",
        "copy": "elementwise",
        "collective": "collective",
        "experts": "experts",
        "layer_eager": "runtime",
    }
)
"""Section of a profile that predicts each operator of a record."""

_PREDICT: Mapping[str, Callable[..., Predicted]] = MappingProxyType(
    {
        "gemm": _gemm,
        "attention_prefill": _prefill,
        "attention_decode": _decode,
        "mla_prefill": _prefill,
        "mla_decode": _decode,
        "elementwise": _elementwise,
        "collective": _collective,
        "experts": _experts,
        "runtime": _layer,
    }
)
