"""Define predictions: :class:`Result` is one prediction, :class:`Results` are many, as columns.

The fields of :class:`Result` are the keys of ``--json`` and the columns of CSV and Parquet files
and data frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from simulator.arrays import Array, IndexArray
from simulator.display import Displayed, few
from simulator.prediction.prunings import Pruning
from simulator.prediction.tariff import Energy
from simulator.pruning._family import SUFFIXES
from simulator.pruning._titles import method_title
from simulator.request import Request
from simulator.units import percent, ratio, seconds

# columns of results: float64, int64, bool and object (texts) arrays; NaN for None
Columns = Mapping[str, Array]


def texts(names: Sequence[str], index: IndexArray) -> Array:
    """Return the column of the names with some indices."""
    return np.array(names, dtype=object)[index]


@dataclass(frozen=True, repr=False, kw_only=True)
class Result(Displayed):
    """One prediction: the speedup of a pruned model over its dense model.

    Its fields are the keys of ``--json``, CSV, Parquet and ``to_pandas``.

    Parameters
    ----------
    model, hardware, engine : str
        Names.
    family : str
        Pruning family; several are joined by "+".
    sparsity, realised_sparsity : float
        Fraction requested (of an existing pruned model, the share of parameters removed), and after
        rounding.
    phase : str
        Phase of inference: prefill, decode, generate or serve.
    batch, seq : int
        Sequences, and tokens (prefill) or cached positions (decode).
    dtype : str
        Number format of the dense model's activations and arithmetic.
    dense_s, dense_lower, dense_upper : float
        Time of a pass of the dense model, s, with the ends of its interval.
    pruned_s, pruned_lower, pruned_upper : float
        Time of a pass of the pruned model, s, with the ends of its interval.
    speedup, speedup_lower, speedup_upper : float
        ``dense_s / pruned_s``, with the ends of its interval.
    flop_bound, byte_bound, roofline_bound : float
        Ratio of FLOPs, of bytes, and of the operators' datasheet rooflines; all exclude work that
        pruning adds.
    bottleneck : str
        Largest share of the pruned model's time, one of ``BOTTLENECKS``.
    tokens_per_s : float or None
        New tokens/s of the pruned model on all devices together; None in prefill.
    ttft_s, ttft_lower, ttft_upper : float or None
        Time to first token of the pruned model, s, with the ends of its interval; None in decode.
    tpot_s, tpot_lower, tpot_upper : float or None
        Time per further token of the pruned model, s, with the ends of its interval; None in
        prefill.
    dense_tokens_per_s : float or None
        New tokens/s of the dense model.
    dense_ttft_s, dense_ttft_lower, dense_ttft_upper : float or None
        Time to first token of the dense model, s.
    dense_tpot_s, dense_tpot_lower, dense_tpot_upper : float or None
        Time per further token of the dense model, s.
    dense_watts : float
        Mean power of one device during a pass of the dense model, W; host and cooling are excluded.
    dense_joules, dense_joules_lower, dense_joules_upper : float
        Energy of a pass of the dense model on all devices, J, with the ends of its interval.
    pruned_watts : float
        Mean power of one device during a pass of the pruned model, W.
    pruned_joules, pruned_joules_lower, pruned_joules_upper : float
        Energy of a pass of the pruned model on all devices, J, with the ends of its interval.
    energy_saved, energy_saved_lower, energy_saved_upper : float
        Share of the dense model's energy that the pruning saves, with the ends of its interval.
    energy_reason : str
        Part of the energy that makes this share differ from that of the time, one of
        :data:`simulator.prediction.energy.REASONS`.
    pruned : str
        Name of the existing pruned model, else "".
    measured_bound : float or None
        Ratio of measured dense GEMM times at the shapes of both models, if measured.
    efficiency : float
        ``(speedup - 1) / (roofline_bound - 1)``; NaN if the bound is 1 (in ``to_dict`` None).
    bottleneck_share : float
        Share of the bottleneck in the pruned model's time, in (0, 1].
    level : float
        Level of the intervals, in (0, 1).
    calibrated : bool
        Whether operators with default constants take less than 5 % of the time
        (``uncalibrated_share``).
    uncalibrated : str
        Operators without a fitted section, which have default constants, joined by "+".
    uncalibrated_share : float
        Share of these operators in the time of the dense or of the pruned model, the larger share,
        in [0, 1].
    new_tokens : int
        Tokens decoded after the prompt; 0 in prefill and decode.
    cached_prefix : int
        Tokens of each prompt in the prefix cache.
    weight_dtype, kv_dtype : str
        Number formats of the dense model's weights and K/V cache.
    devices : int
        Number of devices.
    parallel : str
        How the model is divided among the devices.
    power_limit : float or None
        Power limit of each device, W; None for that of the datasheet.
    ideal : bool
        Whether the work that pruning adds is excluded.
    dense_memory_bytes, pruned_memory_bytes, capacity_bytes : float
        Memory needed on the fullest device, and the memory of a device that the engine uses
        (:class:`simulator.capacity.DeviceMemory`), bytes.
    dense_fits, pruned_fits : bool
        Whether the memory suffices.
    dense_largest_batch, pruned_largest_batch : int
        Most sequences that fit.
    method : str
        Name of the method, or of several steps with a method of a file, the text with its name in
        place of the file; else "".
    options : str
        Options of the family, as text.
    prune : str
        The pruning as a text of ``--prune`` with the files of methods, or the path of a plan; ""
        for an existing pruned model.
    parts : str
        Share that the pruning removes of layers, heads, widths and experts, after rounding.
    formats : str
        Number formats of an existing pruned model against those of the dense model, if they differ.

    Examples
    --------
    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="prefill")
    >>> pruned = simulator.prune(dense, "depth", 0.25)
    >>> r = simulator.speedup(dense, pruned, simulator.load_hardware("h100"))
    >>> print(repr(r)[:67])
    <Result: llama-3.1-8b on h100_sxm, vllm, prefill, batch 1, seq 2048
    >>> r.bottleneck, bool(r.lower < r.speedup < r.upper)
    ('compute', True)
    """

    model: str
    hardware: str
    engine: str
    family: str
    sparsity: float
    realised_sparsity: float
    phase: str
    batch: int
    seq: int
    dtype: str
    dense_s: float
    dense_lower: float
    dense_upper: float
    pruned_s: float
    pruned_lower: float
    pruned_upper: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    bottleneck: str
    tokens_per_s: float | None
    ttft_s: float | None
    ttft_lower: float | None
    ttft_upper: float | None
    tpot_s: float | None
    tpot_lower: float | None
    tpot_upper: float | None
    dense_tokens_per_s: float | None
    dense_ttft_s: float | None
    dense_ttft_lower: float | None
    dense_ttft_upper: float | None
    dense_tpot_s: float | None
    dense_tpot_lower: float | None
    dense_tpot_upper: float | None
    dense_watts: float
    dense_joules: float
    dense_joules_lower: float
    dense_joules_upper: float
    pruned_watts: float
    pruned_joules: float
    pruned_joules_lower: float
    pruned_joules_upper: float
    energy_saved: float
    energy_saved_lower: float
    energy_saved_upper: float
    energy_reason: str
    pruned: str
    measured_bound: float | None
    efficiency: float
    bottleneck_share: float
    level: float
    calibrated: bool
    uncalibrated: str
    uncalibrated_share: float
    new_tokens: int
    cached_prefix: int
    weight_dtype: str
    kv_dtype: str
    devices: int
    parallel: str
    power_limit: float | None
    ideal: bool
    dense_memory_bytes: float
    pruned_memory_bytes: float
    capacity_bytes: float
    dense_fits: bool
    pruned_fits: bool
    dense_largest_batch: int
    pruned_largest_batch: int
    method: str
    options: str
    prune: str
    parts: str
    formats: str

    @property
    def lower(self) -> float:
        """Lower end of the speedup's interval."""
        return self.speedup_lower

    @property
    def upper(self) -> float:
        """Upper end of the speedup's interval."""
        return self.speedup_upper

    @property
    def energy(self) -> Energy:
        """Energy per token and per request without hosts, cooling and prices, which
        :meth:`simulator.Energy.of` adds."""
        return Energy.of(self)

    @property
    def name(self) -> str:
        """Name of the existing model, of the method or family at one sparsity, or else the text of
        ``--prune``."""
        family = self.prune in ("", self.family, f"{self.family} {self.sparsity:.9g}")
        return self.pruned or self.method or (self.family if family else self.prune)

    @property
    def pruning(self) -> str:
        """The pruning in words: ``width at 25 %``, ``SliceGPT at 25 %``, the text of ``--prune``,
        or the name of the existing model."""
        # a method that sets its own sparsity, or is one of several steps, has none to print
        own = self.prune == self.name or self.prune.endswith(SUFFIXES) or " + " in self.method
        simple = self.name == (self.method or self.family) and not own
        title = method_title(self.name)
        return f"{title} at {percent(self.sparsity)}" if simple else title

    @property
    def request(self) -> str:
        """Device, engine, phase, batch and length as text."""
        return f"{self.hardware}, {self.engine}, {self.phase}, batch {self.batch}, seq {self.seq}"

    @property
    def scenario(self) -> str:
        """Everything except device and pruning as text."""
        name, new = "concurrency" if self.phase == "serve" else "batch", f" + {self.new_tokens} new"
        cached = f" ({self.cached_prefix} cached)" if self.cached_prefix else ""
        length = f"seq {self.seq}{cached}{new if self.new_tokens else ''}"
        parts = [self.model, self.phase, f"{name} {self.batch}", length]
        equal = self.weight_dtype == self.kv_dtype == self.dtype
        parts.append(
            self.dtype
            if equal
            else f"{self.dtype}, weights {self.weight_dtype}, cache {self.kv_dtype}"
        )
        parts.append(self.engine)
        if self.devices > 1:
            parts.append(f"{self.devices} devices ({self.parallel})")
        if self.power_limit is not None:
            parts.append(f"under {self.power_limit:g} W (assumed)")
        if self.ideal:
            parts.append("pruning overheads excluded")
        return ", ".join(parts)

    def _title(self) -> str:
        interval = (
            f"{ratio(self.speedup)}x ({ratio(self.speedup_lower)}-{ratio(self.speedup_upper)})"
        )
        times = f"{seconds(self.dense_s)} to {seconds(self.pruned_s)}"
        about = f"{self.model} on {self.request}, {self.dtype}"
        return (
            f"{about}: {interval}, {times}: {self.family} {percent(self.sparsity)},"
            f" {self.bottleneck}-bound"
        )


_KINDS: Mapping[str, type] = {
    "str": str,
    "float": float,
    "float | None": float,
    "int": int,
    "bool": bool,
}
# field of a result -> type
COLUMNS: Mapping[str, type] = {f.name: _KINDS[str(f.type)] for f in fields(Result)}
_OPTIONAL = frozenset(f.name for f in fields(Result) if f.type == "float | None")


@dataclass(frozen=True, repr=False, eq=False)
class Results(Displayed):
    """Predictions as columns named like the fields of :class:`Result`; iterates over results.

    Parameters
    ----------
    columns : mapping of str to array
        One column per field of :class:`Result`, by name.
    notes : tuple of str
        Exclusions and limits of the predictions.
    pruning : array of int
        Index of each row into ``prunings``.
    prunings : tuple of Pruning
        The requested prunings; () if the results are of several grids.
    requests : tuple of Request
        The requests of a table.

    Examples
    --------
    >>> import simulator
    >>> found = simulator.table(["llama-3.1-8b"], ["h100"], ["depth"], [0.25, 0.5])
    >>> len(found), found[1].sparsity, found.columns["speedup"].round(2).tolist()
    (2, 0.5, [1.3, 1.84])
    """

    columns: Columns
    notes: tuple[str, ...] = ()
    pruning: IndexArray = field(default_factory=lambda: np.zeros(0, dtype=np.intp), repr=False)
    prunings: tuple[Pruning, ...] = field(default=(), repr=False)
    requests: tuple[Request, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.columns["speedup"])

    def __iter__(self) -> Iterator[Result]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Result:
        return self.rows[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Results) and (self.rows, self.notes) == (other.rows, other.notes)

    @cached_property
    def rows(self) -> tuple[Result, ...]:
        """Results as objects."""
        lists = [
            known(self.columns[name]) if name in _OPTIONAL else self.columns[name].tolist()
            for name in COLUMNS
        ]
        return tuple(Result(**dict(zip(COLUMNS, row))) for row in zip(*lists))

    def take(self, index: Any) -> Results:
        """Return the rows ``index``: integers or a mask."""
        columns = {name: column[index] for name, column in self.columns.items()}
        return Results(columns, self.notes, self.pruning[index], self.prunings, self.requests)

    @classmethod
    def join(cls, parts: Sequence[Results], notes: tuple[str, ...] = ()) -> Results:
        """Return the rows of ``parts`` in order, with ``notes``."""
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMNS}
        return cls(columns, notes, np.concatenate([part.pruning for part in parts]))

    @classmethod
    def empty(cls) -> Results:
        """Return results without rows."""
        kinds = {str: object, float: np.float64, int: np.int64, bool: np.bool_}
        return cls({name: np.zeros(0, dtype=kinds[kind]) for name, kind in COLUMNS.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return ``results`` as dictionaries, and ``notes``."""
        return {"results": [r.to_dict() for r in self], "notes": list(self.notes)}

    def _title(self) -> str:
        models, devices = (few(self.columns[name]) for name in ("model", "hardware"))
        return (
            f"{len(self):,} predictions of {models} on"
            f" {devices}{f'; {len(self.notes)} notes' if self.notes else ''}"
        )

    def _columns(self) -> Mapping[str, Any]:
        """Return one row per result."""
        return {name: self.columns[name] for name in COLUMNS}


def known(column: Array) -> list[Any]:
    """Return the values of a column, None for NaN."""
    values: list[Any] = column.tolist()
    return [None if value != value else value for value in values]


class HasResult(Displayed):
    """Base of classes that add fields to a :attr:`result`."""

    result: Result

    def to_dict(self) -> dict[str, Any]:
        added = super().to_dict()
        return {**added.pop("result"), **added}
