"""The accuracy protocol over everything that ships, as rows of numbers: fits, baselines, other stacks, attention,
elementwise operators.

Use :func:`run_protocol`; ``prunesim validate --protocol`` prints its rows and :mod:`calibration.cli.pages` makes
``docs/accuracy.md`` of them. How a split is made and judged is in :mod:`calibration.judge.protocol` and
:mod:`calibration.judge.protocol_operators`; here is only what is run. Scores are in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType

import numpy as np

from calibration.fit.attention import calls_of
from calibration.fit.core import shapes_of
from calibration.fit.elementwise import Moves
from calibration.fit.shipped import HEAD_DIM, rtx_tables, shared_folder
from calibration.judge import protocol, protocol_operators
from calibration.judge.protocol import Measured, Row, row
from calibration.measurements import load_measurements
from calibration.records.table import Records
from simulator.errors import InputError, unknown
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile, Section
from simulator.kernels.elementwise import class_code
from simulator.kernels.gemm_core import Machine
from simulator.kernels.lattice import smooth_arrays


@dataclass(frozen=True)
class Table:
    """A shipped GEMM table to judge."""

    hardware: str  # profile with the datasheet
    measurement: str
    dtype: str = "bf16"
    sibling: str = ""  # the other stack's table, which lends a prior

    def load(self, measurement: str = "") -> Measured:
        """Its rows, or those of another measurement of the device."""
        return _loaded(measurement or self.measurement, self.hardware, self.dtype)


GEMMS: Mapping[str, Table] = {
    "a100": Table("a100_sxm_80gb", "a100_sxm/gemm/trtllm", sibling="a100_sxm/gemm/sglang"),
    "h100": Table("h100_sxm", "h100_sxm/gemm/trtllm", sibling="h100_sxm/gemm/sglang"),
    "h100_fp8": Table("h100_sxm", "h100_sxm/gemm/trtllm", "fp8"),
    "h200": Table("h200_sxm", "h200_sxm/gemm/trtllm"),
    "l40s": Table("l40s", "l40s/gemm/trtllm"),
    "rtx_pro_6000": Table("rtx_pro_6000", "rtx_pro_6000/gemm/trtllm"),
}
STACKS = ("a100_sglang", "h100_sglang", "l40s_sglang")
"""Another stack's table of the same GPU."""
TABLES: tuple[str, ...] = (*GEMMS, *STACKS, "h200_from_h100", "rtx_4090", "attention", "elementwise")
"""What can be judged; the last four: another device by its datasheet, one projection left out, and the other
operators."""


def run_protocol(
    tables: Sequence[str] = ("all",),
    *,
    seeds: Sequence[int] = protocol.SEEDS,
    sizes: Sequence[int | None] = protocol.SIZES,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Scores of every table, method, size and seed: rows of "table", "method", "rows" (0: all), "trained_on", "seed",
    scores.

    ``tables`` are of :data:`TABLES`, "all" for all of them (the RTX 4090's only where its rows are at hand); ``sizes``
    training rows, None for all there are. ``progress`` is called with (steps done, steps in all). InputError for an
    unknown table, or one whose rows are not at hand.
    """
    chosen = TABLES if "all" in tables else tuple(tables)
    for name in chosen:
        if name not in TABLES:
            raise unknown("table", name, (*TABLES, "all"))
    units = [unit for name in chosen for unit in _units(name, seeds, sizes, required="all" not in tables)]
    out: list[Row] = []
    for done, unit in enumerate(units):
        out += unit()
        if progress is not None:
            progress(done + 1, len(units))
    return out


def _units(
    name: str, seeds: Sequence[int], sizes: Sequence[int | None], required: bool
) -> Iterator[Callable[[], list[Row]]]:
    """Steps of one table, as progress counts them."""
    if name in GEMMS:
        yield from (partial(_gemm, name, size, seed) for seed in seeds for size in sizes)
    elif name in STACKS:
        yield from (partial(_other_stack, name, seed) for seed in seeds)
    elif name == "h200_from_h100":
        yield _h200
    elif name == "attention":
        yield from (partial(_attention, seed, sizes) for seed in seeds)
    elif (known := _rtx_rows()) is not None:
        yield partial(_rtx_4090, *known) if name == "rtx_4090" else partial(_elementwise, *known, seeds, sizes)
    elif required:
        raise InputError(f"table {name}: its rows do not ship; set PRUNESIM_SHARED_DATA to their folder")


def gemm_rows(records: Records, hw: HardwareProfile, dtype: str) -> Measured:
    """GEMM rows as a fit takes them."""
    return Measured(shapes_of(records, Machine.of(hw, dtype)), hw, dtype)


@lru_cache(maxsize=8)
def _loaded(measurement: str, hardware: str, dtype: str) -> Measured:
    return gemm_rows(load_measurements(measurement, dtype), load_hardware(hardware), dtype)


@lru_cache(maxsize=8)
def _fitted(table: Table, measurement: str = "") -> Section:
    """A section fitted on every row."""
    return table.load(measurement).fit()


def _gemm(name: str, size: int | None, seed: int) -> list[Row]:
    table, data = GEMMS[name], GEMMS[name].load()
    found = [protocol.evaluate_table(data, size, seed)]
    if table.sibling and size is not None and size <= 1000:
        found.append(protocol.evaluate_table(data, size, seed, _fitted(table, table.sibling)))
    found += protocol.evaluate_baselines(data, size, seed)
    return [{**result, "table": name, "rows": size or 0} for result in found]


def _other_stack(name: str, seed: int) -> list[Row]:
    table = GEMMS[name.removesuffix("_sglang")]
    other = table.load(table.measurement.replace("trtllm", "sglang"))
    moved = protocol.transfer(_fitted(table), other, seed)
    return [{**result, "table": name, "rows": result["trained_on"]} for result in moved]


def _h200() -> list[Row]:
    scores = protocol.judge(_fitted(GEMMS["h100"]), GEMMS["h200"].load())
    return [row("H100's section on the H200's datasheet", 0, 0, scores, "h200_from_h100")]


@lru_cache(maxsize=1)
def _rtx_rows() -> tuple[HardwareProfile, Records] | None:
    folder, hw = shared_folder(), load_hardware("rtx_4090")
    return None if folder is None else (hw, rtx_tables(folder, hw))


def _rtx_4090(hw: HardwareProfile, records: Records) -> list[Row]:
    table = gemm_rows(records, hw, "bf16")
    labels = np.array([f"n={int(n)} k={int(k)}" for n, k in zip(table.data.n, table.data.k, strict=True)])
    lender = _fitted(GEMMS["l40s"])
    prior = replace(lender, arrays=MappingProxyType(smooth_arrays(lender.arrays)))
    out = []
    for name, lent in (("prunesim", None), ("prunesim + prior", prior)):
        method = f"{name}, one projection left out"
        results = protocol.leave_one_out(table, labels, lent)
        out += [{**result, "table": "rtx_4090", "method": method} for result in results]
    return out


def _attention(seed: int, sizes: Sequence[int | None]) -> list[Row]:
    out: list[Row] = []
    for phase, name, table in protocol_operators.TABLES:
        hw = load_hardware(name)
        calls = calls_of(load_measurements(table, dtype="bf16"), phase, Machine.of(hw))
        calls = calls.take(calls.head_dim == HEAD_DIM)
        for question in protocol_operators.QUESTIONS:
            for size in _large(sizes):
                scores = protocol_operators.score_attention(calls, hw.architecture, question, size, seed)
                out.append(row(f"{phase}, unseen {question}", seed, size, scores, f"attention {name}", size))
    return out


def _elementwise(hw: HardwareProfile, records: Records, seeds: Sequence[int], sizes: Sequence[int | None]) -> list[Row]:
    r = records.select(records.is_operator("elementwise"))
    device = hw.l2_bytes, hw.bandwidth_bytes_per_s, hw.architecture
    moves = Moves(r.read_bytes + r.write_bytes, class_code(r.role), r.seconds, *device)
    out = []
    for size in _large(sizes):
        for seed in seeds:
            scores = protocol_operators.score_elementwise(moves, size, seed)
            out.append(row("prunesim", seed, size, scores, "elementwise rtx_4090", size))
    return out


def _large(sizes: Sequence[int | None]) -> list[int]:
    """Training rows that operators with few rows are judged at, 0 for all."""
    return [size or 0 for size in sizes if size is None or size >= 400]


# fmt: off
COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("MAPE", "mape", 2), ("median", "median", 2), ("p95", "p95", 1), ("bias", "bias", 2), ("m<=16", "mape m<=16", 1),
    ("17-256", "mape m<=256", 1), (">256", "mape m>256", 1), ("over 10 us", "mape over 10us", 2),
    ("speedup median", "speedup median", 2), ("speedup p95", "speedup p95", 1), ("Spearman", "speedup spearman", 3),
    ("coverage", "coverage", 1), ("lowest", "lowest coverage", 1), ("width", "width", 1),
)
# fmt: on
"""Columns of a table: title, score, digits; those that no row of the table has are left out."""


def titles(rows: Sequence[Row]) -> list[str]:
    """Tables in the order they were run."""
    return list(dict.fromkeys(str(r["table"]) for r in rows))


def means(rows: Sequence[Row], table: str) -> list[Row]:
    """Rows of one table, averaged over seeds."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for r in rows:
        if r["table"] == table:
            groups.setdefault((r["method"], r["rows"]), []).append(r)
    out = []
    for (method, size), group in groups.items():
        names = [n for n, v in group[0].items() if isinstance(v, float) and all(n in r for r in group)]
        mean = {n: float(np.mean([r[n] for r in group])) for n in names}
        out.append({"method": method, "rows": size, "seeds": len(group), **mean})
    return sorted(out, key=lambda r: r["rows"] or 10**9)


def columns_of_table(rows: Sequence[Row], table: str) -> list[tuple[str, list[str]]]:
    """One table as (title, cells), means over seeds."""
    found = means(rows, table)
    sizes = [str(r["rows"] or ("-" if "as shipped" in r["method"] else "all")) for r in found]
    columns = [("method", [str(r["method"]) for r in found]), ("rows", sizes)]
    for title, score, digits in COLUMNS:
        if any(score in r for r in found):
            cells = ["" if r.get(score, np.nan) != r.get(score, np.nan) else f"{r[score]:.{digits}f}" for r in found]
            columns.append((title, cells))
    return columns
