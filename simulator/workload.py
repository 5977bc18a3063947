"""Define a workload: the operators of one forward pass as a frozen table of columns.

:func:`simulator.lower` makes a workload, :func:`simulator.prune` changes it, cost models time it. A row is one operator
shape. Its ``count`` is the number of executions: identical layers share a row, and counts of dynamic methods can be
fractional.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import AMOUNT, SHARE, SIZE, Range, array, truths
from simulator.arrays import Array
from simulator.columns import Table, column
from simulator.counts import attention_pairs, delta_bytes, delta_state_bytes, spmv_bytes
from simulator.errors import InputError
from simulator.request import NO_REQUEST, Meta
from simulator.routing import experts_touched
from simulator.units import percent, size


class Kind(IntEnum):
    """Kind of an operator, which selects its cost model."""

    GEMM = 0
    PREFILL_ATTENTION = 1
    DECODE_ATTENTION = 2
    ELEMENTWISE = 3
    COLLECTIVE = 4
    HOST = 5  # not in workloads: marks errors of the host
    EXPERTS = 6  # routed experts of a layer
    DELTA_NET = 7  # gated delta net of a layer


# plain numbers, as a lookup of an enumeration member takes a microsecond in Python 3.11
_GEMM, _PREFILL, _DECODE = int(Kind.GEMM), int(Kind.PREFILL_ATTENTION), int(Kind.DECODE_ATTENTION)
_EXPERTS, _DELTA_NET = int(Kind.EXPERTS), int(Kind.DELTA_NET)


class Part(IntEnum):
    """Part of the decoder; depth pruning removes ATTENTION and MLP parts of layers."""

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2
    HEAD = 3


class Kernel(IntEnum):
    """Kernel of an operator, which determines whether zeros save time."""

    DENSE = 0  # computes zeros
    SPARSE24 = 1  # 2:4 sparse tensor cores, compressed weights
    UNSTRUCTURED = 2  # scattered zeros: counted in bounds, timed as dense
    BLOCK_SPARSE = 3  # skips tiles: attention blocks, or tokens of a GEMM sorted by a mask
    GROUPS_N = 4  # skips groups of output features of a GEMM per token
    GROUPS_K = 5  # skips groups of input features of a GEMM per token
    SPMV = 6  # scattered zeros times one token; stores nonzero values with their distances


class Phase(IntEnum):
    """Phase of inference of a row."""

    PREFILL = 0
    DECODE = 1


PHASES: tuple[str, ...] = ("prefill", "decode", "generate", "serve")
"""Phases that :func:`simulator.lower` accepts."""

STACKS: tuple[str, ...] = ("vllm", "sglang", "trtllm", "torch", "flashinfer")
"""Software stacks that sections are fitted on, in the order of the default engine, which counts if none is named."""

DTYPES: tuple[str, ...] = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "int4", "fp8_block", "nvfp4", "mxfp4")
"""Names of number formats; the index is the code in the columns ``dtype`` and ``weight_dtype``.

fp8_block is a format of weights for fp8 arithmetic, with one scale per 128 x 128 weights; mxfp4 is only for weights."""

DTYPE_BYTES: NDArray[np.float64] = np.array([4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5, 1.0, 0.5625, 0.53125])
"""Stored bytes of one element by dtype code; nvfp4 has one scale byte per 16 elements, mxfp4 per 32."""

# fmt: off
ROLES: tuple[str, ...] = (
    # GEMMs of a decoder layer
    "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down",
    # GEMMs outside the layers, and those that pruning adds
    "lm_head", "router", "residual_projection",
    # attention
    "attention",
    # elementwise
    "embedding", "attention_norm", "mlp_norm", "qk_norm", "post_norm", "final_norm", "rotary", "activation", "residual",
    "cache_write", "softcap", "sampling", "gather", "scatter", "mask", "select", "sort", "quantize",
    # collectives
    "all_reduce", "send", "all_gather", "reduce_scatter", "all_to_all",
    # latent attention: projections to the ranks, from the query rank, from the latent vector, and halves of the latter
    "q_a", "kv_a", "qkv_a", "q_b", "kv_b", "absorb_k", "absorb_v", "latent_norm",
    # hidden x hidden product instead of attention or MLP; routed experts, and the gate of shared experts
    "linear", "experts", "shared_gate",
    # zeros for skipped tokens; gate times up if a GEMM includes the activation
    "fill", "product",
    # gated delta net: queries, keys, values and gate; decay and strength of the update; its norm; gate after attention
    "delta_in", "delta_ba", "delta_net", "gated_norm", "output_gate",
    # conversion of activations for narrow products (quantize: of the residual stream): outputs of heads, inner features
    "quantize_heads", "quantize_inner",
)
# fmt: on
"""Names of operator roles; the index is the code in the column ``role``, also in files, so new names go to the end."""

_ROLE_CODE: Mapping[str, int] = MappingProxyType({name: code for code, name in enumerate(ROLES)})
_DTYPE_CODE: Mapping[str, int] = MappingProxyType({name: code for code, name in enumerate(DTYPES)})


def role_code(*names: str) -> Array:
    """Return the codes of role names."""
    return np.array([_ROLE_CODE[name] for name in names], dtype=np.int16)


@lru_cache(maxsize=512)
def _role_table(names: tuple[str, ...]) -> Array:
    """Return whether each role is one of the names: a lookup is many times faster than a search in short tables."""
    table = np.zeros(len(ROLES), dtype=bool)
    table[role_code(*names)] = True
    return table


def dtype_code(name: str) -> int:
    """Return the code of a number format."""
    if name not in _DTYPE_CODE:
        raise InputError(f"dtype {name!r} is unknown; expected one of {', '.join(DTYPES)}")
    return _DTYPE_CODE[name]


_ENUMS: Mapping[str, type[IntEnum]] = MappingProxyType({"kind": Kind, "part": Part, "phase": Phase, "kernel": Kernel})
_RANGES = {"layer": Range(-1.0, 2.0**31 - 1.0, "whole numbers from -1 up", whole=True), "density": SHARE}


@dataclass(frozen=True, eq=False, repr=False)
class Workload(Table):
    """Operators of a pass as equal-length columns, one row per operator shape.

    :func:`simulator.lower` makes a workload, ``Workload.from_rows`` and ``Workload.from_columns`` make one of rows or
    columns. Columns of roles, number formats and other names accept names or codes.

    Parameters
    ----------
    kind, role, part, phase : array of int, shape (rows,)
        Codes of cost model (:class:`Kind`), operator (:data:`ROLES`), part of the decoder and phase.
    layer, layers : array of int, shape (rows,)
        First layer of the row, -1 outside the layers, and number of consecutive layers, 0 outside the layers.
    count : array of float, shape (rows,)
        Executions in the pass, over all layers of the row; the expected number for dynamic methods.
    m, n, k : array of int, shape (rows,)
        GEMM: tokens, output features and input features. Experts: tokens, inner width of one expert, hidden size. Delta
        net: tokens of all sequences, features of all values.
    experts, active, skew : array, shape (rows,)
        Routed experts of the device, experts per token on average, and imbalance (:mod:`simulator.routing`).
    stage : array of int, shape (rows,)
        GEMM: 0 for a whole weight, 1 and 2 for the first and second factor of a low-rank pair.
    batch, q_len, kv_len : array of int, shape (rows,)
        Attention: sequences, query positions and key positions per sequence, the last ``q_len`` those of the queries.
        Delta net: ``batch`` sequences. Collective: ``batch`` devices. Experts: ``batch`` devices that
        share them, or 0. Copied cache: ``kv_len`` positions.
    heads, kv_heads, head_dim, value_dim : array of int, shape (rows,)
        Attention: query heads, key/value heads, features of a query or key head, and features of a value head (0: as
        of a key head). Delta net: value heads, key heads, features of a key head and of a value head.
    latent : array of int, shape (rows,)
        Attention: elements per position in the cache of latent attention; else 0.
    window : array of int, shape (rows,)
        Attention: sliding window in positions, 0 for none. Delta net: positions of its convolution.
    block : array of int, shape (rows,)
        Edge of skipped blocks, or features of skipped groups; 0 without blocks.
    density : array of float, shape (rows,)
        Share of the multiply-adds that are neither zero nor skipped.
    kernel : array of int, shape (rows,)
        Code of the kernel (:class:`Kernel`).
    dtype, weight_dtype : array of int, shape (rows,)
        Codes (:data:`DTYPES`) of activations and arithmetic, and of the second operand: weights, the K/V cache, or the
        state of a delta net.
    read_bytes, write_bytes : array of float, shape (rows,)
        Elementwise: bytes read and written per execution. Collective: ``read_bytes`` is the payload.
    params : array of float, shape (rows,)
        Parameters of the row, 0 if tied or shared with another row.
    overhead : array of bool, shape (rows,)
        Whether the row exists only because of pruning.
    meta : Meta
        Request and pruning steps.

    Raises
    ------
    InputError
        If columns have unequal lengths or values out of range.

    Examples
    --------
    >>> import simulator
    >>> w = simulator.Workload.from_rows([{"role": "q", "m": 2, "n": 8, "k": 4, "count": 3}])
    >>> float(w.flops.sum())
    384.0
    """

    kind: Array = column(np.int8, Kind.GEMM)
    role: Array = column(np.int16, 0)
    part: Array = column(np.int8, Part.ATTENTION)
    phase: Array = column(np.int8, Phase.PREFILL)
    layer: Array = column(np.int32, -1)
    layers: Array = column(np.int32, 0)
    count: Array = column(np.float64, 1.0)
    m: Array = column(np.int64, 0)
    n: Array = column(np.int64, 0)
    k: Array = column(np.int64, 0)
    experts: Array = column(np.int64, 0)
    active: Array = column(np.float64, 0.0)
    skew: Array = column(np.float64, 0.0)
    stage: Array = column(np.int8, 0)
    batch: Array = column(np.int64, 0)
    q_len: Array = column(np.int64, 0)
    kv_len: Array = column(np.int64, 0)
    heads: Array = column(np.int64, 0)
    kv_heads: Array = column(np.int64, 0)
    head_dim: Array = column(np.int64, 0)
    value_dim: Array = column(np.int64, 0)
    latent: Array = column(np.int64, 0)
    window: Array = column(np.int64, 0)
    block: Array = column(np.int64, 0)
    density: Array = column(np.float64, 1.0)
    kernel: Array = column(np.int8, Kernel.DENSE)
    dtype: Array = column(np.int8, _DTYPE_CODE["bf16"])
    weight_dtype: Array = column(np.int8, _DTYPE_CODE["bf16"])
    read_bytes: Array = column(np.float64, 0.0)
    write_bytes: Array = column(np.float64, 0.0)
    params: Array = column(np.float64, 0.0)
    overhead: Array = column(np.bool_, False)
    meta: Meta = NO_REQUEST

    CODES = MappingProxyType({"role": ROLES, "dtype": DTYPES, "weight_dtype": DTYPES})

    @classmethod
    def coerced(cls, name: str, values: Any) -> Array:
        """Return ``values`` of the column ``name``; raise InputError for values outside its range."""
        given, kind = super().coerced(name, values), cls.SCHEMA[name][0]
        if kind is np.bool_:
            return truths(f"column {name}", given)
        if name in _ENUMS or name in cls.CODES:
            most = len(_ENUMS.get(name, cls.CODES.get(name, ()))) - 1
            return array(f"column {name}", given, Range(0.0, most, f"whole numbers from 0 to {most}", whole=True))
        right = _RANGES.get(name, SIZE if issubclass(kind, np.integer) else AMOUNT)
        return array(f"column {name}", given, right)

    def _title(self) -> str:
        about, applied = self.meta, "".join(f", {a.family} {percent(a.sparsity)}" for a in self.meta.applied)
        request = f"{about.model} {about.phase}, batch {about.batch}, seq {about.seq}, {about.dtype}{applied}"
        return f"{request}: {len(self)} rows, {self.flops.sum():.3g} FLOP, {size(float(self.bytes.sum()))}"

    def _columns(self) -> Mapping[str, Any]:
        """Return columns with names instead of codes, and FLOPs and bytes."""
        held = {name: np.array([one.name.lower() for one in of])[getattr(self, name)] for name, of in _ENUMS.items()}
        return {**super()._columns(), **held, "flops": self.flops, "bytes": self.bytes}

    def is_role(self, *names: str) -> Array:
        """Return a mask of the rows with one of the roles ``names``, of :data:`ROLES`."""
        mask: Array = _role_table(names)[self.role]
        return mask

    @property
    def is_attention(self) -> Array:
        """Mask of prefill and decode attention."""
        mask: Array = (self.kind == _PREFILL) | (self.kind == _DECODE)
        return mask

    @property
    def pairs(self) -> Array:
        """Query-key pairs per sequence and head of attention rows, causal and windowed; 0 for other rows."""
        return attention_pairs(self.q_len, self.kv_len, self.window)

    @property
    def keys_seen(self) -> Array:
        """Key positions that at least one query of an attention row sees."""
        return np.where(self.window > 0, np.minimum(self.kv_len, self.q_len + self.window - 1), self.kv_len)

    @property
    def value_features(self) -> Array:
        """Features of a value head of an attention row."""
        return np.where(self.value_dim > 0, self.value_dim, self.head_dim)

    @property
    def key_elements(self) -> Array:
        """Elements per position that an attention row reads: keys and values of all heads, or the latent vector."""
        heads = self.kv_heads * (self.head_dim + self.value_features)
        return np.where((self.kind == _DECODE) & (self.latent > 0), self.latent, heads)

    @property
    def state_bytes_each(self) -> Array:
        """Bytes of the states of all sequences of a delta net: recurrent ones, last positions of the convolution."""
        sizes = self.heads, self.kv_heads, self.head_dim, self.value_dim, self.window
        each = delta_state_bytes(*sizes, DTYPE_BYTES[self.weight_dtype], DTYPE_BYTES[self.dtype])
        return np.where(self.kind == _DELTA_NET, self.batch * each, 0.0)

    @property
    def weight_bytes_each(self) -> Array:
        """Bytes of weights that one execution of a GEMM row reads, compressed if the kernel stores no zeros.

        Of routed experts, only those in use are read.
        """
        stored: Array = DTYPE_BYTES[self.weight_dtype]
        if np.count_nonzero(self.kernel):
            pairs, scattered = self.kernel == Kernel.SPARSE24, self.kernel == Kernel.UNSTRUCTURED
            # 2:4 stores a 2-bit index per kept value; scattered zeros need at least one bit per position
            index = np.where(pairs, 0.25 * self.density, 0.125)
            # an index takes more bytes than few zeros save
            kept = np.where(pairs | scattered, np.minimum(stored, self.density * stored + index), stored)
            stored = np.where(self.kernel == Kernel.SPMV, spmv_bytes(self.density, stored), kept)
        out: Array = np.where(self.kind == _GEMM, self.n.astype(np.float64) * self.k * stored, 0.0)
        if len(rows := np.flatnonzero(self.kind == _EXPERTS)):
            w = self.take(rows)
            out[rows] = 3.0 * w.n * w.k * stored[rows] * experts_touched(w.m, w.experts, w.active, w.skew)
        return out

    @property
    def flops(self) -> Array:
        """FLOPs of all executions of each row.

        GEMMs have 2MNK, attention 2 (d_key + d_value) per query-key pair and head, experts 6NK per token and expert in
        use, a delta net 6 d_key d_value per token and value head, other operators none.
        """
        m, n, k = (c.astype(np.float64) for c in (self.m, self.n, self.k))
        gemm = 2.0 * m * n * k
        attention = 2.0 * self.batch * self.heads * (self.head_dim + self.value_features) * self.pairs
        each = np.where(self.kind == _GEMM, gemm, np.where(self.is_attention, attention, 0.0))
        each = np.where(self.kind == _EXPERTS, 3.0 * gemm * self.active, each)
        each = np.where(self.kind == _DELTA_NET, 6.0 * m * self.heads * self.head_dim * self.value_dim, each)
        out: Array = each * self.density * self.count
        return out

    @property
    def bytes(self) -> Array:
        """Minimum bytes of all executions of each row: operands are read once, results are written once."""
        act = DTYPE_BYTES[self.dtype]
        weights = self.weight_bytes_each
        gemm = weights + act * self.m.astype(np.float64) * (self.k + self.n)
        cache = 1.0 * self.batch * self.keys_seen * self.key_elements * DTYPE_BYTES[self.weight_dtype]
        cache = np.where(self.kind == _DECODE, cache * self.density, cache)
        query = 1.0 * self.batch * self.heads * self.q_len * (self.head_dim + self.value_features) * act
        moved = self.read_bytes + self.write_bytes
        each = np.where(self.kind == _GEMM, gemm, np.where(self.is_attention, cache + query, moved))
        streams = weights + 2.0 * act * self.m * self.k  # experts: activations that no fusion avoids
        each = np.where(self.kind == _EXPERTS, streams, each)
        if len(rows := np.flatnonzero(self.kind == _DELTA_NET)):
            w = self.take(rows)
            features = 2.0 * (w.kv_heads * w.head_dim + w.heads * w.value_dim)
            each[rows] = delta_bytes(w.m, w.batch, features, w.state_bytes_each, act[rows])
        out: Array = each * self.count
        return out

    @property
    def repeats(self) -> Array:
        """Executions of each row per layer, at least 1; they share the parameters of the row."""
        return np.where(self.layers > 0, np.maximum(self.count / np.maximum(self.layers, 1), 1.0), 1.0)

    @property
    def parameters(self) -> float:
        """Parameters of the model that the rows describe."""
        return float((self.params * self.count).sum())

    def expand(self) -> Workload:
        """Return the workload with one row per layer; equal layers share the count of their row."""
        times = np.maximum(self.layers, 1).astype(np.int64)
        index = np.repeat(np.arange(len(self)), times)
        offset = np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)
        out = self.take(index)
        layer = np.where(out.layers > 0, out.layer + offset, -1)
        share = 1.0 / times[index]
        return out.replace(count=out.count * share, layer=layer, layers=np.minimum(out.layers, 1))
