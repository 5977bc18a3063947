"""Evaluation on a held-out software stack or GPU, as shipped and after a local update with 20 to 400 rows.

Use :func:`evaluate_held_out` where a profile fitted on one stack of a device predicts the rows of another, and
:func:`evaluate_datasheet` where the defaults of an architecture predict a device whose fits are left out, as for a GPU
without any table. Simpler alternatives to the local update (:data:`ALTERNATIVES`) are one factor and three constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibration.fit.gemm import GemmFit
from calibration.fit.local_update import update_profile
from calibration.validation.protocol import MeasuredRows, Row, coverage, errors, ratio_coverage, row, speedups
from simulator.arrays import FloatArray, IndexArray
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import Section

SIZES = (20, 100, 400)
MOST_ROWS, MOST_PAIRS = 3000, 4000
"""Held-out rows, and pairs of them, that a stack is evaluated on; of more, a random sample."""
ALTERNATIVES: tuple[str, ...] = ("factor", "three")
"""Simpler alternatives to the local update, for GEMMs: one factor, three constants."""


def one_factor(hw: HardwareProfile, rows: MeasuredRows, test: MeasuredRows) -> FloatArray:
    """Return all times multiplied by the median ratio of the local ones."""
    ratio = np.median(rows.data.seconds / rows.times(hw).seconds)
    return np.asarray(ratio * test.times(hw).seconds)


def three_constants(section: Section, rows: MeasuredRows, test: MeasuredRows) -> FloatArray:
    """Return times with three constants of a GEMM section fitted to local rows, near their previous values."""
    assert isinstance(rows.data, GemmFit)
    values = {name: constant.value for name, constant in section.constants.items()}
    fit = replace(rows.data, start=values, prior=section, free=("t0", "e_tc", "e_d")).constants()
    constants = {name: replace(constant, value=fit.values[name]) for name, constant in section.constants.items()}
    return test.times(test.profile(replace(section, constants=constants))).seconds


def evaluate_held_out(section: Section, table: MeasuredRows, seed: int, sizes: Sequence[int] = SIZES) -> list[Row]:
    """Evaluate a section of one stack on another stack's table: as shipped, and after an update with some of the
    table's rows, by each method; all on the same rows of the test groups."""
    test = _Test.of(table, seed)
    hw = table.profile(section, same_stack=False)
    out = [row("as shipped", seed, 0, test.scores(hw))]
    for size in sizes:
        rows = table.train_test(size, seed)[0]
        out.append(row("posterior", seed, size, test.scores(update_profile(hw, rows.records()).profile), rows=size))
        for name in ALTERNATIVES if isinstance(table.data, GemmFit) else ():
            seconds = one_factor(hw, rows, test.rows) if name == "factor" else three_constants(section, rows, test.rows)
            out.append(row(name, seed, size, test.errors(seconds), rows=size))
    return out


def evaluate_datasheet(hw: HardwareProfile, table: MeasuredRows, others: MeasuredRows | None, seed: int) -> list[Row]:
    """Evaluate a profile without fits on a table of its device: as it is, updated with some of the table's rows, and
    updated with as many rows of another operator (``others``), whose method is "other rows"."""
    test = _Test.of(table, seed)
    out = [row("as shipped", seed, 0, test.scores(hw))]
    for size in (20, 100):
        for method, source in (("posterior", table), ("other rows", others)):
            if source is not None:
                records = source.train_test(size, seed)[0].records()
                try:
                    updated = update_profile(hw, records).profile
                except InputError:  # the defaults are off by more than an update accepts
                    continue
                out.append(row(method, seed, size, test.scores(updated), rows=size))
    return out


@dataclass(frozen=True)
class _Test:
    """Held-out rows of a table, and pairs of them whose ratio is evaluated."""

    rows: MeasuredRows
    pairs: IndexArray

    @classmethod
    def of(cls, table: MeasuredRows, seed: int) -> _Test:
        """Return a sample of the rows of the test groups."""
        rng = np.random.default_rng(seed + 50)
        unseen = table.train_test(None, seed)[1]
        rows = unseen.take(np.sort(rng.permutation(len(unseen.data))[:MOST_ROWS]))
        pairs = rows.pairs()
        return cls(rows, pairs[np.sort(rng.permutation(len(pairs))[:MOST_PAIRS])])

    def errors(self, seconds: FloatArray) -> dict[str, float]:
        """Return the errors of predicted times and of their ratios."""
        return {**errors(seconds, self.rows.data), **speedups(seconds, self.rows.data, self.pairs)}

    def scores(self, hw: HardwareProfile) -> dict[str, float]:
        """Return errors and coverage of times and ratios by a profile."""
        predicted = self.rows.predicted(hw)
        ratios = ratio_coverage(predicted, hw, self.rows.data.seconds, self.pairs)
        return {**self.errors(predicted.time.seconds), **coverage(predicted.time, self.rows.data), **ratios}
