"""What each part of the GEMM model is worth: fits that leave one thing out, judged like the whole; and
``docs/ablations.md``.

Every variant is fitted anew on the training rows of the protocol's splits and judged on the (n, k) pairs kept unseen,
by :func:`calibration.validation.protocol.judge`. A mechanism of the analytic form is left out by holding its
constant at the value at which it takes no time; a lattice by not fitting it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from calibration.fit.core import free_constants
from calibration.fit.gemm import Problem, starting_constants
from calibration.fit.residual import FINE_TERMS
from calibration.measurements.wheel import CHOICES
from calibration.validation.accuracy import GEMMS, titles
from calibration.validation.protocol import Measured, Row, judge
from calibration.validation.report import table
from simulator.arrays import FloatArray
from simulator.cost.base import Machine
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile, Section

SEEDS = (10, 11, 12)
"""Splits of this page: structure is chosen on seeds 10-19, the accuracy page reports 0-2."""
TABLES = ("a100", "h100")
SCORES = ("mape", "median", "p95", "speedup median", "speedup p95", "coverage", "lowest coverage", "width")

WAVES = frozenset({"tiles", "blocks", "tile", "tiles64", "idle256", "last128", "idle"})
"""Coordinates that count tiles and waves."""
EVERY = frozenset({"*"})


@dataclass(frozen=True)
class Variant:
    """The model without one thing."""

    name: str
    about: str
    fixed: Mapping[str, float] = field(default_factory=dict)  # constants at a value instead of being fitted
    idle: tuple[str, ...] = ()  # those without meaning then, which keep their default
    smooth: bool = True  # with the smooth lattice
    without: frozenset[str] = frozenset()  # no own lattice in one of these coordinates ("*": none at all)
    cold: bool = False  # weights count as cold although the benchmark rotated few
    swapped: bool = False  # the other architecture's kernels
    persistent: bool | None = None  # the kind of kernels that have the mechanism; None: both

    @property
    def mechanism(self) -> bool:
        """Whether it is the analytic form that lacks something, rather than the residual."""
        return bool(self.fixed or self.cold or self.swapped)

    @property
    def bare(self) -> bool:
        """Whether nothing of the residual is left."""
        return not self.smooth and "*" in self.without

    @property
    def alone(self) -> Variant:
        """The same without any residual."""
        return replace(self, smooth=False, without=EVERY)


FULL = Variant("as it ships", "every mechanism, the smooth lattice and the stack's own ones")
BARE = Variant("no residual", "the analytic form alone", smooth=False, without=EVERY)
OTHER_KIND = "A100: blocks that stay, no whole waves, no L2 feed; H100: whole waves and L2 feed"

VARIANTS: tuple[Variant, ...] = (
    FULL,
    BARE,
    Variant("smooth lattice alone", "no lattice in coordinates of the kernel", without=EVERY),
    Variant("own lattices alone", "no smooth lattice over m, n, k", smooth=False),
    Variant("no lattice at single m", "none of `m_exact` and `m_step`", without=frozenset({"m_exact", "m_step"})),
    Variant("no lattice on waves", "none that counts tiles, waves or idle SMs", without=WAVES),
    Variant("no lattice on time", "none of the analytic time", without=frozenset({"time"})),
    Variant("no lattice on nk", "none of the size of the weight", without=frozenset({"nk"})),
    Variant("no launch time", "`t0` = 0", {"t0": 0.0}),
    Variant("no split-K", "`t_s` infinite: no shape splits", {"t_s": np.inf}, ("b_s",)),
    Variant("no step latency", "`tau` = 0: a main-loop step takes what its FLOPs take", {"tau": 0.0}),
    Variant("no epilogue", "`b_e` infinite: a finished tile is stored in no time", {"b_e": np.inf}),
    Variant("no L2 feed", "`b_l2` infinite: operands reach the SMs in no time", {"b_l2": np.inf}, persistent=False),
    Variant("no L2 residency", "`c_l2` = 1e-9: every byte comes from DRAM", {"c_l2": 1e-9}, ("b_hit",)),
    Variant("datasheet FLOP rate", "`e_tc` = 1", {"e_tc": 1.0}),
    Variant("datasheet bandwidth", "`e_d` = 1", {"e_d": 1.0}),
    Variant("weights counted cold", "as if a benchmark that rotates six weights never found one in L2", cold=True),
    Variant("kernels of the other kind", OTHER_KIND, swapped=True),
)
"""What is left out, in the order of the page."""


def profile_of(variant: Variant, hw: HardwareProfile) -> HardwareProfile:
    """The profile a variant is fitted for: with "swapped", Hopper's kind of kernels on another device and Ampere's on a
    Hopper one."""
    return replace(hw, architecture="ampere" if hw.architecture == "hopper" else "hopper") if variant.swapped else hw


def fit_variant(variant: Variant, table: Measured, seed: int = 0) -> Section:
    """The section of :func:`calibration.fit.gemm.fit_gemm` for at least ``FINE_ROWS`` rows, without what the variant
    leaves out."""
    machine, start = Machine.of(table.hw, table.dtype), starting_constants(table.hw, table.dtype)
    free = tuple(name for name in free_constants(machine) if name not in {*variant.fixed, *variant.idle})
    terms = () if "*" in variant.without else FINE_TERMS[machine.persistent]
    own = tuple(term for term in terms if not variant.without & set(term))
    problem = Problem(machine, {**start, **variant.fixed}, own, None, seed, free, variant.smooth)
    return problem.fit(table.data).section


Unit = tuple[str, Variant, int]


def units(tables: Sequence[str] = TABLES, seeds: Sequence[int] = SEEDS) -> Iterator[Unit]:
    """Table, variant and seed of every fit of the page; a mechanism comes twice, the second time without any
    residual."""
    for name in tables:
        persistent = load_hardware(CHOICES[GEMMS[name].measurement].hardware).architecture == "hopper"
        for variant in VARIANTS:
            if variant.persistent in (None, persistent):
                for seed in seeds:
                    yield name, variant, seed
                    if variant.mechanism:
                        yield name, variant.alone, seed


def run(unit: Unit, table: Measured | None = None, size: int | None = None) -> Row:
    """Scores of one fit to ``size`` training rows (all by default) of the shipped table, or of the one given."""
    name, variant, seed = unit
    table = table or GEMMS[name].load()
    copies = np.full(len(table.data), np.inf) if variant.cold else table.data.copies
    table = Measured(replace(table.data, copies=copies), profile_of(variant, table.hw), table.dtype)
    own, unseen = table.drawn(size, seed)
    scores = judge(fit_variant(variant, own, seed), unseen)
    row = {"table": name, "variant": variant.name, "alone": variant.bare, "seed": seed, "rows": len(own.data)}
    return {**row, **{score: scores[score] for score in SCORES}}


def run_all(say: Callable[[str], None]) -> list[Row]:
    """Rows of every fit of the page."""
    out, todo = [], list(units())
    for name, variant, seed in todo:
        out.append(run((name, variant, seed)))
        say(f"{len(out)}/{len(todo)} {name}, {variant.name}, split {seed}: {out[-1]['mape']:.2f} %")
    return out


def tables(rows: Sequence[Row]) -> list[str]:
    """Tables of ``docs/ablations.md``, of rows of :func:`run`: of the residual, then of the analytic form, for each
    GPU."""
    names = titles(rows)
    mine = [sorted((r for r in rows if r["table"] == name), key=lambda r: int(r["seed"])) for name in names]
    return [_table(own, mechanisms) for own in mine for mechanisms in (False, True)]


def _table(rows: Sequence[Row], mechanisms: bool) -> str:
    """Variants of the residual, or of the mechanisms, which have a column of the form alone."""
    by_split: dict[tuple[str, bool], list[list[float]]] = {}
    for r in rows:
        by_split.setdefault((r["variant"], r["alone"]), []).append([r[name] for name in SCORES])
    scores = {fit: dict(zip(SCORES, np.array(values).T, strict=True)) for fit, values in by_split.items()}
    full, form = scores[FULL.name, False]["mape"], scores[BARE.name, True]["mape"]
    out = []
    for v in VARIANTS:
        own = scores.get((v.name, v.bare))
        if own is None or (v.mechanism != mechanisms and v is not FULL):
            continue
        mean = {name: values.mean() for name, values in own.items()}
        line = [v.name, v.about, f"{mean['mape']:.2f}", _difference(own["mape"], full)]
        line += [f"{mean['speedup median']:.2f}", f"{mean['speedup p95']:.1f}"]
        line += [f"{mean['coverage']:.1f}, lowest {mean['lowest coverage']:.1f}", f"{mean['width']:.1f}"]
        if mechanisms:
            alone = form if v is FULL else scores[v.name, True]["mape"]
            line += [f"{alone.mean():.2f}", _difference(alone, form)]
        out.append(line)
    header = ["left out", "how", "MAPE", "difference", "speedup median", "speedup p95", "coverage of 90 %", "width"]
    return table([*header, "form alone, MAPE", "difference"] if mechanisms else header, out, left=(0, 1))


def _difference(mine: FloatArray, reference: FloatArray) -> str:
    """Mean of a paired difference and its standard error; nothing for the reference itself.

    >>> _difference(np.array([4.0, 4.2, 4.1]), np.array([4.0, 4.0, 4.0]))
    '+0.10 ± 0.06'
    """
    if mine is reference:
        return ""
    apart = mine - reference
    error = f" ± {apart.std(ddof=1) / np.sqrt(len(apart)):.2f}" if len(apart) > 1 else ""
    return f"{apart.mean():+.2f}{error}"
