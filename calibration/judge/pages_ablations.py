"""What each part of the GEMM model is worth: ``docs/ablations.md``, made by ``python -m calibration.judge.pages ablations -o FILE``.

Every variant leaves one thing out, is fitted anew on the training rows of the protocol's splits and judged on the (n, k) pairs kept unseen,
by :func:`calibration.judge.protocol.evaluate_table`. A mechanism of the analytic form is left out by holding its constant at the value at which
it takes no time; a lattice by not fitting it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit.conformal import bands, pair_bands
from calibration.fit.core import Shapes, fit_constants, free_constants, machine_of, shapes, timed
from calibration.fit.gemm import FOLDS, accuracy, starting_constants
from calibration.fit.residual import FINE_TERMS, OWN, SUPPLE, Block, blocks, evaluate, residual_from, solve
from calibration.fit.solver import FittedPart
from calibration.judge.accuracy import GEMMS, Row, gemm_shapes
from calibration.judge.pages_tables import left
from calibration.judge.protocol import evaluate_table
from calibration.judge.report import table
from simulator.hardware.library import load_hardware
from simulator.hardware.parts import Fitted, Section
from simulator.hardware.profile import HardwareProfile
from simulator.kernels.gemm_core import machine_core
from simulator.kernels.lattice import residual_arrays

F = NDArray[np.float64]

SEEDS = (10, 11, 12)
"""Splits of this page: structure is chosen on seeds 10-19, the accuracy page reports 0-2."""
TABLES = ("a100", "h100")

WAVES = frozenset({"tiles", "blocks", "tile", "tiles64", "idle256", "last128", "idle"})
"""Coordinates that count tiles and waves."""


@dataclass(frozen=True)
class Variant:
    """The model without one thing.

    Attributes
    ----------
    name, about : str
    fixed : mapping of str to float
        Constants held at these values instead of being fitted.
    idle : tuple of str
        Constants without meaning then, which keep their default.
    smooth : bool
        Whether the smooth lattice is fitted.
    without : frozenset of str
        Own lattices with one of these coordinates are not fitted; "*" leaves out all of them.
    cold : bool
        Weights count as cold although the benchmark rotated few of them.
    swapped : bool
        The kernels of the other architecture: see :func:`profile_of`.
    persistent : bool, optional
        Kind of kernels that have the mechanism; None: both.
    """

    name: str
    about: str
    fixed: Mapping[str, float] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    smooth: bool = True
    without: frozenset[str] = frozenset()
    cold: bool = False
    swapped: bool = False
    persistent: bool | None = None

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
        return replace(self, smooth=False, without=frozenset("*"))


FULL = Variant("as it ships", "every mechanism, the smooth lattice and the stack's own ones")

VARIANTS: tuple[Variant, ...] = (
    FULL,
    Variant("no residual", "the analytic form alone", smooth=False, without=frozenset("*")),
    Variant("smooth lattice alone", "no lattice in coordinates of the kernel", without=frozenset("*")),
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
    Variant(
        "kernels of the other kind",
        "A100: blocks that stay, no whole waves, no L2 feed; H100: whole waves and L2 feed",
        swapped=True,
    ),
)
"""What is left out, in the order of the page."""


def profile_of(variant: Variant, hw: HardwareProfile) -> HardwareProfile:
    """The profile a variant is fitted for: with "swapped", Hopper's kind of kernels on another device and Ampere's on a Hopper one.

    >>> profile_of(VARIANTS[-1], load_hardware("h100")).architecture
    'ampere'
    """
    return replace(hw, architecture="ampere" if hw.architecture == "hopper" else "hopper") if variant.swapped else hw


def fit_variant(
    variant: Variant,
    m: Any,
    n: Any,
    k: Any,
    seconds: Any,
    hw: HardwareProfile,
    *,
    dtype: str = "bf16",
    copies: Any = None,
    prior: Section | None = None,
    seed: int = 0,
) -> FittedPart:
    """:func:`calibration.fit.gemm.fit_gemm` for many rows, without what the variant leaves out.

    Parameters
    ----------
    variant : Variant
    m, n, k, seconds, hw, dtype, copies, seed
        As in ``fit_gemm``; at least :data:`calibration.fit.FINE_ROWS` rows.
    prior : None
        Not used: a variant stands on its own rows.

    Returns
    -------
    FittedPart
    """
    machine = machine_of(hw, dtype)
    data = shapes(m, n, k, seconds, machine, copies)
    held = {*variant.fixed, *variant.idle}
    start = starting_constants(hw, dtype) | dict(variant.fixed)
    constants = fit_constants(
        data, machine, start, [name for name in free_constants(machine) if name not in held], seed=seed
    )
    core, parts = machine_core(machine, constants.values), timed(data, machine, constants.values)
    target = np.log(data.seconds * 1e6 / parts.total_us)
    own = (
        ()
        if "*" in variant.without
        else tuple(a for a in FINE_TERMS[machine.persistent] if not variant.without & set(a))
    )
    lattices = blocks(data, parts, core, own, data.m, SUPPLE, OWN)[0 if variant.smooth else 1 :]
    groups = data.groups
    unseen = _unseen(lattices, target, np.random.default_rng(seed).permutation(groups.max() + 1)[groups] % FOLDS)
    arrays = residual_arrays(residual_from(lattices, solve(lattices, target), data.m), data.m) if lattices else {}
    intervals = (*bands(unseen, data.m, parts, core, int(groups.max()) + 1), *pair_bands(unseen, data))
    fitted = {name: Fitted(float(value), None, "fitted") for name, value in constants.values.items()}
    section = Section(
        MappingProxyType(fitted),
        MappingProxyType(arrays),
        intervals,
        MappingProxyType(accuracy(unseen, data.m)),
        None,
        "calibrated",
    )
    return FittedPart(section, constants, len(data), unseen)


def _unseen(lattices: list[Block], target: F, fold: NDArray[np.intp]) -> F:
    """Log of predicted over measured of each row, by lattices fitted to the other folds."""
    if not lattices:
        return -target  # a dozen constants know nothing of a single one of thousands of rows
    out = np.empty(len(target))
    for i in range(int(fold.max()) + 1):
        test = np.flatnonzero(fold == i)
        out[test] = evaluate(lattices, solve(lattices, target, np.flatnonzero(fold != i)), test) - target[test]
    return out


def units(tables: Sequence[str] = TABLES, seeds: Sequence[int] = SEEDS) -> Iterator[tuple[str, Variant, int]]:
    """Table, variant and seed of every fit of the page; a mechanism comes twice, the second time without any residual."""
    for name in tables:
        persistent = load_hardware(GEMMS[name].hardware).architecture == "hopper"
        for variant in VARIANTS:
            if variant.persistent in (None, persistent):
                for seed in seeds:
                    yield name, variant, seed
                    if variant.mechanism:
                        yield name, variant.alone, seed


def run(
    unit: tuple[str, Variant, int],
    load: Callable[[str], tuple[HardwareProfile, Shapes]] | None = None,
    size: int | None = None,
) -> Row:
    """Scores of one fit.

    Parameters
    ----------
    unit : tuple of str, Variant, int
        From :func:`units`.
    load : callable, optional
        Table -> profile and shapes; by default the shipped ones.
    size : int, optional
        Training rows; all by default.
    """
    name, variant, seed = unit
    hw, data = (load or _shipped)(name)
    if variant.cold:
        data = replace(data, copies=np.full(len(data), np.inf))
    result = evaluate_table(data, profile_of(variant, hw), size=size, seed=seed, fit=partial(fit_variant, variant))
    kept = ("mape", "median", "p95", "speedup median", "speedup p95", "coverage", "lowest coverage", "width")
    return {
        "table": name,
        "variant": variant.name,
        "alone": variant.bare,
        "seed": seed,
        "rows": result.rows,
        **{score: result.scores[score] for score in kept},
    }


def unit_key(unit: tuple[str, Variant, int]) -> tuple[str, str, bool, int]:
    """What tells a fit of the page from the others."""
    name, variant, seed = unit
    return name, variant.name, variant.bare, seed


def key(row: Row) -> tuple[str, str, bool, int]:
    """The same of a row of :func:`run`."""
    return row["table"], row["variant"], row["alone"], row["seed"]


def _shipped(name: str) -> tuple[HardwareProfile, Shapes]:
    t = GEMMS[name]
    return load_hardware(t.hardware), gemm_shapes(t.measurement, t.hardware, t.dtype)


HEAD = """\
# Ablations

Made by `python -m calibration.judge.pages ablations -o docs/ablations.md` (twenty minutes on one core; `--results` keeps its rows and goes on
from them). Each line leaves one thing out of the GEMM model ([model.md](model.md)), fits what is left anew on all rows of the training
pairs, and scores every row of the (n, k) pairs kept unseen, as [accuracy.md](accuracy.md) does. Numbers are percent and means over the
splits {seeds}, on which structure may be chosen; the accuracy page reports seeds 0-2, so that its numbers differ a little.

A difference is to the first line, in points of MAPE, with its standard error over the splits; one of less than twice that says nothing.
"Form alone" drops the residual too. With all rows the lattices learn most of what a missing mechanism explains, so that the difference
beside the residual is small; the form alone shows what the mechanism explains by itself, which counts where rows are few, on another stack,
and outside the table, where a lattice holds its edge.
"""


def page(rows: Sequence[Row]) -> str:
    """``docs/ablations.md`` of rows of :func:`run`."""
    lines = [HEAD.format(seeds=", ".join(str(s) for s in sorted({r["seed"] for r in rows})))]
    for name in dict.fromkeys(str(r["table"]) for r in rows):
        mine = [r for r in rows if r["table"] == name]
        lines += [
            f"## {name.upper()} bf16",
            "",
            f"`{GEMMS[name].measurement}`, {mine[0]['rows']:,} training rows on split {mine[0]['seed']}.",
            "",
        ]
        lines += [
            "### Of the residual",
            "",
            _table(mine, False),
            "",
            "### Of the analytic form",
            "",
            _table(mine, True),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _scores(rows: Sequence[Row], variant: Variant, alone: bool) -> Mapping[str, F]:
    """Scores of one variant by split."""
    own = [r for r in rows if r["variant"] == variant.name and r["alone"] == alone]
    names = [name for name, value in own[0].items() if isinstance(value, float)] if own else []
    return {name: np.array([r[name] for r in sorted(own, key=lambda r: int(r["seed"]))]) for name in names}


def _difference(mine: F, reference: F) -> str:
    """Mean of a paired difference and its standard error.

    >>> _difference(np.array([4.0, 4.2, 4.1]), np.array([4.0, 4.0, 4.0]))
    '+0.10 ± 0.06'
    """
    apart = mine - reference
    error = f" ± {apart.std(ddof=1) / np.sqrt(len(apart)):.2f}" if len(apart) > 1 else ""
    return f"{apart.mean():+.2f}{error}"


def _table(rows: Sequence[Row], mechanisms: bool) -> str:
    """Lines of one table of the page: of the residual, or of the mechanisms, which have a column of the form alone."""
    bare_variant = VARIANTS[1]
    full, bare = _scores(rows, FULL, False), _scores(rows, bare_variant, True)
    out = []
    for v in VARIANTS:
        found = _scores(rows, v, v is bare_variant)
        if not found or (v.mechanism != mechanisms and v is not FULL):
            continue
        line = [
            v.name,
            v.about,
            f"{found['mape'].mean():.2f}",
            "" if v is FULL else _difference(found["mape"], full["mape"]),
        ]
        line += [f"{found['speedup median'].mean():.2f}", f"{found['speedup p95'].mean():.1f}"]
        line += [
            f"{found['coverage'].mean():.1f}, lowest {found['lowest coverage'].mean():.1f}",
            f"{found['width'].mean():.1f}",
        ]
        if mechanisms:
            alone = bare if v is FULL else _scores(rows, v, True)
            line += [f"{alone['mape'].mean():.2f}", "" if v is FULL else _difference(alone["mape"], bare["mape"])]
        out.append(line)
    header = ["left out", "how", "MAPE", "difference", "speedup median", "speedup p95", "coverage of 90 %", "width"]
    return left(table([*header, "form alone, MAPE", "difference"] if mechanisms else header, out), 1)
