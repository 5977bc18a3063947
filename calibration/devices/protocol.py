"""The interface of a device: it converts an :class:`Operator` to a :class:`Prepared`, whose samples
are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import yaml

from calibration.devices.telemetry import UNKNOWN, Reading, Snapshot
from simulator.codes import DTYPE_BYTES, DTYPES, ROLES, dtype_code
from simulator.errors import InputError, unknown

Sampler = Callable[[int], float]
"""Runs some launches or passes and returns the seconds of each."""

_NAMES: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
OPERATORS = {kind: tuple(sizes) for kind, sizes in _NAMES["operators"].items()}
"""Kinds of operators and their required dimensions."""

# recurrences and convolutions, which Transformers runs without kernels of other packages
RECURRENT = ("short_conv", "state_space", "delta_net")
# attention libraries of engines, named as their software stacks; the first that is installed counts
LIBRARIES = ("vllm", "flashinfer")
HOST_KINDS = ("launch_eager", "layer_eager")  # time the host instead of a kernel
# kernels of a layer_eager: two norms of 8, q, k, v, two rotations of 5, two cache updates, two
# repeats of KV heads, attention, o, gate, up, silu, product, down, two residual sums
LAYER_LAUNCHES = 42
NORMS: Sequence[str] = _NAMES["norms"]
ELEMENTWISE_ROLES = (*NORMS, *_NAMES["others"])
INDEX_BYTES = 4.0  # size of a selected index, as in the pruning families


class Unsupported(ValueError):
    """The device cannot run this operator; the message names the operator and the reason."""


class OutOfMemory(RuntimeError):
    """The operator does not fit in the device's memory; smaller operators may."""


NOT_CAPTURABLE = "not capturable"  # in the reason of an operator that a CUDA graph cannot hold


class DeviceLost(RuntimeError):
    """The device does not respond; nothing else can be measured."""


class CaptureFailed(DeviceLost):
    """A failed capture of a CUDA graph spoiled this process: only a new process can capture
    again."""


def unknown_device(name: str) -> InputError:
    return unknown("device", name, ("cpu", "cuda", "cuda:0", "replay:planted"))


def elementwise_bytes(role: str, m: int, n: int, element_bytes: float) -> tuple[float, float]:
    """Return the bytes read and written on m tokens of n features; ``select`` writes indices of
    half the features."""
    moved = element_bytes * m * n
    if role == "select":
        return moved, INDEX_BYTES * m * selected(n)
    return moved * {"activation": 2.0, "residual": 2.0}.get(role, 1.0), moved


def selected(n: int) -> int:
    return max(n // 2, 1)


@dataclass(frozen=True)
class Operator:
    """An operator to time. ``kind`` determines the relevant fields; the others keep their
    defaults."""

    kind: str  # one of OPERATORS
    dtype: str = "bf16"  # one of simulator.codes.DTYPES
    m: int = 0  # GEMMs, elementwise, recurrences: tokens
    n: int = 0  # GEMMs: output features; elementwise: features; copy: bytes
    k: int = 0  # GEMMs: input features; indexer: selected positions
    rank: int = 0  # low-rank pairs: width between the two factors
    rows: int = 0  # gathered GEMMs: computed tokens
    batch: int = 0  # attention: sequences
    q_len: int = 0  # attention: new queries per sequence
    kv_len: int = 0  # attention: positions per sequence
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    window: int = 0  # positions of a convolution
    block: int = 0  # block-sparse attention: edge of a block; grouped GEMMs: width of a group
    # computed share of the causal blocks (block-sparse attention) or groups (grouped GEMMs)
    density: float = 1.0
    role: str = ""  # elementwise: one of ELEMENTWISE_ROLES; grouped GEMMs: up or down
    library: str = ""  # attention: one of LIBRARIES; "" for that of the device
    # weights (attention: keys and values; elementwise: input) come from memory, not from a cache
    cold: bool = True

    def __post_init__(self) -> None:
        roles = {"elementwise": ELEMENTWISE_ROLES, "grouped_gemm": ("up", "down")}.get(
            self.kind, ("", "gemm", *ROLES)
        )
        for name, known in (("kind", OPERATORS), ("dtype", DTYPES), ("role", roles)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"operator {name}: expected one of {', '.join(filter(None, known))}, got"
                    f" {value!r}"
                )
        for name in OPERATORS[self.kind]:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"operator {self.kind}: {name}: expected at least 1, got {getattr(self, name)}"
                )
        if not 0 < self.density <= 1:
            raise ValueError(f"operator density: expected a share in (0, 1], got {self.density}")
        grouped = self.attention or self.kind in RECURRENT
        if grouped and self.heads % max(self.kv_heads, 1):
            raise ValueError(
                f"operator {self.kind}: heads: expected a multiple of {self.kv_heads}, got"
                f" {self.heads}"
            )
        if self.q_len > self.kv_len and self.kind != "layer_eager":
            raise ValueError(
                f"operator {self.kind}: q_len {self.q_len} exceeds kv_len {self.kv_len}"
            )
        if self.kind == "gather_gemm" and self.rows > self.m:
            raise ValueError(
                f"operator gather_gemm: rows: expected at most {self.m}, the tokens, got"
                f" {self.rows}"
            )
        if self.kind == "grouped_gemm" and self.grouped % self.block:
            raise ValueError(
                f"operator grouped_gemm: block: {self.block} does not divide {self.grouped}"
                " features"
            )

    @property
    def attention(self) -> bool:
        return self.kind.startswith("attention")

    @property
    def grouped(self) -> int:
        """Features of a grouped GEMM that form groups: output features for role up, input features
        for role down."""
        return self.n if self.role == "up" else self.k

    @property
    def key(self) -> str:
        held = vars(self)
        temperature = "cold" if self.cold else "hot"
        shape = [f"{name}={held[name]}" for name, default in _SHAPE if held[name] != default]
        return " ".join([self.kind, self.dtype, temperature, *shape])

    @property
    def launches(self) -> int:
        return LAYER_LAUNCHES if self.kind == "layer_eager" else 1

    @property
    def group(self) -> tuple[int, int]:
        """(n, k) of a GEMM; shapes of one group are held out together, because they share a weight
        matrix."""
        return self.n, self.k

    @property
    def element_bytes(self) -> float:
        return float(DTYPE_BYTES[dtype_code(self.dtype)])

    @property
    def flops(self) -> float:
        """FLOPs, two per multiply-add; causal attention counts pairs within the mask, 2:4 the dense
        product."""
        if self.kind == "low_rank":
            return 2.0 * self.m * self.rank * (self.n + self.k)
        if self.kind == "gather_gemm":
            return 2.0 * self.rows * self.n * self.k
        if self.kind in ("gemm", "gemm_2to4", "grouped_gemm"):
            return 2.0 * self.m * self.n * self.k * self.density
        # indexers have one product per pair of a query and a key, attention has two
        products = 1.0 if self.kind == "indexer" else 2.0
        if self.attention or self.kind == "indexer":
            pairs = self.q_len * (self.kv_len - (self.q_len - 1) / 2.0)
            return 2.0 * products * self.batch * self.heads * self.head_dim * pairs * self.density
        if self.kind in RECURRENT:
            return 6.0 * self.m * self.states
        return 0.0

    @property
    def states(self) -> int:
        """Elements of the state of a sequence: keys by values."""
        return self.heads * self.head_dim * self.n

    @property
    def prompt(self) -> bool:
        """Whether each sequence of a recurrence has several tokens."""
        return self.m > self.batch

    @property
    def weight_bytes(self) -> float:
        """Bytes of the operand that a cold operator rotates: weights, or keys and values."""
        if self.kind == "low_rank":
            return self.element_bytes * self.rank * (self.n + self.k)
        if self.attention:
            return self.element_bytes * 2 * self.batch * self.kv_heads * self.kv_len * self.head_dim
        if self.kind == "indexer":
            return self.element_bytes * self.batch * self.kv_len * self.head_dim
        return self.element_bytes * self.n * self.k  # k of other operators is 0

    @property
    def bytes(self) -> float:
        """Minimum bytes moved: operands read once, results written once."""
        size = self.element_bytes
        weight = self.weight_bytes
        if self.kind == "copy":
            return 2.0 * self.n
        if self.kind in RECURRENT:
            features = 2.0 * (self.heads or 1) * self.n + 2.0 * self.kv_heads * self.head_dim
            return size * (self.m * features + 2.0 * self.batch * self.states)
        if self.kind == "elementwise":
            return float(sum(elementwise_bytes(self.role, self.m, self.n, size)))
        if self.kind == "low_rank":
            return weight + size * self.m * (self.k + 2 * self.rank + self.n)
        if self.kind == "gather_gemm":
            return weight + size * self.rows * (3 * self.k + 3 * self.n)
        if self.kind == "gemm_2to4":
            return weight * 0.5 + self.n * self.k / 8.0 + size * self.m * (self.k + self.n)
        if self.kind in ("gemm", "grouped_gemm"):  # at least the groups of one token
            idle = (1.0 - self.density) * self.grouped
            return self.density * weight + size * self.m * (self.n + self.k - idle)
        if self.attention:
            return (
                weight * self.density
                + 2.0 * size * self.batch * self.heads * self.q_len * self.head_dim
            )
        if self.kind == "indexer":
            query = size * self.heads * self.head_dim + INDEX_BYTES * min(self.k, self.kv_len)
            return weight + self.batch * self.q_len * query
        return 0.0

    @property
    def footprint_bytes(self) -> float:
        if self.kind == "gather_gemm":
            return self.element_bytes * (self.n * self.k + (self.m + self.rows) * (self.n + self.k))
        if self.kind == "elementwise":
            return 4.0 * self.element_bytes * self.m * self.n
        if self.kind == "indexer":  # scores of all heads at a time for some queries, and their sums
            heads = self.heads if self.q_len == 1 else 1
            return self.bytes + 8.0 * self.batch * heads * self.q_len * self.kv_len
        return max(self.bytes, self.weight_bytes)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Operator:
        """Return an operator from ``vars`` of one; ValueError for unknown fields."""
        known = {f.name for f in fields(cls)}
        if extra := sorted(set(record) - known):
            raise ValueError(
                f"operator record has unknown fields {extra}; expected some of {sorted(known)}"
            )
        return cls(**record)


# made once, since a plan makes 100,000 keys
_SHAPE = tuple((f.name, f.default) for f in fields(Operator)[2:-1])


@dataclass(frozen=True)
class Gpu:
    sm_count: int
    capability: tuple[int, int]  # compute capability
    memory_bytes: float  # whole memory
    mig: bool = False  # a slice of a GPU (MIG)
    max_clock_hz: Reading = UNKNOWN  # highest SM clock
    power_limit_w: Reading = UNKNOWN


@dataclass(frozen=True)
class Description:
    """Hardware and software of a device; times of the same hardware differ by 5-15 % between
    stacks."""

    name: str  # name of the opened device (cpu, cuda:0)
    device: str  # the name that the hardware reports
    # framework, driver, threads, pinning: they change times
    stack: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: float = 0.0  # limit for operands
    cache_bytes: float = 0.0  # last-level cache (L2 of a GPU); 0: unknown
    gpu: Gpu | None = None

    @property
    def software(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.stack.items())


class Prepared(Protocol):
    method: str  # for the record: how launches are timed and kept cold

    def sample(self, loops: int) -> float: ...  # s per launch of several


class Device(Protocol):
    """Hardware that runs operators. Not thread-safe."""

    name: str

    def describe(self) -> Description: ...
    def dtypes(self) -> tuple[str, ...]: ...  # number formats of its GEMMs

    # the reason why it cannot run an operator, or ""
    def refuses(self, operator: Operator) -> str: ...

    # may raise Unsupported, OutOfMemory or DeviceLost
    def prepare(self, operator: Operator) -> Prepared: ...

    # under load since the last call, if it reads while launches run; else now
    def snapshot(self) -> Snapshot: ...
    def energy_j(self) -> Reading: ...  # growing counter, J

    # monotonic seconds, the time of budgets (simulated on the planted device)
    def clock(self) -> float: ...
    def rest(self, seconds: float) -> None: ...  # cools down
    def close(self) -> None: ...  # frees operands and restores settings
