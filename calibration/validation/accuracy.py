"""The accuracy protocol over everything that ships, as rows of numbers: fits, baselines, stacks left out, attention,
elementwise operators.

Use :func:`run_protocol`; ``prunesim validate --protocol`` prints its rows, :mod:`calibration.validation.acceptance`
holds them against what was asked, and :mod:`calibration.cli.pages` makes ``docs/accuracy.md`` of them. How a split is
made and judged is in :mod:`calibration.validation.protocol`, how a stack is left out in
:mod:`calibration.validation.stacks`; here is only what is run. Scores are in percent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from calibration.build_profiles import rtx_tables, shared_folder
from calibration.fit.attention import calls_of
from calibration.fit.elementwise import ElementwiseFit
from calibration.fit.experts import layers_of
from calibration.fit.gemm import products_of
from calibration.measurements import list_measurements, load_measurements
from calibration.measurements.wheel import CHOICES, datasheet, open_wheel, read_choice
from calibration.records.screening import LATENT
from calibration.records.timing_table import Records
from calibration.validation import protocol, stacks
from calibration.validation.protocol import Measured, Row, row
from simulator.cost.base import Machine
from simulator.cost.elementwise import Moves, class_code
from simulator.errors import InputError, unknown
from simulator.hardware.profile import HardwareProfile, Section
from simulator.predict.workers import compute_parts
from simulator.workload import STACKS


@dataclass(frozen=True)
class TableChoice:
    """A table to evaluate."""

    measurement: str  # device/operator/stack
    dtype: str = "bf16"
    sibling: str = ""  # the other stack's table, which lends a prior
    wheel: Path | None = None  # where it is read from if it does not ship

    @property
    def operator(self) -> str:
        """Operator of the table."""
        return self.measurement.split("/")[1]

    def load(self) -> Measured:
        """Its rows, of the features a head that are fitted, with the datasheet they belong to."""
        return _loaded(self)

    def fitted(self) -> Section:
        """A section fitted on every row."""
        return _fitted(self)


GEMMS: Mapping[str, TableChoice] = MappingProxyType(
    {
        "a100": TableChoice("a100_sxm/gemm/trtllm", sibling="a100_sxm/gemm/sglang"),
        "a100_sglang": TableChoice("a100_sxm/gemm/sglang"),
        "h100": TableChoice("h100_sxm/gemm/trtllm", sibling="h100_sxm/gemm/sglang"),
        "h100_fp8": TableChoice("h100_sxm/gemm/trtllm", "fp8"),
        "h200": TableChoice("h200_sxm/gemm/trtllm"),
        "l40s": TableChoice("l40s/gemm/trtllm"),
        "rtx_pro_6000": TableChoice("rtx_pro_6000/gemm/trtllm"),
        "b200": TableChoice("b200_sxm/gemm/trtllm"),
        "a100_int8_wo": TableChoice("a100_sxm/gemm/trtllm", "int8_wo"),
        "a100_int4_wo": TableChoice("a100_sxm/gemm/trtllm", "int4_wo"),
    }
)
LEAVABLE = ("gemm", "attention_prefill", "attention_decode")
"""Operators of which a stack is left out in the table of stacks; of latent attention and experts, in their own."""
EXPERT_FORMATS = ("bf16", "fp8", "fp8_block", "nvfp4")
"""Formats of experts that are judged; those of weights alone hold a model or two."""
TABLES: tuple[str, ...] = (
    *(*GEMMS, "stacks", "h200_from_h100", "rtx_4090", "attention", "mla", "experts", "elementwise"),
)
"""What can be judged; after the GEMM tables: every stack of a GPU with two or more left out, another device by its
datasheet, one projection left out, and the other operators; of "mla" most tables are in the wheel."""

Unit = tuple[Callable[..., list[Row]], tuple[Any, ...]]


def run_protocol(
    tables: Sequence[str] = ("all",),
    *,
    seeds: Sequence[int] = protocol.SEEDS,
    sizes: Sequence[int | None] = protocol.SIZES,
    wheel: Path | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Scores of every table, method, size and seed: rows of "table", "method", "rows" (0: all, or none where a stack is
    left out), "trained_on", "seed", scores.

    ``tables`` are of :data:`TABLES`, "all" for all of them (the RTX 4090's only where its rows are at hand); ``sizes``
    training rows, None for all there are. With the ``wheel`` that the tables are made of, stacks whose tables do not
    ship are left out too. ``jobs`` processes work; ``progress`` is called with (steps done, steps in all). InputError
    for an unknown table, or one whose rows are not at hand.
    """
    chosen = TABLES if "all" in tables else tuple(tables)
    for name in chosen:
        if name not in TABLES:
            raise unknown("table", name, (*TABLES, "all"))
    if wheel is not None:
        open_wheel(wheel).close()
    units = [unit for name in chosen for unit in _units(name, seeds, sizes, wheel, required="all" not in tables)]
    found: dict[int, list[Row]] = {}
    for index, rows in compute_parts(partial(_run, units), list(range(len(units))), jobs):
        found[index] = json.loads(rows)
        if progress is not None:
            progress(len(found), len(units))
    return [r for index in sorted(found) for r in found[index]]


def _run(units: Sequence[Unit], index: int) -> bytes:
    judge, arguments = units[index]
    return json.dumps(judge(*arguments)).encode()


def _units(
    name: str, seeds: Sequence[int], sizes: Sequence[int | None], wheel: Path | None, required: bool
) -> Iterator[Unit]:
    """Steps of one table, as progress counts them."""
    if name in GEMMS:
        yield from ((_gemm, (name, size, seed)) for seed in seeds for size in sizes)
    elif name == "stacks":
        yield from ((_stack, (*pair, tuple(seeds))) for pair in stack_pairs(wheel))
    elif name == "h200_from_h100":
        yield _h200, ()
    elif name == "attention":
        tables = [t for o in LEAVABLE[1:] for device in _tables(o).values() for t in device.values()]
        yield from ((_attention, (t, question, tuple(seeds))) for t in tables for question in protocol.QUESTIONS)
    elif name == "mla":
        yield from ((_stack, (*pair, tuple(seeds))) for pair in stack_pairs(wheel, LATENT))
        tables = [t for o in LATENT for device in _tables(o, wheel).values() for t in device.values()]
        yield from ((_attention, (t, question, tuple(seeds))) for t in tables for question in protocol.QUESTIONS)
    elif name == "experts":
        # of a table that ships in part, too, all formats
        known = [t for device in _tables("experts", wheel).values() for t in device.values()]
        yield from ((_experts, (replace(t, wheel=wheel), tuple(seeds))) for t in known)
        for pair in stack_pairs(wheel, ("experts",)):
            yield _experts_stack, (*(replace(t, wheel=wheel) for t in pair), tuple(seeds))
    elif shared_folder() is not None:
        yield (_rtx_4090, ()) if name == "rtx_4090" else (_elementwise, (tuple(seeds), tuple(sizes)))
    elif required:
        raise InputError(f"table {name}: its rows do not ship; set PRUNESIM_SHARED_DATA to their folder")


def _tables(operator: str, wheel: Path | None = None) -> dict[str, dict[str, TableChoice]]:
    """Device -> stack -> table of an operator."""
    out: dict[str, dict[str, TableChoice]] = {}
    known = list_measurements() if wheel is None else CHOICES
    for name in known:
        device, mine, stack = name.split("/")
        if mine == operator and stack in STACKS:
            out.setdefault(device, {})[stack] = TableChoice(name, wheel=None if name in list_measurements() else wheel)
    return out


def stack_pairs(
    wheel: Path | None = None, operators: Sequence[str] = LEAVABLE
) -> list[tuple[TableChoice, TableChoice]]:
    """TableChoice of a stack left out, and that of the stack that predicts it: of every device and operator with two or
    more, the one a user gets who names none. vLLM's tables, which hold no large GEMMs, predict nobody."""
    out = []
    for operator in operators:
        for own in _tables(operator, wheel).values():
            for stack, table in own.items():
                others = [own[other] for other in STACKS if other in own and other not in (stack, "vllm")]
                out += [(table, others[0])] if others else []
    return out


def gemm_rows(records: Records, hw: HardwareProfile, dtype: str) -> Measured:
    """GEMM rows as a fit takes them."""
    return Measured(products_of(records, Machine.of(hw, dtype)), hw, dtype)


@lru_cache(maxsize=4)
def _records(table: TableChoice) -> Records:
    """Its rows of all formats."""
    if table.wheel is None:
        return load_measurements(table.measurement)
    with open_wheel(table.wheel) as archive:
        return read_choice(archive, CHOICES[table.measurement])[0]


@lru_cache(maxsize=8)
def _loaded(table: TableChoice) -> Measured:
    records, hw = (
        _records(replace(table, dtype="")).of_dtype(table.dtype),
        datasheet(CHOICES[table.measurement].hardware),
    )
    machine = Machine.of(hw, table.dtype)
    if table.operator == "experts":
        return Measured(layers_of(records, machine, hw.architecture), hw, table.dtype)
    if table.operator == "gemm":
        return gemm_rows(records, hw, table.dtype)
    return Measured(calls_of(records, table.operator, machine).screened()[0], hw, table.dtype)


@lru_cache(maxsize=8)
def _fitted(table: TableChoice) -> Section:
    return table.load().fit()


def _gemm(name: str, size: int | None, seed: int) -> list[Row]:
    table, data = GEMMS[name], GEMMS[name].load()
    found = [protocol.evaluate_table(data, size, seed)]
    if size is not None and table.sibling and size <= 1000:
        lent = replace(table, measurement=table.sibling).fitted()
        found.append(protocol.evaluate_table(data, size, seed, prior=lent))
    if not table.dtype.endswith("_wo"):
        found += protocol.evaluate_baselines(data, size, seed)
    return [{**result, "table": name, "rows": size or 0} for result in found]


def _stack(table: TableChoice, source: TableChoice, seeds: Sequence[int]) -> list[Row]:
    device, operator, stack = table.measurement.split("/")
    known = {"table": f"{operator}, a stack left out", "left_out": f"{device} {stack}"}
    found = (r for seed in seeds for r in stacks.left_out(source.fitted(), table.load(), seed))
    return [{**result, **known} for result in found]


def _h200() -> list[Row]:
    scores = protocol.judge(GEMMS["h100"].fitted(), GEMMS["h200"].load())
    return [row("H100's section on the H200's datasheet", 0, 0, scores, "h200_from_h100")]


@lru_cache(maxsize=1)
def _rtx_rows() -> tuple[HardwareProfile, Records]:
    folder, hw = shared_folder(), datasheet("rtx_4090")
    assert folder is not None
    return hw, rtx_tables(folder, hw)


def _rtx_4090() -> list[Row]:
    hw, records = _rtx_rows()
    table = gemm_rows(records, hw, "bf16")
    calls = products_of(records, Machine.of(hw)).calls
    labels = np.array([f"n={int(n)} k={int(k)}" for n, k in zip(calls.n, calls.k, strict=True)])
    out = []
    for name, lent in (("prunesim", None), ("prunesim + prior", _fitted(GEMMS["l40s"]))):
        method = f"{name}, one projection left out"
        results = protocol.leave_one_out(table, labels, lent)
        out += [{**result, "table": "rtx_4090", "method": method} for result in results]
    return out


def _attention(table: TableChoice, question: str, seeds: Sequence[int]) -> list[Row]:
    device, operator, stack = table.measurement.split("/")
    found = (protocol.evaluate_table(table.load(), None, seed, question, fold_by=(question,)) for seed in seeds)
    kind, phase = operator.split("_")
    known = {"table": f"{kind} {device}, {stack}", "method": f"{phase}, {question}"}
    return [{**result, **known} for result in found]


def _experts(table: TableChoice, seeds: Sequence[int]) -> list[Row]:
    """Every format of a table, models left out; a line each."""
    device, _, stack = table.measurement.split("/")
    ships = set(CHOICES[table.measurement].ships) if table.wheel is None else set(EXPERT_FORMATS)
    out: list[Row] = []
    for dtype in (dtype for dtype in EXPERT_FORMATS if dtype in ships and dtype in _formats(table)):
        data = replace(table, dtype=dtype).load()
        found = (protocol.evaluate_table(data, None, seed) for seed in seeds)
        out += [{**r, "table": f"experts {device}, models left out", "method": f"{stack} {dtype}"} for r in found]
    return out


def _experts_stack(table: TableChoice, source: TableChoice, seeds: Sequence[int]) -> list[Row]:
    """A stack left out, in every format that both have."""
    out: list[Row] = []
    for dtype in (dtype for dtype in EXPERT_FORMATS if dtype in _formats(table) & _formats(source)):
        found = _stack(replace(table, dtype=dtype), replace(source, dtype=dtype), seeds)
        out += [{**r, "left_out": f"{r['left_out']} {dtype}"} for r in found]
    return out


@lru_cache(maxsize=32)
def _formats(table: TableChoice) -> frozenset[str]:
    """Number formats of a table."""
    return frozenset(_records(replace(table, dtype="")).labels().astype(str))


def _elementwise(seeds: Sequence[int], sizes: Sequence[int | None]) -> list[Row]:
    hw, records = _rtx_rows()
    r = records.select(records.is_operator("elementwise"))
    bytes_, code = r.read_bytes + r.write_bytes, class_code(r.role)
    calls = Moves(bytes_, code, hw.l2_bytes, hw.bandwidth_bytes_per_s, hw.architecture)
    moves = ElementwiseFit(calls, r.seconds)
    out = []
    for size in (size or 0 for size in sizes if size is None or size >= 400):
        for seed in seeds:
            scores = protocol.score_elementwise(moves, hw, size, seed)
            out.append(row("prunesim", seed, size, scores, "elementwise rtx_4090", size))
    return out


# fmt: off
COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("MAPE", "mape", 2), ("median", "median", 2), ("p95", "p95", 1), ("bias", "bias", 2), ("m<=16", "mape m<=16", 1),
    ("17-256", "mape m<=256", 1), (">256", "mape m>256", 1), ("over 10 us", "mape over 10us", 2),
    ("speedup median", "speedup median", 2), ("speedup p95", "speedup p95", 1), ("Spearman", "speedup spearman", 3),
    ("coverage", "coverage", 1), ("lowest", "lowest coverage", 1), ("width", "width", 1),
    ("ratios in", "ratio coverage", 1), ("ratio +-", "ratio width", 1),
)
STACK_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("MAPE", "mape", 2), ("p95", "p95", 1), ("in", "coverage", 1), ("+-", "width", 0),
    ("ratio p95", "speedup p95", 1), ("ratio in", "ratio coverage", 1), ("ratio +-", "ratio width", 0),
)
# fmt: on
"""Columns of a table, and of that of stacks left out: title, score, digits; those that no row has are left out."""


def titles(rows: Sequence[Row]) -> list[str]:
    """Tables in the order they were run."""
    return list(dict.fromkeys(str(r["table"]) for r in rows))


def means(rows: Sequence[Row], table: str) -> list[Row]:
    """Rows of one table, averaged over seeds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        if r["table"] == table:
            groups.setdefault((r.get("left_out", ""), r["method"], r["rows"]), []).append(r)
    out = []
    for (left_out, method, size), group in groups.items():
        names = [n for n, v in group[0].items() if isinstance(v, float) and all(n in r for r in group)]
        mean = {n: float(np.mean([r[n] for r in group])) for n in names}
        out.append({"left_out": left_out, "method": method, "rows": size, "seeds": len(group), **mean})
    return sorted(out, key=lambda r: (r["left_out"], 0 if r["method"] == "as shipped" else r["rows"] or 10**9))


def columns_of_table(rows: Sequence[Row], table: str) -> list[tuple[str, list[str]]]:
    """One table as (title, cells), means over seeds."""
    found = means(rows, table)
    if any(r["left_out"] for r in found):
        return _columns_of_stacks(found)
    columns = [("method", [str(r["method"]) for r in found]), ("rows", [str(r["rows"] or "all") for r in found])]
    for title, score, digits in COLUMNS:
        if any(score in r for r in found):
            columns.append((title, [_cell(r, score, digits) for r in found]))
    return columns


def _columns_of_stacks(found: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """A line a stack and number of its rows, in the end their means: scores of the posterior (without rows: as
    shipped), and the MAPE of what is simpler."""
    at = {(r["left_out"], r["method"], r["rows"]): r for r in found}
    every = list(dict.fromkeys(r["left_out"] for r in found))
    sizes = sorted({r["rows"] for r in found})
    lines = [(left, size, [left]) for left in every for size in sizes] + [("mean", size, every) for size in sizes]

    def cells(method: str, score: str, digits: int) -> list[str]:
        out = []
        for _, size, mine in lines:
            key = "as shipped" if not size and method == "posterior" else method
            group = [at.get((left, key, size), {}) for left in mine]
            mean = {score: np.mean([r[score] for r in group])} if all(score in r for r in group) else {}
            out.append(_cell(mean, score, digits))
        return out

    columns = [("left out", [name for name, *_ in lines]), ("rows", [str(size) for _, size, _ in lines])]
    columns += [(title, cells("posterior", score, digits)) for title, score, digits in STACK_COLUMNS]
    simpler = [(name, cells(name, "mape", 2)) for name in stacks.MOVES]
    return columns + [(name, values) for name, values in simpler if any(values)]


def _cell(row: Mapping[str, Any], score: str, digits: int) -> str:
    value = row.get(score, np.nan)
    return "" if value != value else f"{value:.{digits}f}"
