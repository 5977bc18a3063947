"""A workload: the operators of one forward pass as a frozen table of columns.

Use :func:`simulator.lower` to make one, :func:`simulator.prune` to change it, and the kernels to time it. A row is one
operator shape; ``count`` says how often it runs (identical layers share a row), and may be fractional where a
dynamic method runs an operator only sometimes. Everything is an array of equal length: no Python loop over rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import AMOUNT, SHARE, SIZE, Range, array, truths
from simulator.arrays import Array
from simulator.columns import Table, column
from simulator.display import table_html
from simulator.errors import InputError
from simulator.routing import experts_touched
from simulator.units import percent, size


class Kind(IntEnum):
    """What an operator is, hence which cost model times it."""

    GEMM = 0
    PREFILL_ATTENTION = 1
    DECODE_ATTENTION = 2
    ELEMENTWISE = 3
    COLLECTIVE = 4
    HOST = 5  # of no row: errors of the host among those of operators
    EXPERTS = 6  # the routed experts of a layer


# as plain numbers: looking up a member of an enumeration takes a microsecond in Python 3.11, too long here
_GEMM, _PREFILL, _DECODE = int(Kind.GEMM), int(Kind.PREFILL_ATTENTION), int(Kind.DECODE_ATTENTION)
_EXPERTS = int(Kind.EXPERTS)


class Part(IntEnum):
    """The part of the decoder an operator belongs to; depth pruning removes ATTENTION and MLP parts of layers."""

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2
    HEAD = 3


class Kernel(IntEnum):
    """How an operator is executed, hence whether its zeros save time."""

    DENSE = 0  # zeros, if any, are computed
    SPARSE24 = 1  # 2:4 sparse tensor cores, compressed weights
    UNSTRUCTURED = 2  # scattered zeros: counted in the bounds, timed as dense
    BLOCK_SPARSE = 3  # whole tiles skipped: attention blocks; tokens of a GEMM, sorted by a mask
    GROUPS_N = 4  # groups of a GEMM's output features skipped token by token
    GROUPS_K = 5  # groups of its input features, in the main loop
    SPMV = 6  # scattered zeros times one token, the rest stored with the distances between them


class Phase(IntEnum):
    """The phase of inference a row belongs to."""

    PREFILL = 0
    DECODE = 1


PHASES: tuple[str, ...] = ("prefill", "decode", "generate", "serve")
"""Names of what can be lowered."""

STACKS: tuple[str, ...] = ("sglang", "trtllm", "vllm", "torch")
"""Software whose kernels a section may be fitted on, the one that is preferred where nobody asks first."""

DTYPES: tuple[str, ...] = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "int4", "fp8_block", "nvfp4", "mxfp4")
"""Names of number formats; the index is the code in the ``dtype`` and ``weight_dtype`` columns. fp8_block is a format
of weights that fp8 arithmetic reads: a scale for every 128 x 128 of them; mxfp4 one of weights alone."""

DTYPE_BYTES: NDArray[np.float64] = np.array([4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5, 1.0, 0.5625, 0.53125])
"""Stored bytes of one element, by dtype code; nvfp4 with a byte of scale for 16 elements, mxfp4 for 32."""

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
    # of latent attention: to the ranks, from the query's, from the latent, and the latter's halves on either side of it
    "q_a", "kv_a", "qkv_a", "q_b", "kv_b", "absorb_k", "absorb_v", "latent_norm",
    # a layer's hidden x hidden product in place of attention or MLP; routed experts, and what weighs the shared ones
    "linear", "experts", "shared_gate",
    # zeros where tokens are skipped; gate times up where the activation is part of a GEMM
    "fill", "product",
)
# fmt: on
"""Names of operator roles; the index is the code in the ``role`` column, also in files: new ones go to the end."""

_ROLE_CODE: Mapping[str, int] = MappingProxyType({name: code for code, name in enumerate(ROLES)})
_DTYPE_CODE: Mapping[str, int] = MappingProxyType({name: code for code, name in enumerate(DTYPES)})


def role_code(*names: str) -> Array:
    """Codes of role names."""
    return np.array([_ROLE_CODE[name] for name in names], dtype=np.int16)


@lru_cache(maxsize=512)
def _role_table(names: tuple[str, ...]) -> Array:
    """Whether each role is among the names: membership by look-up, many times faster than a search on short tables."""
    table = np.zeros(len(ROLES), dtype=bool)
    table[role_code(*names)] = True
    return table


def dtype_code(name: str) -> int:
    """Code of a number format."""
    if name not in _DTYPE_CODE:
        raise InputError(f"dtype {name!r} is unknown; expected one of {', '.join(DTYPES)}")
    return _DTYPE_CODE[name]


def attention_pairs(q_len: Array, kv_len: Array, window: Array) -> Array:
    """Query-key pairs under a causal mask, for one sequence and head.

    Query i of q_len (from 0) sits at position p = kv_len - q_len + i and sees min(p + 1, window) keys (0: no limit).

    >>> int(attention_pairs(np.array(4), np.array(4), np.array(2)))
    7
    """
    q, kv, w = (np.asarray(x, dtype=np.float64) for x in (q_len, kv_len, window))
    first, last = kv - q + 1, kv  # keys seen by the first and the last query
    full: Array = q * (first + last) / 2
    if not np.count_nonzero(w):
        return full
    # queries whose window is shorter than what lies before them
    capped = np.clip(last - np.maximum(w, first - 1), 0, q)
    seen = full - capped * (last - w) + capped * (capped - 1) / 2  # sum of (position + 1 - w) over the capped queries
    return np.where(w > 0, seen, full)


def spmv_bytes(density: Any, value_bytes: Any) -> Array:
    """Bytes that a kernel for scattered zeros stores for each weight, zeros included.

    Beside each value four bits tell how far it is from the one before; where 16 places are empty a zero is stored in
    between: 1 / (1 - zeros^16) values for each one that is left (MACKO, github.com/vlejd/macko_spmv).

    >>> spmv_bytes(np.array([1.0, 0.5]), 2.0).round(3).tolist()
    [2.5, 1.25]
    """
    kept = np.clip(np.asarray(density, dtype=np.float64), 1e-6, 1.0)
    return np.asarray(kept / (1.0 - (1.0 - kept) ** 16) * (value_bytes + 0.5))


@dataclass(frozen=True)
class Applied:
    """One pruning step in a workload's history."""

    family: str
    sparsity: float  # asked for: a scalar, or the mean of a per-projection / per-layer choice
    realised: float  # after rounding


@dataclass(frozen=True)
class Meta:
    """What a workload is a workload of."""

    model: str = ""
    phase: str = "prefill"  # one of PHASES
    batch: int = 1  # sequences; requests in flight of a serve
    seq: int = 1  # prompt tokens a sequence, cached positions (decode)
    new_tokens: int = 0  # tokens of each request of a generate or serve
    dtype: str = "bf16"
    layers: int = 0  # decoder layers of the dense model
    hidden: int = 0
    devices: int = 1
    parallel: str = "none"  # none, tensor or pipeline
    engine: str = ""  # name or path; "": bare kernels
    applied: tuple[Applied, ...] = ()
    config: Any = field(default=None, compare=False, repr=False)  # the ModelConfig it was lowered from


_ENUMS: Mapping[str, type[IntEnum]] = MappingProxyType({"kind": Kind, "part": Part, "phase": Phase, "kernel": Kernel})
_RANGES = {"layer": Range(-1.0, 2.0**31 - 1.0, "whole numbers from -1 up", whole=True), "density": SHARE}


@dataclass(frozen=True, eq=False, repr=False)
class Workload(Table):
    """Operators as equal-length columns; names of roles and number formats are taken as their codes.

    >>> w = Workload.from_rows([{"role": "q", "m": 2, "n": 8, "k": 4, "count": 3}])
    >>> float(w.flops.sum())
    384.0
    """

    # fmt: off
    kind: Array = column(np.int8, Kind.GEMM)
    role: Array = column(np.int16, 0)
    part: Array = column(np.int8, Part.ATTENTION)
    phase: Array = column(np.int8, Phase.PREFILL)
    layer: Array = column(np.int32, -1)  # first layer the row stands for; -1 outside the layers
    layers: Array = column(np.int32, 0)  # consecutive layers the row stands for; 0 outside the layers
    count: Array = column(np.float64, 1.0)  # executions in the pass, all its layers together (expected, where dynamic)
    m: Array = column(np.int64, 0)  # GEMM: tokens
    n: Array = column(np.int64, 0)  # GEMM: output features; experts: inner width of one
    k: Array = column(np.int64, 0)  # GEMM: input features; experts: hidden size
    experts: Array = column(np.int64, 0)  # routed experts that the device holds
    active: Array = column(np.float64, 0.0)  # of them a token uses, on average
    skew: Array = column(np.float64, 0.0)  # how unevenly tokens use them, see :func:`~simulator.routing.experts_chance`
    stage: Array = column(np.int8, 0)  # GEMM: 0 a whole weight, 1 / 2 the first / second factor of a low-rank pair
    batch: Array = column(np.int64, 0)  # attention: sequences; collective: devices taking part
    q_len: Array = column(np.int64, 0)  # attention: query positions a sequence (1 in decode)
    # attention: key positions a sequence, the last q_len the queries' own; of a cache that is copied, its positions
    kv_len: Array = column(np.int64, 0)
    heads: Array = column(np.int64, 0)  # attention: query heads
    kv_heads: Array = column(np.int64, 0)  # attention: key/value heads
    head_dim: Array = column(np.int64, 0)  # attention: features of a query or key head
    value_dim: Array = column(np.int64, 0)  # attention: features of a value head; 0: as of a key head
    # attention: elements of a position in the cache, where keys and values are made from one latent vector; 0 elsewhere
    latent: Array = column(np.int64, 0)
    window: Array = column(np.int64, 0)  # attention: sliding window in positions, 0 for none
    block: Array = column(np.int64, 0)  # edge of the blocks, or features of the groups, that are skipped; 0: no blocks
    density: Array = column(np.float64, 1.0)  # share of the multiply-adds that are not zero / not skipped
    kernel: Array = column(np.int8, Kernel.DENSE)
    dtype: Array = column(np.int8, _DTYPE_CODE["bf16"])  # activations and arithmetic
    weight_dtype: Array = column(np.int8, _DTYPE_CODE["bf16"])  # second operand: weights, or the K/V cache
    read_bytes: Array = column(np.float64, 0.0)  # elementwise: bytes read; collective: payload
    write_bytes: Array = column(np.float64, 0.0)  # elementwise: bytes written
    params: Array = column(np.float64, 0.0)  # parameters this row owns (0 where tied or shared with another row)
    overhead: Array = column(np.bool_, False)  # work that exists only because of pruning
    meta: Meta = Meta()
    # fmt: on

    CODES = MappingProxyType({"role": ROLES, "dtype": DTYPES, "weight_dtype": DTYPES})

    @classmethod
    def coerced(cls, name: str, values: Any) -> Array:
        """``values`` of the column ``name``; InputError for what is none of its kind: fractions, negative, infinite."""
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
        asked = f"{about.model} {about.phase}, batch {about.batch}, seq {about.seq}, {about.dtype}{applied}"
        return f"{asked}: {len(self)} rows, {self.flops.sum():.3g} FLOP, {size(float(self.bytes.sum()))}"

    def _columns(self) -> Mapping[str, Any]:
        """Names in place of codes, and what follows: FLOPs and bytes."""
        held = {name: np.array([one.name.lower() for one in of])[getattr(self, name)] for name, of in _ENUMS.items()}
        return {**super()._columns(), **held, "flops": self.flops, "bytes": self.bytes}

    def _html(self) -> str:
        columns = self._columns()
        names = "role layers count m n k kv_len heads kernel density flops bytes"
        return table_html({name: columns[name] for name in names.split()})

    def is_role(self, *names: str) -> Array:
        """Mask of the rows with one of the roles ``names``, of :data:`ROLES`."""
        mask: Array = _role_table(names)[self.role]
        return mask

    @property
    def is_attention(self) -> Array:
        """Mask of prefill and decode attention."""
        mask: Array = (self.kind == _PREFILL) | (self.kind == _DECODE)
        return mask

    @property
    def pairs(self) -> Array:
        """Query-key pairs an attention row computes for one sequence and head: causal, windowed; 0 for other rows."""
        return attention_pairs(self.q_len, self.kv_len, self.window)

    @property
    def keys_seen(self) -> Array:
        """Key positions that any query of an attention row sees."""
        return np.where(self.window > 0, np.minimum(self.kv_len, self.q_len + self.window - 1), self.kv_len)

    @property
    def value_features(self) -> Array:
        """Features of a value head of an attention row."""
        return np.where(self.value_dim > 0, self.value_dim, self.head_dim)

    @property
    def key_elements(self) -> Array:
        """Elements of keys and values that an attention row reads of each position: of all heads, or the latent."""
        heads = self.kv_heads * (self.head_dim + self.value_features)
        return np.where((self.kind == _DECODE) & (self.latent > 0), self.latent, heads)

    @property
    def weight_bytes_each(self) -> Array:
        """Bytes of weights one execution of a GEMM row must read (compressed where the kernel stores zeros away); of
        routed experts, of those that some token uses."""
        stored: Array = DTYPE_BYTES[self.weight_dtype]
        if np.count_nonzero(self.kernel):
            pairs, scattered = self.kernel == Kernel.SPARSE24, self.kernel == Kernel.UNSTRUCTURED
            # 2:4 keeps a 2-bit index a kept value; scattered zeros need at least one bit a position
            index = np.where(pairs, 0.25 * self.density, 0.125)
            # few zeros are not worth an index
            kept = np.where(pairs | scattered, np.minimum(stored, self.density * stored + index), stored)
            stored = np.where(self.kernel == Kernel.SPMV, spmv_bytes(self.density, stored), kept)
        out: Array = np.where(self.kind == _GEMM, self.n.astype(np.float64) * self.k * stored, 0.0)
        if len(rows := np.flatnonzero(self.kind == _EXPERTS)):
            w = self.take(rows)
            out[rows] = 3.0 * w.n * w.k * stored[rows] * experts_touched(w.m, w.experts, w.active, w.skew)
        return out

    @property
    def flops(self) -> Array:
        """FLOPs of each row, all its executions: GEMMs 2MNK, attention 4 d a query-key pair and head (2 for keys, 2 for
        values), experts 6NK a token and expert it uses; others none."""
        m, n, k = (c.astype(np.float64) for c in (self.m, self.n, self.k))
        gemm = 2.0 * m * n * k
        attention = 2.0 * self.batch * self.heads * (self.head_dim + self.value_features) * self.pairs
        each = np.where(self.kind == _GEMM, gemm, np.where(self.is_attention, attention, 0.0))
        each = np.where(self.kind == _EXPERTS, 3.0 * gemm * self.active, each)
        out: Array = each * self.density * self.count
        return out

    @property
    def bytes(self) -> Array:
        """Bytes each row must at least move, all its executions: operands read once, results written once."""
        act = DTYPE_BYTES[self.dtype]
        gemm = self.weight_bytes_each + act * self.m.astype(np.float64) * (self.k + self.n)
        cache = 1.0 * self.batch * self.keys_seen * self.key_elements * DTYPE_BYTES[self.weight_dtype]
        cache = np.where(self.kind == _DECODE, cache * self.density, cache)
        query = 1.0 * self.batch * self.heads * self.q_len * (self.head_dim + self.value_features) * act
        moved = self.read_bytes + self.write_bytes
        each = np.where(self.kind == _GEMM, gemm, np.where(self.is_attention, cache + query, moved))
        streams = self.weight_bytes_each + 2.0 * act * self.m * self.k  # of routed experts, what cannot be fused away
        each = np.where(self.kind == _EXPERTS, streams, each)
        out: Array = each * self.count
        return out

    @property
    def repeats(self) -> Array:
        """Executions of each row in a layer, at least 1; what a row owns is shared out among them."""
        return np.where(self.layers > 0, np.maximum(self.count / np.maximum(self.layers, 1), 1.0), 1.0)

    @property
    def parameters(self) -> float:
        """Parameters of the model the rows describe."""
        return float((self.params * self.count).sum())

    def expand(self) -> Workload:
        """One row a layer: rows that stand for several equal layers are repeated, ``count`` shared out among them."""
        times = np.maximum(self.layers, 1).astype(np.int64)
        index = np.repeat(np.arange(len(self)), times)
        offset = np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)
        out = self.take(index)
        layer = np.where(out.layers > 0, out.layer + offset, -1)
        share = 1.0 / times[index]
        return out.replace(count=out.count * share, layer=layer, layers=np.minimum(out.layers, 1))
