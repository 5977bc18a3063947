"""Effect of each mechanism of the GEMM model: fits without one mechanism, for ``docs/generated/ablations.md``.

Every variant is fitted on the training rows of the protocol's splits, without residual, and evaluated on the held-out
(n, k) pairs. A mechanism is removed by holding its constant at the value at which it takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from calibration.fit.gemm import GemmFit, free_constants, starting_constants
from calibration.measurements.wheel import CHOICES
from calibration.validation.accuracy import GEMMS
from calibration.validation.accuracy_tables import titles
from calibration.validation.protocol import MeasuredRows, Row, errors
from calibration.validation.report import table
from simulator.arrays import FloatArray
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile

SEEDS = (10, 11, 12)
"""Splits of this page: structure is chosen on seeds 10-19, the accuracy page reports 0-2."""
TABLES = ("a100", "h100")


@dataclass(frozen=True)
class Variant:
    """The analytical model without one mechanism."""

    name: str
    about: str
    fixed: Mapping[str, float] = field(default_factory=dict)  # constants with a fixed value instead of a fitted one
    idle: tuple[str, ...] = ()  # constants without effect in the variant, which keep their default
    cold: bool = False  # treats weights as cold although the benchmark rotated few
    swapped: bool = False  # uses the other architecture's kernels
    persistent: bool | None = None  # kind of kernels that have the mechanism; None: both


FULL = Variant("nothing", "the complete analytical model")
VARIANTS: tuple[Variant, ...] = (
    FULL,
    Variant("no launch time", "`t0` = 0", {"t0": 0.0}),
    Variant("no split-K", "`t_s` infinite", {"t_s": np.inf}, ("b_s",)),
    Variant("no step latency", "`tau` = 0: a main-loop step takes the time of its FLOPs", {"tau": 0.0}),
    Variant("no epilogue", "`b_e` infinite: storing a finished tile takes no time", {"b_e": np.inf}),
    Variant("no L2 feed", "`b_l2` infinite: operands reach the SMs in no time", {"b_l2": np.inf}, persistent=False),
    Variant("no L2 residency", "`c_l2` = 1e-9: every byte comes from DRAM", {"c_l2": 1e-9}, ("b_hit",)),
    Variant("datasheet FLOP rate", "`e_tc` = 1", {"e_tc": 1.0}),
    Variant("datasheet bandwidth", "`e_d` = 1", {"e_d": 1.0}),
    Variant("weights counted as cold", "as if a benchmark that rotates six weights never found one in L2", cold=True),
    Variant(
        "kernels of the other kind",
        "A100: blocks that stay on their SM, no whole waves, no L2 feed; H100: whole waves and L2 feed",
        swapped=True,
    ),
)
"""Variants in the order of the page."""


def profile_of(variant: Variant, hw: HardwareProfile) -> HardwareProfile:
    """Return the profile for the fit of a variant; ``swapped`` exchanges the kernels of Hopper and other devices."""
    return replace(hw, architecture="ampere" if hw.architecture == "hopper" else "hopper") if variant.swapped else hw


def fit_variant(variant: Variant, measured: MeasuredRows, seed: int = 0) -> dict[str, float]:
    """Return the constants fitted as in :func:`calibration.fit.gemm.fit_gemm`, without the mechanism that the variant
    removes."""
    data = measured.data
    assert isinstance(data, GemmFit)
    start = {**starting_constants(measured.hw, measured.dtype), **variant.fixed}
    free = tuple(n for n in free_constants(data.calls.machine) if n not in {*variant.fixed, *variant.idle})
    return dict(replace(data, start=start, free=free, seed=seed).constants().values)


Unit = tuple[str, Variant, int]


def units(tables: Sequence[str] = TABLES, seeds: Sequence[int] = SEEDS) -> Iterator[Unit]:
    """Yield table, variant and seed of every fit of the page."""
    for name in tables:
        persistent = load_hardware(CHOICES[GEMMS[name].measurement].hardware).architecture == "hopper"
        for variant in VARIANTS:
            if variant.persistent in (None, persistent):
                yield from ((name, variant, seed) for seed in seeds)


def run(unit: Unit, measured: MeasuredRows | None = None, size: int | None = None) -> Row:
    """Return the error of one fit to ``size`` training rows (None: all) of the shipped table, or of ``measured``."""
    name, variant, seed = unit
    measured = measured or GEMMS[name].load()
    data = measured.data
    assert isinstance(data, GemmFit)
    hw = profile_of(variant, measured.hw)
    copies = np.full(len(data), np.inf) if variant.cold else data.calls.copies
    machine = replace(data.calls.machine, persistent=hw.architecture in ("hopper", "blackwell_sm100"))
    calls = replace(data.calls, copies=copies, machine=machine)
    train, test = MeasuredRows(replace(data, calls=calls), hw, measured.dtype).train_test(size, seed)
    predicted = test.data.calls.seconds(fit_variant(variant, train, seed))
    mape = errors(predicted, test.data)["mape"]
    return {"table": name, "variant": variant.name, "seed": seed, "rows": len(train.data), "mape": mape}


def run_all(report: Callable[[str], None]) -> list[Row]:
    """Return the rows of every fit of the page."""
    out, fits = [], list(units())
    for name, variant, seed in fits:
        out.append(run((name, variant, seed)))
        report(f"{len(out)}/{len(fits)} {name}, {variant.name}, split {seed}: {out[-1]['mape']:.2f} %")
    return out


def tables(rows: Sequence[Row]) -> list[str]:
    """Return the tables of ``docs/generated/ablations.md``, one per GPU, from rows of :func:`run`."""
    rows = sorted(rows, key=lambda r: int(r["seed"]))
    return [_table([r for r in rows if r["table"] == name]) for name in titles(rows)]


def _table(rows: Sequence[Row]) -> str:
    """Return the table of one GPU: error of each variant, and its difference to the complete model."""
    by_variant: dict[str, list[float]] = {}
    for r in rows:
        by_variant.setdefault(r["variant"], []).append(r["mape"])
    full = np.array(by_variant[FULL.name])
    out = []
    for v in VARIANTS:
        if v.name in by_variant:
            mapes = np.array(by_variant[v.name])
            difference = "" if v is FULL else _difference(mapes, full)
            out.append([v.name, v.about, f"{mapes.mean():.2f}", difference])
    return table(["removed", "change", "MAPE", "difference"], out, left=(0, 1))


def _difference(values: FloatArray, reference: FloatArray) -> str:
    """Return the mean of a paired difference and its standard error.

    >>> _difference(np.array([4.0, 4.2, 4.1]), np.array([4.0, 4.0, 4.0]))
    '+0.10 ± 0.06'
    """
    difference = values - reference
    error = f" ± {difference.std(ddof=1) / np.sqrt(len(difference)):.2f}" if len(difference) > 1 else ""
    return f"{difference.mean():+.2f}{error}"
