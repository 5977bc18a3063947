"""What a device must offer to be measured, the operators it may be asked for, and the ways it may fail.

:class:`Operator` names one thing to time, by shape and number format alone. A :class:`Device` turns it into a
:class:`Prepared`, whose ``sample(loops)`` is all that the timing code ever calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from calibration.devices.telemetry import Snapshot
from simulator.errors import InputError, unknown
from simulator.workload import DTYPE_BYTES, DTYPES, ROLES, dtype_code

_GEMM = ("m", "n", "k")
_ATTENTION = ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim")

# fmt: off
OPERATORS: Mapping[str, tuple[str, ...]] = {
    "gemm": _GEMM,  # y[m,n] = x[m,k] w[n,k]^T
    "gemm_2to4": _GEMM,  # the same with 2:4 sparse weights on sparse tensor cores
    "low_rank": (*_GEMM, "rank"),  # two GEMMs through rank `rank`: k -> rank -> n
    "gather_gemm": (*_GEMM, "rows"),  # `rows` of m tokens gathered, multiplied, put back in their places
    # each of m tokens by a `density` share of the groups of `block` output (role `up`) or input features (role `down`)
    "grouped_gemm": (*_GEMM, "block"),
    "attention_prefill": _ATTENTION,  # causal attention of q_len new queries over kv_len positions
    "attention_decode": _ATTENTION,  # attention of one query a sequence over a cache of kv_len positions
    "attention_block_sparse": (*_ATTENTION, "block"),  # causal, with a `density` share of its blocks of edge `block`
    "elementwise": ("m", "n"),  # the operator named by `role` on m tokens of n features
    "copy": ("n",),  # n bytes copied within memory
    "launch_eager": (),  # a kernel too small to take time, one by one: host time a launch (role `gemm`: a tiny GEMM)
    "launch_graph": (),  # the same inside a recorded graph: the gap between kernels
    "layer_eager": ("kv_len",),  # a tiny decoder layer as Transformers runs it, for one token: host time of a layer
}
"""Kinds of operators, and the dimensions each must have."""

# fmt: on
HOST_KINDS = ("launch_eager", "layer_eager")
"""Those that time the host rather than a kernel."""
LAYER_LAUNCHES = 42
"""Kernels that a ``layer_eager`` launches: two norms of 8, q, k, v, the rotation of two by 5, two cache updates, two
repeats of KV heads, attention, o, gate, up, silu, product, down, two residual sums."""
NORMS = ("attention_norm", "mlp_norm", "post_norm", "final_norm", "qk_norm")
_OTHERS = ("activation", "residual", "rotary", "embedding", "gather", "scatter", "cache_write", "select")
ELEMENTWISE_ROLES = NORMS + _OTHERS
"""Roles an ``elementwise`` operator may have."""
INDEX_BYTES = 4.0  # of a chosen index, as the families' selections count it


class Unsupported(ValueError):
    """The device cannot run this operator; the message says which and why."""


class OutOfMemory(RuntimeError):
    """The operator does not fit into the device's memory; others may."""


class DeviceLost(RuntimeError):
    """The device no longer answers; nothing after this can be measured."""


def unknown_device(name: str) -> InputError:
    """The error for a name that no device is opened by."""
    return unknown("device", name, ("cpu", "cuda", "cuda:0", "host", "replay:FILE"))


def elementwise_bytes(role: str, m: int, n: int, element_bytes: float) -> tuple[float, float]:
    """Bytes an elementwise operator on m tokens of n features reads and writes; ``select`` keeps half of their indices.

    >>> elementwise_bytes("residual", 2, 8, 2.0), elementwise_bytes("select", 2, 8, 2.0)
    ((64.0, 32.0), (32.0, 32.0))
    """
    moved = element_bytes * m * n
    if role == "select":
        return moved, INDEX_BYTES * m * selected(n)
    return moved * {"activation": 2.0, "residual": 2.0}.get(role, 1.0), moved


def selected(n: int) -> int:
    """Features that the operator ``select`` chooses."""
    return max(n // 2, 1)


@dataclass(frozen=True)
class Operator:
    """One thing to time. Which fields matter depends on ``kind``; the others stay at their defaults.

    >>> Operator("gemm", m=1, n=64, k=32).key
    'gemm bf16 cold m=1 n=64 k=32'
    >>> Operator("gemm", m=1, n=64, k=32).bytes
    4288.0
    """

    kind: str  # one of OPERATORS
    dtype: str = "bf16"  # one of simulator.workload.DTYPES
    m: int = 0  # GEMMs, elementwise: tokens
    n: int = 0  # GEMMs: output features; elementwise: features; copy: bytes
    k: int = 0  # GEMMs: input features
    rank: int = 0  # low-rank pairs: width between the two factors
    rows: int = 0  # gathered GEMMs: how many of the m tokens are computed
    batch: int = 0  # attention: sequences
    q_len: int = 0  # attention: new queries a sequence
    kv_len: int = 0  # attention: positions a sequence
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    block: int = 0  # block-sparse attention: edge of a block; grouped GEMMs: width of a group
    density: float = 1.0  # block-sparse attention: share of the causal blocks computed; grouped GEMMs: of the groups
    role: str = ""  # elementwise: one of ELEMENTWISE_ROLES; grouped GEMMs: up or down
    cold: bool = True  # weights (attention: cache; elementwise: input) come from memory rather than from a cache

    def __post_init__(self) -> None:
        if self.kind not in OPERATORS:
            raise ValueError(f"operator kind {self.kind!r} is unknown; expected one of {', '.join(OPERATORS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"operator dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
        if self.kind == "elementwise" and self.role not in ELEMENTWISE_ROLES:
            expected = ", ".join(ELEMENTWISE_ROLES)
            raise ValueError(f"elementwise role {self.role!r} is unknown; expected one of {expected}")
        if self.role and self.role != "gemm" and self.role not in ROLES:
            raise ValueError(f"operator role {self.role!r} is unknown")
        for name in OPERATORS[self.kind]:
            if getattr(self, name) < 1:
                raise ValueError(f"operator {self.kind}: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"operator density must lie in (0, 1], got {self.density}")
        if self.attention and self.heads % self.kv_heads:
            raise ValueError(f"operator {self.kind}: {self.heads} heads are no multiple of {self.kv_heads} kv_heads")
        if self.attention and self.q_len > self.kv_len:
            raise ValueError(f"operator {self.kind}: q_len {self.q_len} exceeds kv_len {self.kv_len}")
        if self.kind == "gather_gemm" and self.rows > self.m:
            raise ValueError(f"operator gather_gemm: {self.rows} rows of {self.m} tokens")
        if self.kind == "grouped_gemm":
            if self.role not in ("up", "down"):
                raise ValueError(f"operator grouped_gemm: role must be up or down, got {self.role!r}")
            if self.grouped % self.block:
                raise ValueError(f"operator grouped_gemm: {self.grouped} features in groups of {self.block}")

    @property
    def attention(self) -> bool:
        """Whether it is one of the kinds of attention."""
        return self.kind.startswith("attention")

    @property
    def grouped(self) -> int:
        """Features of a grouped GEMM that lie in groups: output features of role up, input features of role down."""
        return self.n if self.role == "up" else self.k

    @property
    def key(self) -> str:
        """Text that names the operator: equal operators, equal keys."""
        shape = {f.name: getattr(self, f.name) for f in fields(self)[2:-1] if getattr(self, f.name) != f.default}
        temperature = "cold" if self.cold else "hot"
        return " ".join([self.kind, self.dtype, temperature, *(f"{name}={value}" for name, value in shape.items())])

    @property
    def launches(self) -> int:
        """Kernels that the host launches for it, where it is the host that is timed."""
        return LAYER_LAUNCHES if self.kind == "layer_eager" else 1

    @property
    def group(self) -> tuple[int, int]:
        """(n, k) of a GEMM: shapes of one group are held out together, because they share a weight matrix."""
        return self.n, self.k

    @property
    def element_bytes(self) -> float:
        """Size of one element in its number format."""
        return float(DTYPE_BYTES[dtype_code(self.dtype)])

    @property
    def flops(self) -> float:
        """Multiply-adds counted twice: of causal attention those under the mask, of 2:4 the dense product's."""
        if self.kind == "low_rank":
            return 2.0 * self.m * self.rank * (self.n + self.k)
        if self.kind == "gather_gemm":
            return 2.0 * self.rows * self.n * self.k
        if self.kind == "grouped_gemm":
            return 2.0 * self.m * self.n * self.k * self.density
        if self.kind.startswith("gemm"):
            return 2.0 * self.m * self.n * self.k
        if self.attention:
            pairs = self.q_len * (self.kv_len - (self.q_len - 1) / 2.0)
            return 4.0 * self.batch * self.heads * self.head_dim * pairs * self.density
        return 0.0

    @property
    def weight_elements(self) -> int:
        """Elements of the operand that is rotated when the operator runs cold."""
        if self.kind == "low_rank":
            return self.rank * (self.n + self.k)
        if self.kind in ("gemm", "gemm_2to4", "gather_gemm", "grouped_gemm"):
            return self.n * self.k
        if self.attention:
            return 2 * self.batch * self.kv_heads * self.kv_len * self.head_dim
        return self.m * self.n if self.kind == "elementwise" else 0

    @property
    def bytes(self) -> float:
        """Bytes that must at least be moved: operands read once, results written once."""
        size = self.element_bytes
        weight = size * self.weight_elements
        if self.kind == "copy":
            return 2.0 * self.n
        if self.kind == "elementwise":
            return float(sum(elementwise_bytes(self.role, self.m, self.n, size)))
        if self.kind == "low_rank":
            return weight + size * self.m * (self.k + 2 * self.rank + self.n)
        if self.kind == "gather_gemm":
            return weight + size * self.rows * (3 * self.k + 3 * self.n)
        if self.kind == "grouped_gemm":  # at least one token's groups
            return self.density * weight + size * self.m * (self.n + self.k - (1.0 - self.density) * self.grouped)
        if self.kind == "gemm_2to4":
            return weight * 0.5 + self.n * self.k / 8.0 + size * self.m * (self.k + self.n)
        if self.kind == "gemm":
            return weight + size * self.m * (self.k + self.n)
        if self.attention:
            return weight * self.density + 2.0 * size * self.batch * self.heads * self.q_len * self.head_dim
        return 0.0

    @property
    def footprint_bytes(self) -> float:
        """Memory the operands and results of one launch occupy."""
        if self.kind == "gather_gemm":
            return self.element_bytes * (self.n * self.k + (self.m + self.rows) * (self.n + self.k))
        if self.kind == "elementwise":
            return 4.0 * self.element_bytes * self.m * self.n
        return max(self.bytes, self.element_bytes * self.weight_elements)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Operator:
        """The inverse of ``vars``; names that are no field are refused."""
        known = {f.name for f in fields(cls)}
        if extra := sorted(set(record) - known):
            raise ValueError(f"operator record has unknown fields {extra}; expected some of {sorted(known)}")
        return cls(**record)


@dataclass(frozen=True)
class Description:
    """What was measured, and with which software: a profile names both, because the same silicon differs by 5-15 %
    between stacks."""

    name: str  # the name the device was opened by (cpu, cuda:0)
    device: str  # the hardware as it names itself
    stack: Mapping[str, str] = field(default_factory=dict)  # what changes timings: framework, driver, threads, pinning
    memory_bytes: float = 0.0  # that operands may take
    cache_bytes: float = 0.0  # last-level cache (L2 of a GPU); 0 where unknown

    @property
    def software(self) -> str:
        """The stack on one line."""
        return ", ".join(f"{key} {value}" for key, value in self.stack.items())


class Prepared(Protocol):
    """An operator ready to be launched, with its operands in memory."""

    method: str  # how launches are timed and kept cold, for the record

    def sample(self, loops: int) -> float:
        """Launch ``loops`` times and return seconds per launch."""


class Device(Protocol):
    """A place to run operators. Not safe for use by two threads."""

    name: str

    def describe(self) -> Description:
        """Hardware and software of the device."""

    def dtypes(self) -> tuple[str, ...]:
        """Number formats its GEMMs run in."""

    def refuses(self, operator: Operator) -> str:
        """Why the device cannot run this operator; empty when it can."""

    def prepare(self, operator: Operator) -> Prepared:
        """Operands in place, kernels chosen. Raises Unsupported, OutOfMemory or DeviceLost."""

    def snapshot(self) -> Snapshot:
        """Clocks, power, temperature and throttle reasons now."""

    def clock(self) -> float:
        """Monotonic seconds in which budgets are counted (simulated on a replayed device)."""

    def rest(self, seconds: float) -> None:
        """Do nothing for a while, to let the device cool down."""

    def close(self) -> None:
        """Give operands and settings back."""
