"""Evaluation on a held-out software stack: a profile fitted on one stack of a device predicts the rows of another, as
shipped and after a local update with 20 to 400 of its rows.

Use :func:`evaluate_held_out` for one pair of stacks and seed. Simpler alternatives to the local update
(:data:`ALTERNATIVES`) are one factor and three constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibration.fit.gemm import GemmFit
from calibration.fit.local_update import update_profile
from calibration.validation.protocol import Measured, Row, coverage, errors, ratio_coverage, row, speedups
from simulator.arrays import FloatArray
from simulator.hardware.profile import HardwareProfile, Section

SIZES = (20, 100, 400)
MOST_ROWS, MOST_PAIRS = 3000, 4000
"""Held-out rows, and pairs of them, that a stack is evaluated on; of more, a random sample."""
ALTERNATIVES: tuple[str, ...] = ("factor", "three")
"""Simpler alternatives to the local update, for GEMMs: one factor, three constants."""


def one_factor(hw: HardwareProfile, rows: Measured, test: Measured) -> FloatArray:
    """Return all times multiplied by the median ratio of the local ones."""
    ratio = np.median(rows.data.seconds / rows.times(hw).seconds)
    return np.asarray(ratio * test.times(hw).seconds)


def three_constants(section: Section, rows: Measured, test: Measured) -> FloatArray:
    """Return times with three constants of a GEMM section fitted to local rows, near their previous values."""
    assert isinstance(rows.data, GemmFit)
    values = {name: constant.value for name, constant in section.constants.items()}
    fit = replace(rows.data, start=values, prior=section, free=("t0", "e_tc", "e_d")).constants()
    constants = {name: replace(constant, value=fit.values[name]) for name, constant in section.constants.items()}
    return test.times(test.profile(replace(section, constants=constants))).seconds


def evaluate_held_out(section: Section, table: Measured, seed: int, sizes: Sequence[int] = SIZES) -> list[Row]:
    """Evaluate a section of one stack on another stack's table: as shipped, and after an update with some of the
    table's rows, by each method; all on the same rows of the test groups."""
    rng = np.random.default_rng(seed + 50)
    unseen = table.train_test(None, seed)[1]
    test = unseen.take(np.sort(rng.permutation(len(unseen.data))[:MOST_ROWS]))
    pairs = test.pairs()
    pairs = pairs[np.sort(rng.permutation(len(pairs))[:MOST_PAIRS])]

    def scores(seconds: FloatArray) -> dict[str, float]:
        return {**errors(seconds, test.data), **speedups(seconds, test.data, pairs)}

    def all_scores(hw: HardwareProfile) -> dict[str, float]:
        predicted = test.predicted(hw)
        ratios = ratio_coverage(predicted, hw, test.data.seconds, pairs)
        return {**scores(predicted.time.seconds), **coverage(predicted.time, test.data), **ratios}

    hw = table.profile(section, same_stack=False)
    out = [row("as shipped", seed, 0, all_scores(hw))]
    for size in sizes:
        rows = table.train_test(size, seed)[0]
        out.append(row("posterior", seed, size, all_scores(update_profile(hw, rows.records()).profile), rows=size))
        for name in ALTERNATIVES if isinstance(table.data, GemmFit) else ():
            seconds = one_factor(hw, rows, test) if name == "factor" else three_constants(section, rows, test)
            out.append(row(name, seed, size, scores(seconds), rows=size))
    return out
