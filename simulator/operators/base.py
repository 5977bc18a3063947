"""The parts of an operator: sizes, work, constants, residual, time and errors. Each operator has a
file of its own.

An operator is a subclass of :class:`Operator` and an entry of
:data:`simulator.operators.OPERATORS`. Its cost model is a subclass of :class:`Calls`: equal-length
arrays of sizes with the datasheet facts they need. Its method :meth:`Calls.estimate` turns
constants into an :class:`Estimate`, from which prediction intervals, fits and held-out errors
follow. docs/adding.md adds an operator as an example.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import Array, BoolArray, CodeArray, FloatArray, IndexArray
from simulator.codes import DTYPE_BYTES, DTYPES, Kind, formats_of, label_of
from simulator.errors import InputError

OTHER_STACK = 1.25
ENGINE_STACK = 1.0
SAME_STACK = 0.5
"""Scale of the prior of systematic errors: for a section fitted on another stack than the user's
(evaluated on held-out stacks and labs), on another version of the stack that the engine runs, and
on the user's own stack."""

BOTTLENECKS = ("compute", "memory", "l2", "latency", "launch", "host", "link")
"""Parts of an operator's time, of which the largest is its bottleneck; arrays hold the index."""

Values = Mapping[str, float]
"""Numbers by name, such as the values of constants."""

RowValues = Mapping[str, Any]
"""Numbers by name, each for all rows or an array of one per row."""

ELEMENT_BYTES: Values = dict(zip(DTYPES, DTYPE_BYTES.tolist(), strict=True))
"""Bytes of one element by number format."""


def largest_part(parts: RowValues, shape: tuple[int, ...]) -> CodeArray:
    """Return the code of each operator's bottleneck; ``parts`` maps bottlenecks to times."""
    times = np.empty((len(parts), *shape))
    for i, part in enumerate(parts.values()):
        times[i] = part
    codes = np.array([BOTTLENECKS.index(name) for name in parts], dtype=np.int8)
    return np.asarray(codes[times.argmax(axis=0)])


def element_bytes(dtype: str, what: str = "dtype") -> float:
    if dtype not in ELEMENT_BYTES:
        raise InputError(f"{what} {dtype!r} is unknown; expected one of {', '.join(ELEMENT_BYTES)}")
    return ELEMENT_BYTES[dtype]


@dataclass(frozen=True)
class Rate:
    flop_per_s: float  # dense, from the datasheet, at boost clock
    accumulate: str  # number format of the sums
    sparse_factor: float = 1.0  # rate of 2:4 sparse operands over the dense rate


@dataclass(frozen=True)
class Link:
    kind: str  # nvlink4, pcie5, xgmi
    bandwidth_bytes_per_s: float  # in one direction
    latency_s: float  # time of one message step
    max_devices: int
    connection: str = ""  # one of CONNECTIONS; "": the usual one of the kind
    beyond: Link | None = None  # connects more devices than max_devices
    # neighbours in a ring that share one port of this link, because another link joins them
    group: int = 1
    stated: bool = False  # the user named the connection

    def __post_init__(self) -> None:
        if not self.connection:
            usual = {"nvlink": "nvswitch", "xgmi": "xgmi"}.get(
                self.kind.rstrip("0123456789").lower(), "pcie"
            )
            object.__setattr__(self, "connection", usual)

    @property
    def family(self) -> str:
        """ "pcie", or "nvlink" for links on which all devices see each other's memory."""
        return "pcie" if self.connection.startswith("pcie") else "nvlink"

    @property
    def defaults(self) -> str:
        """Kind of link whose default constants of collectives apply."""
        if self.connection == "pcie-host":
            return "pcie_host"
        return (
            self.kind
            if self.kind in ("pcie3", "pcie4", "nvlink3", "nvlink4", "nvlink5")
            else self.family
        )

    @property
    def most_devices(self) -> int:
        """Largest number of devices, :attr:`beyond` included."""
        return self.beyond.most_devices if self.beyond else self.max_devices

    def between(self, devices: int) -> Link:
        """Return the link that bounds a collective: this one, or :attr:`beyond` for more devices
        than it joins."""
        return self.beyond if self.beyond and devices > self.max_devices else self

    @property
    def name(self) -> str:
        """Name that is unambiguous on every GPU: with the generation of PCIe."""
        return (
            self.connection.replace("pcie", self.kind) if self.family == "pcie" else self.connection
        )

    @property
    def text(self) -> str:
        if self.connection == "bridge" and self.beyond:
            return f"{self.kind} bridges between pairs, {self.beyond.kind} beyond"
        return {
            "nvswitch": f"{self.kind} between all devices",
            "xgmi": f"{self.kind} to each other device",
            "pcie": f"{self.kind} with peer access",
            "pcie-host": f"{self.kind} through host memory (no peer access)",
        }.get(self.connection, self.kind)


class FittedValues(Protocol):
    """Fitted values of one operator and number format, as
    :class:`simulator.hardware.profile.Section` has them."""

    @property
    def constants(self) -> RowValues: ...
    @property
    def arrays(self) -> Mapping[str, Array]: ...
    @property
    def status(self) -> str: ...
    @property
    def stack(self) -> str: ...
    @property
    def provenance(self) -> Any: ...
    @property
    def section_scale(self) -> float: ...
    def __getitem__(self, name: str) -> float: ...


class Device(Protocol):
    """Facts of a device, as :class:`simulator.hardware.profile.HardwareProfile` has them."""

    @property
    def name(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def rates(self) -> Mapping[str, Rate]: ...
    @property
    def sm_count(self) -> int: ...
    @property
    def bandwidth_bytes_per_s(self) -> float: ...
    @property
    def l2_bytes(self) -> float: ...
    @property
    def power_w(self) -> float: ...
    @property
    def clock_headroom(self) -> float: ...
    @property
    def link(self) -> Link | None: ...
    @property
    def bridge(self) -> Link | None: ...
    @property
    def own_link(self) -> bool: ...
    @property
    def engine_stack(self) -> str: ...
    @property
    def tall_tiles(self) -> tuple[float, ...]: ...
    @property
    def sections(self) -> Mapping[tuple[str, str], FittedValues]: ...
    def rate(self, dtype: str) -> Rate: ...
    def peak_flop_per_s(self, dtype: str) -> float: ...
    def section(self, operator: str, dtype: str) -> FittedValues: ...
    def error_scales(self, section: FittedValues) -> tuple[float, float]: ...
    def over(self, link: str) -> Device: ...
    @property
    def beyond(self) -> Device: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Machine:
    """Datasheet facts of one arithmetic on one device, SI."""

    peak_flop_per_s: float
    bandwidth_bytes_per_s: float
    l2_bytes: float
    sm_count: int
    headroom: float  # highest clock over boost clock
    element_bytes: float  # bytes of an activation
    # bytes of a stored weight with its indices; in attention, of a cached element
    weight_bytes: float
    persistent: bool  # thread blocks stay on their SM and compute several tiles
    # a CPU: no tiles and waves, weights rearranged from `pack_m` rows on, nothing overlaps
    packs: bool = False
    least_rows: float = 1.0  # rows of the smallest tile that is used
    ragged: bool = False  # skipped tiles end at once, so SMs do not run in waves
    # a 2:4 kernel with one plan for all shapes: a block walks the whole k of its tile
    serial: bool = False
    # a weight-only kernel: all SMs have an equal share of the main-loop steps of all tiles
    striped: bool = False

    @classmethod
    def of(cls, hw: Device, label: str = "bf16") -> Machine:
        """Return the facts for a section's number format; InputError for arithmetic that the device
        lacks."""
        dtype, weight = formats_of(label, hw.rates)
        return cls(
            peak_flop_per_s=hw.rate(dtype).flop_per_s,
            bandwidth_bytes_per_s=float(hw.bandwidth_bytes_per_s),
            l2_bytes=float(hw.l2_bytes),
            sm_count=int(hw.sm_count),
            headroom=max(1.0, float(hw.clock_headroom)),
            element_bytes=ELEMENT_BYTES[dtype],
            weight_bytes=ELEMENT_BYTES[weight],
            persistent=hw.architecture in ("hopper", "blackwell_sm100"),
            packs=hw.architecture == "cpu",
        )


def from_l2(footprint_bytes: FloatArray, machine: Machine, c: Values) -> FloatArray:
    """Return the time to move bytes over the time from DRAM. L2 holds a share 1 / (1 + (bytes /
    (l2_share L2))^8). The power is fixed: the error of L40S decode is 16.3, 14.0, 13.2 % with
    powers 4, 8, 16."""
    ratio = footprint_bytes / (c["l2_share"] * machine.l2_bytes)
    for _ in range(3):  # to the eighth power
        ratio = ratio * ratio
    return np.asarray(1.0 - (1.0 - 1.0 / c["l2_gain"]) / (1.0 + ratio))


class MeasuredOperators(NamedTuple):
    """Operators of a measured shape; their measured time replaces the prediction."""

    rows: BoolArray  # (n,) mask of these operators
    seconds: FloatArray  # times of these operators
    log_half: FloatArray  # log half-widths of the 90 % intervals of the times


@dataclass(frozen=True)
class Estimate:
    """The cost of n operators, arrays of one shape; times are in units of ``unit_s`` seconds."""

    operator: str  # prefix of its error factors
    kind: int  # code of `simulator.codes.Kind`: errors are correlated within one kind
    time: Array  # analytical time times the residual's factor
    floor: Any  # least time that physics allows
    roofline: Array  # max(FLOP / datasheet peak, bytes / datasheet bandwidth)
    bottleneck: Array  # int8: index into BOTTLENECKS
    # error factor -> loading: derivative of the log of the time by the log of the part that the
    # factor changes
    loadings: RowValues
    coordinates: Array  # (n, 3) log2 of sizes, octaves; errors at close coordinates are similar
    position: tuple[Any, ...] = ()  # the same sizes as axes of the residual grid
    section: FittedValues | None = None  # section of the profile that was used
    # further shares of the time that add independent error
    noise: RowValues = field(default_factory=dict)
    outside: Any = None  # octaves outside the sizes that the fit saw
    # share of the time in a kernel that may differ entirely from the fitted kernel
    unlike: Any = None
    # share of the time of products whose last tiles are nearly empty
    edge: Any = None
    # blocks of an operator over the blocks that the SMs run at once; GEMMs have it only if
    # `details` are requested
    waves: Any = None
    active: Any = None  # 0 where nothing runs: such a time has no error
    measured: MeasuredOperators | None = None
    unit_s: float = 1.0
    # choices of the model, seconds and counts
    details: Mapping[str, Array] = field(default_factory=dict)

    def with_residual(self, log_factor: Any, section: FittedValues) -> Estimate:
        """Return the estimate with the residual of a section; ``log_factor`` is None for a section
        without residual."""
        time = self.time if log_factor is None else self.time * np.exp(log_factor)
        return Estimate(**{**vars(self), "time": time, "section": section})

    def on_grid(self, residual: ResidualGrid | None, section: FittedValues) -> Estimate:
        """Return the estimate with the residual grid of a section."""
        return self.with_residual(None if residual is None else residual(self.position), section)


Estimates = Iterator[tuple[Any, Estimate]]
"""Some rows of a workload, and their cost."""


S = TypeVar("S", bound="Sizes")


@dataclass(frozen=True)
class Sizes:
    """Sizes of n operators; arrays have a value per operator, other fields apply to all."""

    def take(self: S, rows: Any) -> S:
        taken: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Sizes):
                taken[f.name] = value.take(rows)
            elif isinstance(value, np.ndarray) and value.ndim:
                taken[f.name] = value[rows]
        return replace(self, **taken)


@dataclass(frozen=True)
class Calls(Sizes, ABC):
    """A cost model: n operators of one kind on one device."""

    @property
    @abstractmethod
    def operator(self) -> str:
        """Section of a profile that stores the constants."""

    @abstractmethod
    def estimate(self, c: RowValues) -> Estimate:
        """Return the cost by the analytical model, without residual, from constants by name."""

    def seconds(self, c: RowValues) -> FloatArray:
        """Return the analytical time alone, s; a fit evaluates it many times."""
        e = self.estimate(c)
        return e.time * e.unit_s


def chained(
    calls: Calls,
    machine: Machine,
    parts: RowValues,
    least: tuple[Any, Any],
    position: tuple[Array, ...],
    overlaps: bool = True,
) -> Estimate:
    """Return the cost of an operator from the parts of its time, s: arithmetic and bytes, which
    overlap in part or run one after the other; a chain of steps (latency); and launches. ``least``
    are the times of bytes and of FLOPs at the datasheet's rates."""
    compute, memory = parts.get("compute", 0.0), parts["memory"]
    work = np.hypot(compute, memory) if overlaps else compute + memory
    total = np.asarray(parts["launch"] + parts.get("latency", 0.0) + work)
    loadings = {}
    for name, part in parts.items():
        share = part / np.maximum(work, 1e-30)
        both = work * (share * share if overlaps else share)
        loadings[name] = (both if name in ("compute", "memory") else part) / total
    bytes_s, flops_s = least
    return Estimate(
        operator=calls.operator,
        kind=int(Kind[calls.operator.upper()]),
        time=total,
        floor=np.maximum(bytes_s, flops_s / machine.headroom),
        roofline=np.maximum(bytes_s, flops_s),
        bottleneck=largest_part(parts, total.shape),
        loadings=loadings,
        coordinates=np.stack([np.ravel(x) for x in position], axis=1),
        position=position,
    )


@dataclass(frozen=True)
class Recurrent(Calls):
    """Operators that keep a state of each sequence: one token per sequence is a decode step, more
    are a prompt."""

    machine: Machine  # weight_bytes: of an element of the state
    tokens: FloatArray  # tokens of all sequences
    batch: FloatArray  # sequences

    @property
    def sequences(self) -> FloatArray:
        """Sequences that are computed; a dynamic method may skip some."""
        return np.minimum(self.batch, self.tokens)

    @property
    def each(self) -> FloatArray:
        """Tokens per sequence."""
        return self.tokens / self.sequences

    def cost(
        self,
        c: RowValues,
        work: tuple[Any, Any],
        chunks: Any,
        least: tuple[Any, Any],
        position: tuple[Array, ...],
    ) -> Estimate:
        """Return the cost of ``work``, the times of arithmetic and bytes, s; the chain of chunks of
        a prompt and the fixed time are added. ``least`` and ``position`` are those of
        :func:`chained`."""
        step = self.each <= 1.0
        parts = {
            "compute": work[0],
            "memory": work[1],
            "latency": np.where(step, 0.0, c["chunk_s"] * chunks),
            "launch": np.where(step, c["t0_s"], c["prompt_s"]),
        }
        return chained(self, self.machine, parts, least, position, not self.machine.packs)


def octaves_outside(coordinates: Array, section: FittedValues | None) -> Any:
    """Return the octaves (n,) by which coordinates (n, 3) lie outside the sizes of a section's fit,
    summed over the axes; None for a section without these sizes."""
    if section is None or "measured" not in section.arrays:
        return None
    low, high = np.asarray(section.arrays["measured"], dtype=coordinates.dtype)
    below, above = low - coordinates, coordinates - high
    return (np.maximum(below, 0.0) + np.maximum(above, 0.0)).sum(axis=1)


@dataclass(frozen=True)
class ResidualGrid:
    """Log(measured / analytical) at the nodes of a regular grid over coordinates: linear between
    nodes, constant beyond the edges. The precision of the values, float32 or float64, is that of
    the evaluation."""

    start: tuple[float, ...]  # first node of each coordinate
    step: tuple[float, ...]  # from one node to the next
    values: Array  # one axis per coordinate
    inset: float = 0.0  # steps before the last node at which a coordinate stops

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> ResidualGrid | None:
        """Return the grid of a section ("start", "step", "values"; axes from the last to the
        first); None without."""
        if "values" not in arrays:
            return None
        start, step = (tuple(map(float, arrays[name][::-1])) for name in ("start", "step"))
        return cls(start, step, np.ascontiguousarray(arrays["values"].T, dtype=np.float64))

    def arrays(self) -> dict[str, Array]:
        start = np.array(self.start[::-1])
        step = np.array(self.step[::-1])
        return {"start": start, "step": step, "values": np.ascontiguousarray(self.values.T)}

    @cached_property
    def _ends(self) -> tuple[Array, Array, Array, Array]:
        """First node, nodes per unit, last position and last cell, (coordinates, 1) each."""
        nodes = np.array(self.values.shape, dtype=np.float64)
        last = nodes - (1.0 + self.inset)
        last_cell = np.maximum(nodes - 2.0, 0.0)
        columns = np.array(self.start), 1.0 / np.array(self.step), last, last_cell
        start, per_unit, last, last_cell = (c.astype(self.values.dtype)[:, None] for c in columns)
        return start, per_unit, last, last_cell

    @cached_property
    def _places(self) -> tuple[IndexArray, IndexArray]:
        """Strides of the nodes, and distances of the corners of a cell from its first node, in the
        flat values. The second half of the corners is the far side of the first coordinate; beyond
        an edge it is not used."""
        shape = self.values.shape
        strides = np.array([math.prod(shape[i + 1 :]) for i in range(len(shape))])
        return strides, strides @ np.indices((2,) * len(shape)).reshape(len(shape), -1)

    def cells(self, coordinates: Any) -> tuple[NDArray[np.int32], Array]:
        """Return the cell of each point and its position in [0, 1] in the cell, arrays
        (coordinates, points)."""
        start, per_unit, last, last_cell = self._ends
        inside = np.empty((len(start), *np.broadcast(*coordinates).shape), dtype=start.dtype)
        for i, coordinate in enumerate(coordinates):
            inside[i] = coordinate
        inside = inside.reshape(len(start), -1)
        inside -= start
        inside *= per_unit
        np.maximum(inside, 0.0, out=inside)
        np.minimum(inside, last, out=inside)
        cells = np.minimum(inside, last_cell).astype(np.int32)
        inside -= cells
        return cells, inside

    def __call__(self, coordinates: Any) -> Array:
        """Return the values at points; ``coordinates`` has an array per axis."""
        cells, inside = self.cells(coordinates)
        strides, corners = self._places
        found = self.values.take(corners[:, None] + strides @ cells, mode="clip")
        # one coordinate after the other, between the near and the far side of the cell
        for position in inside:
            half = len(found) // 2
            low = found[:half]
            high = found[half:]
            high -= low
            high *= position
            low += high
            found = low
        return np.asarray(found[0].reshape(np.broadcast(*coordinates).shape))


@dataclass(frozen=True)
class RowResidual:
    """Log factors by the number of rows m, linear in log2 m between the measured m: libraries of
    CPUs have separate kernels for some numbers of rows."""

    m: Array  # measured numbers of rows, ascending
    values: Array

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> RowResidual | None:
        if "row_m" not in arrays:
            return None
        return cls(
            np.asarray(arrays["row_m"], dtype=np.float64),
            np.asarray(arrays["row_values"], dtype=np.float64),
        )

    def arrays(self) -> dict[str, Array]:
        return {"row_m": self.m, "row_values": self.values}

    def __call__(self, m: Array) -> Array:
        return np.asarray(np.interp(np.log2(m), np.log2(self.m), self.values)).astype(m.dtype)


class Ready(NamedTuple):
    """Machine and fitted values of an operator with one residual grid."""

    machine: Machine
    section: FittedValues
    constants: Values
    residual: ResidualGrid | None

    def cost(self, calls: Calls) -> Estimate:
        return calls.estimate(self.constants).on_grid(self.residual, self.section)

    def of_sizes(self, calls: Callable[..., Calls], *sizes: Any) -> Estimate:
        """Return the cost of calls of a machine and of sizes, which broadcast."""
        arrays = (np.asarray(size, dtype=np.float64) for size in np.broadcast_arrays(*sizes))
        return self.cost(calls(self.machine, *arrays))


@lru_cache(maxsize=512)
def ready(hw: Device, operator: str, dtype: str, state: str = "") -> Ready:
    """Return the fitted values of an operator; ``state`` is the number format of its state."""
    section = hw.section(operator, dtype)
    machine = Machine.of(hw, dtype)
    if state:
        machine = replace(machine, weight_bytes=element_bytes(state, "state_dtype"))
    constants = {name: section[name] for name in section.constants}
    return Ready(machine, section, constants, ResidualGrid.from_arrays(section.arrays))


@dataclass(frozen=True)
class Constant:
    """One constant of a cost model; its values lie between ``low`` and ``high``."""

    unit: str  # SI, "1" for a ratio
    low: float
    high: float
    meaning: str
    defaults: Values  # by architecture; "*": all others
    source: str

    def default(self, architecture: str) -> float:
        return self.defaults.get(architecture, self.defaults["*"])


Constants = Mapping[str, Constant]


def unfitted(section: FittedValues, constants: Constants, architecture: str) -> tuple[str, ...]:
    """Return the error factors of a section of defaults: "generic" too if neither a GPU of its
    architecture nor another format of the device was fitted."""
    if section.status != "default":
        return ()
    known = any(architecture in constant.defaults for constant in constants.values())
    other_format = any(one.status != "default" for one in section.constants.values())
    return ("default",) if known or other_format else ("default", "generic")


@dataclass(frozen=True)
class ErrorSize:
    """Errors of one operator, log units."""

    correlated: float  # standard deviation that no error factor explains
    independent: float  # least standard deviation
    # share of the time -> added standard deviation
    by_share: Values = field(default_factory=dict)
    # scale of a profile -> scale of this operator
    scales: Mapping[float, float] = field(default_factory=dict)
    # factor on correlated and independent errors, if the engine's own kernels were fitted
    engine_scale: float = 1.0
    # error factor (a loading of the estimate) -> prior standard deviation of the part that it
    # changes
    factors: Values = field(default_factory=dict)
    # number format ("*": others) -> standard deviation between GPUs of one architecture, for
    # kernels that were fitted on another GPU. Each of H100, H200 and H20 was predicted by fits of
    # another: on average, 90 % of the rows are inside
    gpus: Values = field(default_factory=dict)


_SCALES = {"same_stack": SAME_STACK, "engine_stack": ENGINE_STACK}


def read_constants(operator: str) -> tuple[Mapping[str, Constants], Mapping[str, ErrorSize]]:
    """Return the constants of an operator by section of a profile, and the sizes of its errors,
    from its file."""
    path = Path(__file__).with_name(f"{operator}.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    sources = content["sources"]
    constants = {
        section: {
            name: Constant(**{**fields, "source": sources[fields["source"]]})
            for name, fields in rows.items()
        }
        for section, rows in content["constants"].items()
    }
    errors = {}
    for name, sizes in content["errors"].items():
        scales = {_SCALES[stack]: scale for stack, scale in sizes.get("scales", {}).items()}
        errors[name] = ErrorSize(**{**sizes, "scales": scales})
    return constants, errors


RUNTIME_CONSTANTS = read_constants("runtime")[0]["runtime"]
"""Constants of launches, gaps and clocks of a device and its software, section "runtime"."""

_POWER = read_constants("power")
POWER_CONSTANTS, POWER_ERRORS = _POWER[0]["power"], _POWER[1]["power"]
"""Shares of the power limit that a device draws, section "power", and their errors."""


class Formats(NamedTuple):
    """Number formats of some rows, and the choice of 2:4 kernels by their engine."""

    dtype: str  # format of activations and arithmetic
    second: str  # format of weights, cache or state
    # 2:4: whether the library times its plans and takes the fastest for a shape; else all shapes
    # have one plan
    searched: bool = True


class Rows:
    """Some rows of a workload; a column or property of the workload is indexed at its first use."""

    def __init__(self, table: Any, at: Any) -> None:
        self.table = table
        self.at = at

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__[name] = getattr(self.table, name)[self.at]
        return values


def states_moved(w: Rows) -> Any:
    """Return how many states of sequences are moved: a step writes them, a decode step also reads
    them; a dynamic method may skip sequences."""
    return np.minimum(w.m, w.batch) * np.where(w.m <= w.batch, 2.0, 1.0)


class Operator(ABC):
    """An operator. Methods get rows of this operator alone and return a value for one execution of
    each."""

    code: ClassVar[int]  # in the column ``kind`` and in saved profiles
    name: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]]  # columns that are at least 1 in a row that is timed
    # by section of a profile; attention has a second section for latent attention
    constants: ClassVar[Mapping[str, Constants]]
    titles: ClassVar[tuple[str, ...]] = ()  # names of the operators in notes, by section
    errors: ClassVar[Mapping[str, ErrorSize]]  # by ``Estimate.operator``
    weighted: ClassVar[bool] = False  # sections depend on the number format of weights
    owned_in: ClassVar[str] = "weight_dtype"  # column with the number format of the parameters
    cached: ClassVar[bool] = False  # keeps keys, values or states of each sequence

    def flops(self, w: Rows) -> Any:
        """FLOPs, those on zeros included."""
        return 0.0

    def executed_flops(self, w: Rows) -> Any:
        """FLOPs that the device executes, those of empty rows of tiles included."""
        return self.flops(w)

    def bytes(self, w: Rows) -> Any:
        """Minimum bytes: operands are read once, results are written once."""
        return w.read_bytes + w.write_bytes

    def weight_bytes(self, w: Rows) -> Any:
        """Bytes of weights that are read, compressed if the kernel stores no zeros."""
        return 0.0

    def parameter_bytes(self, w: Rows) -> Any:
        """Bytes of the parameters in memory."""
        return w.params * DTYPE_BYTES[getattr(w, self.owned_in)]

    def cache_bytes(self, w: Rows, sequences: Any, positions: Any) -> Any:
        """Bytes in the cache of a layer for some sequences of ``positions``."""
        return 0.0

    def inner_elements(self, w: Rows) -> Any:
        """Elements of activations that exist only inside the operator."""
        return 0.0

    def section(self, w: Rows) -> str:
        """Section of a profile that times the rows."""
        return next(iter(self.constants))

    def label(self, dtype: str, second: str) -> str:
        """Number format of that section."""
        return label_of(dtype, second) if self.weighted else dtype

    @abstractmethod
    def estimates(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        """Yield some of the rows and their cost on a device."""

    def fixed(self, w: Rows, hw: Device, formats: Formats) -> Estimate | FloatArray | float:
        """Time without any work, s; an estimate where measured times of the user's machine correct
        it."""
        return 0.0

    def effects(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        """Yield rows whose kernels have steps of the waterfall between roofline and kernel, in
        ``Estimate.details``."""
        return iter(())

    def idling(self, w: Rows, hw: Device, formats: Formats) -> Estimates:
        """Yield rows whose blocks run in waves, with ``Estimate.waves``."""
        return self.effects(w, hw, formats)


class Cached(Operator):
    """An operator that keeps keys, values or states of each sequence."""

    cached = True

    def fixed(self, w: Rows, hw: Device, formats: Formats) -> float:
        return hw.section(self.section(w), formats.dtype)["t0_s"]
