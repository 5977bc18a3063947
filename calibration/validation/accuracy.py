"""The accuracy protocol over all shipped tables: fits, baselines, held-out stacks, attention, experts, elementwise.

Use :func:`run_protocol`; ``prunesim validate --protocol`` prints its rows, :mod:`calibration.validation.acceptance`
compares them with the targets, and :mod:`calibration.cli.pages` makes ``docs/generated/accuracy.md`` of them.
This module lists what is evaluated; :mod:`calibration.validation.protocol` splits and scores one table,
:mod:`calibration.validation.stacks` a held-out stack. Scores are in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType

import numpy as np

from calibration.build_profiles import rtx_tables, shared_folder
from calibration.fit.attention import calls_of
from calibration.fit.elementwise import ElementwiseFit
from calibration.fit.experts import layers_of
from calibration.fit.gemm import products_of
from calibration.measurements import list_measurements, load_measurements, provenance
from calibration.measurements.infersim import SOURCES
from calibration.measurements.wheel import CHOICES, datasheet, open_wheel, read_choice
from calibration.records.screening import LATENT
from calibration.records.timing_table import Records
from calibration.validation import protocol, stacks
from calibration.validation.protocol import MeasuredRows, Row, row
from simulator.cost.base import Machine
from simulator.cost.elementwise import Moves, class_code
from simulator.errors import InputError, unknown
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import Section
from simulator.workload import STACKS


@dataclass(frozen=True)
class TableChoice:
    """A table to evaluate."""

    measurement: str  # device/operator/stack
    dtype: str = "bf16"
    prior: str = ""  # table of another stack, whose section is the prior of a small fit
    wheel: Path | None = None  # source of a table that does not ship

    @property
    def operator(self) -> str:
        """Operator of the table."""
        return self.measurement.split("/")[1]

    def load(self) -> MeasuredRows:
        """Return the usable rows, with the datasheet of their device."""
        return _loaded(self)

    def fitted(self) -> Section:
        """Return the section fitted on every row."""
        return _fitted(self)


GEMMS: Mapping[str, TableChoice] = MappingProxyType(
    {
        "a100": TableChoice("a100_sxm/gemm/trtllm", prior="a100_sxm/gemm/sglang"),
        "a100_sglang": TableChoice("a100_sxm/gemm/sglang"),
        "h100": TableChoice("h100_sxm/gemm/trtllm", prior="h100_sxm/gemm/sglang"),
        "h100_fp8": TableChoice("h100_sxm/gemm/trtllm", "fp8"),
        "h200": TableChoice("h200_sxm/gemm/trtllm"),
        "l40s": TableChoice("l40s/gemm/trtllm"),
        "rtx_pro_6000": TableChoice("rtx_pro_6000/gemm/trtllm"),
        "b200": TableChoice("b200_sxm/gemm/trtllm"),
        "h20_fp8_block": TableChoice("h20/gemm/sglang", "fp8_block"),
        "a100_int8_wo": TableChoice("a100_sxm/gemm/trtllm", "int8_wo"),
        "a100_int4_wo": TableChoice("a100_sxm/gemm/trtllm", "int4_wo"),
    }
)
STACK_OPERATORS = ("gemm", "attention_prefill", "attention_decode")
"""Operators of the table of held-out stacks; latent attention and experts have separate tables."""
EXPERT_FORMATS = ("bf16", "fp8", "fp8_block", "nvfp4")
"""Formats of experts that are evaluated; weight-only formats have one or two models."""
TABLES: tuple[str, ...] = (
    *(*GEMMS, "stacks", "unlisted", "h200_from_h100", "rtx_4090", "attention", "mla", "experts", "elementwise"),
)
"""Tables to evaluate. After the GEMM tables: each stack of a GPU with two or more held out; each GPU by its datasheet
alone, as a GPU without tables; the section of another GPU; each projection held out; the other operators. Most tables
of "mla" are in the wheel."""

FEWEST = 40
"""Rows of an attention table from which three tenths of its heads or lengths are held out."""

ProtocolStep = Callable[[], list[Row]]


def run_protocol(
    tables: Sequence[str] = ("all",),
    *,
    seeds: Sequence[int] = protocol.SEEDS,
    sizes: Sequence[int | None] = protocol.SIZES,
    wheel: Path | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Return the scores of every table, method, size and seed: rows of "table", "method", "rows" (0: all; for a
    held-out stack: none), "trained_on", "seed", scores.

    ``tables`` are of :data:`TABLES`, or "all" (the RTX 4090's only where its rows are available); ``sizes`` are numbers
    of training rows, None for all. With the ``wheel`` of the tables, stacks whose tables do not ship are held out too.
    ``jobs`` is the number of processes; ``progress`` is called with (steps done, steps in all). InputError for an
    unknown table, or one whose rows are not available.
    """
    chosen = TABLES if "all" in tables else tuple(tables)
    for name in chosen:
        if name not in TABLES:
            raise unknown("table", name, (*TABLES, "all"))
    if wheel is not None:
        open_wheel(wheel).close()
    steps = [step for name in chosen for step in _steps(name, seeds, sizes, wheel, required="all" not in tables)]
    found: list[Row] = []
    with ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        for done, rows in enumerate(pool.map(_run, steps) if pool else map(_run, steps), start=1):
            found += rows
            if progress is not None:
                progress(done, len(steps))
    return found


def _run(step: ProtocolStep) -> list[Row]:
    return step()


def _steps(
    name: str, seeds: Sequence[int], sizes: Sequence[int | None], wheel: Path | None, required: bool
) -> Iterator[ProtocolStep]:
    """Yield the steps of one table, as progress counts them."""
    if name in GEMMS:
        yield from (partial(_gemm, name, size, seed) for seed in seeds for size in sizes)
    elif name == "stacks":
        yield from (partial(_stack, *pair, seeds) for pair in stack_pairs(wheel))
    elif name == "unlisted":
        yield from (partial(_unlisted, table, others, seeds) for table, others in unlisted_tables(wheel))
    elif name == "h200_from_h100":
        yield _h200
    elif name == "attention":
        yield from _attention_steps(STACK_OPERATORS[1:], None, seeds)
    elif name == "mla":
        yield from (partial(_stack, *pair, seeds) for pair in stack_pairs(wheel, LATENT))
        yield from _attention_steps(LATENT, wheel, seeds)
    elif name == "experts":
        # the wheel has all formats, also of a table that ships in part
        tables = [replace(t, wheel=wheel) for t in _tables("experts", wheel)]
        yield from (partial(_experts, table, seeds) for table in tables)
        for table, source in stack_pairs(wheel, ("experts",)):
            yield partial(_experts_stack, replace(table, wheel=wheel), replace(source, wheel=wheel), seeds)
    elif shared_folder() is not None:
        yield _rtx_4090 if name == "rtx_4090" else partial(_elementwise, seeds, sizes)
    elif required:
        raise InputError(f"table {name}: its rows do not ship; set PRUNESIM_SHARED_DATA to their folder")


def _attention_steps(operators: Sequence[str], wheel: Path | None, seeds: Sequence[int]) -> Iterator[ProtocolStep]:
    tables = [table for operator in operators for table in _tables(operator, wheel)]
    yield from (partial(_attention, table, by, seeds) for table in tables for by in protocol.GROUPINGS)


def _tables(operator: str, wheel: Path | None = None) -> list[TableChoice]:
    """Return the tables of an operator, those of one device next to each other."""
    shipped = list_measurements()
    out: dict[str, list[TableChoice]] = {}
    for name in shipped if wheel is None else SOURCES:
        device, its_operator, stack = name.split("/")
        if its_operator == operator and stack in STACKS:
            out.setdefault(device, []).append(TableChoice(name, wheel=None if name in shipped else wheel))
    return [table for tables in out.values() for table in tables]


def stack_pairs(
    wheel: Path | None = None, operators: Sequence[str] = STACK_OPERATORS
) -> list[tuple[TableChoice, TableChoice]]:
    """Return pairs of the table of a held-out stack and the table that predicts it, for every device and operator with
    two or more stacks: the default stack among the others. vLLM's tables, which lack large GEMMs, predict no stack."""
    tables = {tuple(t.measurement.split("/")): t for operator in operators for t in _tables(operator, wheel)}
    out = []
    for (device, operator, stack), table in tables.items():
        others = [tables.get((device, operator, other)) for other in STACKS if other not in (stack, "vllm")]
        source = next((other for other in others if other is not None), None)
        out += [] if source is None else [(table, source)]
    return out


UNLISTED: tuple[tuple[str, str], ...] = (
    *(("gemm", "bf16"), ("gemm", "fp8"), ("gemm", "fp8_block")),
    *(("attention_prefill", "bf16"), ("attention_decode", "bf16"), ("mla_decode", "bf16")),
    *(("experts", "bf16"), ("experts", "fp8_block")),
)
"""Operators and formats that are evaluated by datasheet alone."""


def unlisted_tables(wheel: Path | None = None) -> list[tuple[TableChoice, TableChoice | None]]:
    """Return one table for every GPU, operator and format of :data:`UNLISTED`, by the first stack that has one, and the
    GPU's bf16 GEMMs, whose rows update the others. vLLM's tables, which lack large GEMMs, count last."""
    found: dict[tuple[str, str, str], TableChoice] = {}
    order = sorted(STACKS, key=lambda stack: stack == "vllm")
    for operator, dtype in UNLISTED:
        tables = sorted(_tables(operator, wheel), key=lambda t: order.index(t.measurement.split("/")[2]))
        for table in tables:
            formats = _formats(table) if table.wheel else _formats(table) & set(provenance(table.measurement)["rows"])
            if dtype in formats:
                found.setdefault((operator, dtype, table.measurement.split("/")[0]), replace(table, dtype=dtype))
    return [
        (table, None if (operator, dtype) == ("gemm", "bf16") else found.get(("gemm", "bf16", device)))
        for (operator, dtype, device), table in found.items()
    ]


def by_datasheet(name: str) -> HardwareProfile:
    """Return a GPU as if it had no tables: with the defaults of its architecture where another GPU of it was fitted,
    else with those of no architecture."""
    hw = datasheet(name)
    kin = {c.hardware for c in SOURCES.values() if datasheet(c.hardware).architecture == hw.architecture}
    kin |= {"rtx_4090"} if hw.architecture == "ada" else set()
    return hw if kin - {name} else replace(hw, architecture="cdna3")


def gemm_rows(records: Records, hw: HardwareProfile, dtype: str) -> MeasuredRows:
    """Return the GEMM rows of records."""
    return MeasuredRows(products_of(records, Machine.of(hw, dtype)), hw, dtype)


@lru_cache(maxsize=4)
def _records(table: TableChoice) -> Records:
    """Return the rows of all formats."""
    if table.wheel is None or table.measurement not in CHOICES:
        return load_measurements(table.measurement)
    with open_wheel(table.wheel) as archive:
        return read_choice(archive, CHOICES[table.measurement])[0]


@lru_cache(maxsize=8)
def _loaded(table: TableChoice) -> MeasuredRows:
    records = _records(replace(table, dtype="")).of_dtype(table.dtype)
    hw = datasheet(SOURCES[table.measurement].hardware)
    machine = Machine.of(hw, table.dtype)
    if table.operator == "experts":
        return MeasuredRows(layers_of(records, machine, hw.architecture), hw, table.dtype)
    if table.operator == "gemm":
        return gemm_rows(records, hw, table.dtype)
    return MeasuredRows(calls_of(records, table.operator, machine).screened()[0], hw, table.dtype)


@lru_cache(maxsize=8)
def _fitted(table: TableChoice) -> Section:
    return table.load().fit()


def _gemm(name: str, size: int | None, seed: int) -> list[Row]:
    table, data = GEMMS[name], GEMMS[name].load()
    rows = [protocol.evaluate_table(data, size, seed)]
    if size is not None and table.prior and size <= 1000:
        prior = replace(table, measurement=table.prior).fitted()
        rows.append(protocol.evaluate_table(data, size, seed, prior=prior))
    if not table.dtype.endswith("_wo"):
        rows += protocol.evaluate_baselines(data, size, seed)
    return [{**r, "table": name, "rows": size or 0} for r in rows]


def _stack(table: TableChoice, source: TableChoice, seeds: Sequence[int]) -> list[Row]:
    """Return the scores of a held-out stack, predicted from the table ``source``."""
    device, operator, stack = table.measurement.split("/")
    rows = (r for seed in seeds for r in stacks.evaluate_held_out(source.fitted(), table.load(), seed))
    return [{**r, "table": f"{operator}, held-out stack", "held_out": f"{device} {stack}"} for r in rows]


def _unlisted(table: TableChoice, others: TableChoice | None, seeds: Sequence[int]) -> list[Row]:
    """Return the scores of a GPU by its datasheet alone, and with rows of its own or of its GEMMs."""
    device, operator, stack = table.measurement.split("/")
    hw, gemms = by_datasheet(SOURCES[table.measurement].hardware), None if others is None else others.load()
    alone, out = f"{operator} {table.dtype}, by datasheet alone", list[Row]()
    for seed in seeds if table.load().groups().max() > 0 else ():  # one group cannot be split
        for r in stacks.evaluate_datasheet(hw, table.load(), gemms, seed):
            title = f"{alone}, with GEMM rows" if r["method"] == "other rows" else alone
            method = "posterior" if r["rows"] else r["method"]
            out.append({**r, "method": method, "table": title, "held_out": f"{device} {stack}"})
    return out


def _h200() -> list[Row]:
    scores = protocol.evaluate(GEMMS["h100"].fitted(), GEMMS["h200"].load())
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
    for name, prior in (("prunesim", None), ("prunesim + prior", GEMMS["l40s"].fitted())):
        rows = protocol.leave_one_out(table, labels, prior)
        out += [{**r, "table": "rtx_4090", "method": f"{name}, held-out projection"} for r in rows]
    return out


def _attention(table: TableChoice, by: str, seeds: Sequence[int]) -> list[Row]:
    device, operator, stack = table.measurement.split("/")
    kind, phase = operator.split("_")
    data = table.load()
    if len(data.data) < FEWEST or data.groups(by).max() < 2:
        return []
    rows = (protocol.evaluate_table(data, None, seed, by, fold_by=(by,)) for seed in seeds)
    return [{**r, "table": f"{kind} {device}, {stack}", "method": f"{phase}, {by}"} for r in rows]


def _experts(table: TableChoice, seeds: Sequence[int]) -> list[Row]:
    """Return the scores of held-out models, for every format of a table."""
    device, _, stack = table.measurement.split("/")
    formats = _formats(table)
    if table.wheel is None:
        formats &= set(SOURCES[table.measurement].ships)
    out: list[Row] = []
    for dtype in (dtype for dtype in EXPERT_FORMATS if dtype in formats):
        data = replace(table, dtype=dtype).load()
        rows = (protocol.evaluate_table(data, None, seed) for seed in seeds)
        out += [{**r, "table": f"experts {device}, held-out models", "method": f"{stack} {dtype}"} for r in rows]
    return out


def _experts_stack(table: TableChoice, source: TableChoice, seeds: Sequence[int]) -> list[Row]:
    """Return the scores of a held-out stack, for every format that both tables have."""
    out: list[Row] = []
    for dtype in (dtype for dtype in EXPERT_FORMATS if dtype in _formats(table) & _formats(source)):
        rows = _stack(replace(table, dtype=dtype), replace(source, dtype=dtype), seeds)
        out += [{**r, "held_out": f"{r['held_out']} {dtype}"} for r in rows]
    return out


@lru_cache(maxsize=32)
def _formats(table: TableChoice) -> frozenset[str]:
    """Return the number formats of a table."""
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
