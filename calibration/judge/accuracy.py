"""The accuracy protocol over everything that ships, as rows of numbers: fits, baselines, other stacks, attention, elementwise operators.

Use :func:`run_protocol`; ``prunesim validate --protocol`` prints its rows and ``accuracy_page`` makes ``docs/accuracy.md`` of them. How a
split is made and judged is in :mod:`calibration.judge.protocol` and :mod:`calibration.judge.protocol_attention`; here is only what is run. Scores are
in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from calibration.fit.core import Shapes, machine_of, shapes
from calibration.fit.gemm import fit_gemm
from calibration.fit.kernels import weight_copies
from calibration.judge.protocol import Result, evaluate_baselines, evaluate_table, judge, leave_one_out, transfer
from calibration.measurements import load_measurements
from calibration.records.records import Records
from simulator.errors import InputError, unknown
from simulator.hardware.library import load_hardware
from simulator.hardware.parts import Section
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.lattice import smooth_arrays

Row = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Table:
    """A GEMM table to judge: profile with the datasheet, shipped measurement, number format, and the other stack's table that lends a
    prior."""

    hardware: str
    measurement: str
    dtype: str = "bf16"
    sibling: str = ""


GEMMS: Mapping[str, Table] = MappingProxyType(
    {
        "a100": Table("a100_sxm_80gb", "a100_sxm/gemm/trtllm", sibling="a100_sxm/gemm/sglang"),
        "h100": Table("h100_sxm", "h100_sxm/gemm/trtllm", sibling="h100_sxm/gemm/sglang"),
        "h100_fp8": Table("h100_sxm", "h100_sxm/gemm/trtllm", "fp8"),
        "h200": Table("h200_sxm", "h200_sxm/gemm/trtllm"),
        "l40s": Table("l40s", "l40s/gemm/trtllm"),
        "rtx_pro_6000": Table("rtx_pro_6000", "rtx_pro_6000/gemm/trtllm"),
    }
)
OTHERS: tuple[str, ...] = (
    "a100_sglang",
    "h100_sglang",
    "l40s_sglang",
    "h200_from_h100",
    "rtx_4090",
    "attention",
    "elementwise",
)
"""What is judged otherwise: another stack's table, another device by its datasheet, one projection left out, and the other operators."""

TABLES: tuple[str, ...] = (*GEMMS, *OTHERS)


@dataclass(frozen=True)
class _Work:
    """One unit of the protocol."""

    table: str
    run: Callable[[], list[Row]]


def run_protocol(
    tables: Sequence[str] = ("all",),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    sizes: Sequence[int | None] = (100, 400, 4000, None),
    baselines: bool = True,
    progress: Progress | None = None,
) -> list[Row]:
    """Scores of every table, method, size and seed.

    Parameters
    ----------
    tables : sequence of str
        Of :data:`TABLES`; "all" for all of them (the RTX 4090's only where its rows are at hand).
    seeds : sequence of int
    sizes : sequence of int or None
        Training rows; None for all there are.
    baselines : bool
        Also judge those of :mod:`calibration.judge.baselines` on the same rows.
    progress : callable, optional
        Called with (units done, units in all).

    Returns
    -------
    list of dict
        "table", "method", "rows" (0: all), "trained_on", "seed", and the scores by name.

    Raises
    ------
    InputError
        For an unknown table, or one whose rows are not at hand.
    """
    chosen = TABLES if "all" in tables else tuple(tables)
    for name in chosen:
        if name not in TABLES:
            raise unknown("table", name, (*TABLES, "all"))
    units = [unit for name in chosen for unit in _units(name, seeds, sizes, baselines, required="all" not in tables)]
    out: list[Row] = []
    for done, unit in enumerate(units):
        out += unit.run()
        if progress is not None:
            progress(done + 1, len(units))
    return out


def _units(
    name: str, seeds: Sequence[int], sizes: Sequence[int | None], baselines: bool, required: bool
) -> Iterator[_Work]:
    if name in GEMMS:
        for seed in seeds:
            for size in sizes:
                yield _Work(name, lambda size=size, seed=seed: _gemm(name, size, seed, baselines))  # type: ignore[misc]
    elif name.endswith("_sglang"):
        for seed in seeds:
            yield _Work(name, lambda seed=seed: _other_stack(name, seed))  # type: ignore[misc]
    elif name == "h200_from_h100":
        yield _Work(name, _h200)
    elif name == "attention":
        for seed in seeds:
            yield _Work(name, lambda seed=seed: _attention(seed, sizes))  # type: ignore[misc]
    elif _rtx_rows() is not None:
        yield _Work(name, _rtx_4090 if name == "rtx_4090" else lambda: _elementwise(seeds, sizes))
    elif required:
        raise InputError(f"table {name}: its rows do not ship; set PRUNESIM_SHARED_DATA to their folder")


def _row(table: str, size: int | None, result: Result) -> Row:
    return {
        "table": table,
        "method": result.method,
        "rows": size or 0,
        "trained_on": result.rows,
        "seed": result.seed,
        **result.scores,
    }


@lru_cache(maxsize=8)
def gemm_shapes(measurement: str, hardware: str, dtype: str) -> Shapes:
    """GEMM rows of a shipped measurement as a fit takes them."""
    r = load_measurements(measurement, dtype)
    return shapes(r.m, r.n, r.k, r.seconds, machine_of(load_hardware(hardware), dtype), weight_copies(r))


@lru_cache(maxsize=8)
def fitted_section(measurement: str, hardware: str, dtype: str) -> Section:
    """A section fitted on every row of a measurement, without intervals of its own where it only lends a prior."""
    d = gemm_shapes(measurement, hardware, dtype)
    return fit_gemm(d.m, d.n, d.k, d.seconds, load_hardware(hardware), dtype=dtype, copies=d.copies).section


def _gemm(name: str, size: int | None, seed: int, baselines: bool) -> list[Row]:
    t = GEMMS[name]
    hw, data = load_hardware(t.hardware), gemm_shapes(t.measurement, t.hardware, t.dtype)
    found = [evaluate_table(data, hw, dtype=t.dtype, size=size, seed=seed)]
    if t.sibling and size is not None and size <= 1000:
        prior = fitted_section(t.sibling, t.hardware, t.dtype)
        found.append(evaluate_table(data, hw, dtype=t.dtype, size=size, seed=seed, prior=prior))
    if baselines:
        found += evaluate_baselines(data, hw, dtype=t.dtype, size=size, seed=seed)
    return [_row(name, size, result) for result in found]


def _other_stack(name: str, seed: int) -> list[Row]:
    t = GEMMS[name.removesuffix("_sglang")]
    hw = load_hardware(t.hardware)
    section = fitted_section(t.measurement, t.hardware, t.dtype)
    data = gemm_shapes(t.measurement.replace("trtllm", "sglang"), t.hardware, t.dtype)
    return [_row(name, result.rows or None, result) for result in transfer(section, data, hw, dtype=t.dtype, seed=seed)]


def _h200() -> list[Row]:
    source, target = GEMMS["h100"], GEMMS["h200"]
    section = fitted_section(source.measurement, source.hardware, source.dtype)
    data = gemm_shapes(target.measurement, target.hardware, target.dtype)
    scores = judge(section, data, load_hardware(target.hardware), target.dtype)
    return [_row("h200_from_h100", None, Result("H100's section on the H200's datasheet", 0, 0, scores))]


@lru_cache(maxsize=1)
def _rtx_rows() -> tuple[HardwareProfile, Records] | None:
    from calibration.fit.shipped import rtx_tables, shared_folder

    folder = shared_folder()
    hw = load_hardware("rtx_4090")
    return None if folder is None else (hw, rtx_tables(folder, hw))


def _rtx_4090() -> list[Row]:
    known = _rtx_rows()
    assert known is not None
    hw, r = known
    r = r.select(r.is_operator("gemm"))
    data = shapes(r.m, r.n, r.k, r.seconds, machine_of(hw, "bf16"), weight_copies(r))
    labels = np.array([f"n={int(n)} k={int(k)}" for n, k in zip(r.n, r.k, strict=True)])
    lender = fitted_section(GEMMS["l40s"].measurement, "l40s", "bf16")
    prior = replace(lender, arrays=MappingProxyType(smooth_arrays(lender.arrays)))
    out = []
    for name, lent in (("prunesim", None), ("prunesim + prior", prior)):
        for result in leave_one_out(data, labels, hw, prior=lent):
            out.append({**_row("rtx_4090", None, result), "method": f"{name}, one projection left out"})
    return out


def _attention(seed: int, sizes: Sequence[int | None]) -> list[Row]:
    from calibration.judge.protocol_attention import protocol

    wanted = tuple(size or 0 for size in sizes if size is None or size >= 400)
    out: list[Row] = []
    for r in protocol(seeds=(seed,), sizes=wanted):
        scores = {
            k.replace("speedup_", "speedup ").replace("_", " "): 100.0 * v
            for k, v in r.items()
            if isinstance(v, float) and k != "fit_s"
        }
        lowest = min([v for k, v in scores.items() if k.startswith("coverage ")] or [scores["coverage"]])
        method = f"{r['phase']}, unseen {r['question']}"
        out.append(
            {
                "table": f"attention {r['hardware']}",
                "method": method,
                "rows": r["rows"],
                "trained_on": r["rows"],
                "seed": seed,
                **scores,
                "lowest coverage": lowest,
                "width": 2.0 * scores["width"],
            }
        )
    return out


def _elementwise(seeds: Sequence[int], sizes: Sequence[int | None]) -> list[Row]:
    from calibration.fit.elementwise import score
    from simulator.kernels.elementwise import class_code

    known = _rtx_rows()
    assert known is not None
    hw, r = known
    r = r.select(r.is_operator("elementwise"))
    bytes_, code = r.read_bytes + r.write_bytes, class_code(r.role)
    out = []
    for size in sizes:
        for seed in seeds:
            if size is None or size >= 400:
                s = score(
                    bytes_, code, r.seconds, hw.l2_bytes, hw.bandwidth_bytes_per_s, hw.architecture, size or 0, seed
                )
                scores = {k.replace("_", " "): 100.0 * v for k, v in s.items()}
                out.append(
                    {
                        "table": "elementwise rtx_4090",
                        "method": "prunesim",
                        "rows": size or 0,
                        "trained_on": size or 0,
                        "seed": seed,
                        **scores,
                    }
                )
    return out


# -- means over seeds -------------------------------------------------------------------------------------------------------------

COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("MAPE", "mape", 2),
    ("median", "median", 2),
    ("p95", "p95", 1),
    ("bias", "bias", 2),
    ("m<=16", "mape m<=16", 1),
    ("17-256", "mape m<=256", 1),
    (">256", "mape m>256", 1),
    ("over 10 us", "mape over 10us", 2),
    ("speedup median", "speedup median", 2),
    ("speedup p95", "speedup p95", 1),
    ("Spearman", "speedup spearman", 3),
    ("coverage", "coverage", 1),
    ("lowest", "lowest coverage", 1),
    ("width", "width", 1),
)
"""Columns of a table: title, score, digits; those that no row of the table has are left out."""


def titles(rows: Sequence[Row]) -> list[str]:
    """Tables in the order they were run."""
    return list(dict.fromkeys(str(r["table"]) for r in rows))


def means(rows: Sequence[Row], table: str) -> list[Row]:
    """Rows of one table, averaged over seeds."""
    mine = [r for r in rows if r["table"] == table]
    out = []
    for method, size in dict.fromkeys((r["method"], r["rows"]) for r in mine):
        group = [r for r in mine if (r["method"], r["rows"]) == (method, size)]
        names = [n for n, v in group[0].items() if isinstance(v, float) and all(n in r for r in group)]
        out.append(
            {
                "method": method,
                "rows": size,
                "seeds": len(group),
                **{n: float(np.mean([r[n] for r in group])) for n in names},
            }
        )
    return sorted(out, key=lambda r: r["rows"] or 10**9) if len({r["rows"] for r in out}) > 1 else out


def columns_of_table(rows: Sequence[Row], table: str) -> list[tuple[str, list[str]]]:
    """One table as (title, cells), means over seeds."""
    found = means(rows, table)
    columns = [
        ("method", [str(r["method"]) for r in found]),
        ("rows", [str(r["rows"] or ("-" if "as shipped" in r["method"] else "all")) for r in found]),
    ]
    for title, score, digits in COLUMNS:
        if any(score in r for r in found):
            columns.append(
                (title, [f"{r[score]:.{digits}f}" if score in r and r[score] == r[score] else "" for r in found])
            )
    return columns
