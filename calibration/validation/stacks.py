"""A held-out software stack: a profile fitted on one stack of a device, evaluated on another's rows, as shipped and
after a local update with 20 to 400 of them.

Use :func:`left_out` for one pair of stacks and seed. Simpler alternatives to the local update (:data:`MOVES`) are one
factor and three constants.
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
"""Held-out rows, and pairs of them, that a stack is evaluated on; more are drawn from at random."""


def one_factor(hw: HardwareProfile, rows: Measured, test: Measured) -> FloatArray:
    """Return all times multiplied by the median ratio of the local ones."""
    ratio = np.median(rows.data.seconds / rows.times(hw).seconds)
    return np.asarray(ratio * test.times(hw).seconds)


def three_constants(section: Section, rows: Measured, test: Measured) -> FloatArray:
    """Return times with three constants of a GEMM section fitted to local rows, near their own values."""
    assert isinstance(rows.data, GemmFit)
    values = {name: constant.value for name, constant in section.constants.items()}
    fit = replace(rows.data, start=values, prior=section, free=("t0", "e_tc", "e_d")).constants()
    constants = {name: replace(constant, value=fit.values[name]) for name, constant in section.constants.items()}
    return test.times(test.profile(replace(section, constants=constants))).seconds


MOVES: tuple[str, ...] = ("factor", "three")
"""Simpler alternatives to the local update, of GEMMs: one factor, three constants."""


def left_out(section: Section, table: Measured, seed: int, sizes: Sequence[int] = SIZES) -> list[Row]:
    """A section of one stack on another's table: as shipped, and moved by some of its rows in each way; all judged on
    the same rows of unseen groups."""
    rng = np.random.default_rng(seed + 50)
    unseen = table.drawn(None, seed)[1]
    test = unseen.take(np.sort(rng.permutation(len(unseen.data))[:MOST_ROWS]))
    pairs = test.pairs()
    pairs = pairs[np.sort(rng.permutation(len(pairs))[:MOST_PAIRS])]

    def scored(hw: HardwareProfile) -> dict[str, float]:
        found = test.predicted(hw)
        time = found.time
        inside = {**coverage(time, test.data), **ratio_coverage(found, hw, test.data.seconds, pairs)}
        return {**errors(time.seconds, test.data), **speedups(time.seconds, test.data, pairs), **inside}

    hw = table.profile(section, same_stack=False)
    out = [row("as shipped", seed, 0, scored(hw))]
    for size in sizes:
        rows = table.drawn(size, seed)[0]
        out.append(row("posterior", seed, size, scored(update_profile(hw, rows.records()).profile), rows=size))
        for name in MOVES if isinstance(table.data, GemmFit) else ():
            found = one_factor(hw, rows, test) if name == "factor" else three_constants(section, rows, test)
            scores = {**errors(found, test.data), **speedups(found, test.data, pairs)}
            out.append(row(name, seed, size, scores, rows=size))
    return out
