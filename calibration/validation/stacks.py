"""A software stack left out: a profile fitted on one stack of a device, judged on another's rows, as shipped and moved
by 20 to 400 of them.

Use :func:`left_out` for one pair of stacks and seed. Beside the posterior of the error model stand what is simpler
(:data:`MOVES`): one factor, three constants, a lattice, and version 0.1's mechanism, constants and lattice together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from calibration.fit import residual as ridge
from calibration.fit.anchor import anchor_profile
from calibration.fit.core import CLOSE, Shapes, fit_constants, free_constants, timed
from calibration.validation.protocol import Measured, Row, coverage, errors, ratio_coverage, row, speedups
from simulator.arrays import FloatArray
from simulator.cost.base import Machine
from simulator.cost.residual_grid import residual_arrays, residual_of
from simulator.hardware.profile import HardwareProfile, Section

SIZES = (20, 100, 400)
MOST_ROWS, MOST_PAIRS = 3000, 4000
"""Unseen rows, and pairs of them, that a stack is judged on; more are drawn from by chance."""


def refitted(section: Section, rows: Measured, free: Sequence[str], residual_grid: bool) -> Section:
    """A GEMM section whose constants ``free`` are fitted to local rows, near their own values, and whose smooth lattice
    takes up, stiffly, what they leave."""
    data, machine = rows.data, Machine.of(rows.hw, rows.dtype)
    values = {name: constant.value for name, constant in section.constants.items()}
    if free:
        values = {**values, **fit_constants(data, machine, values, free, CLOSE).values}
    constants = {name: replace(constant, value=values[name]) for name, constant in section.constants.items()}
    section = replace(section, constants=constants)
    lent = residual_of(section.arrays)
    if not residual_grid or lent is None:
        return section
    core, parts = machine_core(machine, values), timed(data, machine, values)
    target = np.log(data.seconds * 1e6 / parts.total_us) - lent.at(data.m, data.n, data.k, parts, core)
    blocks = ridge.blocks(data, parts, core, (), ridge.STIFF, ridge.OWN)
    (added,) = ridge.solve(blocks, np.asarray(target, dtype=np.float64))
    smooth, *own = lent.lattices
    smooth = replace(smooth, values=smooth.values + added.reshape(smooth.values.shape))
    arrays = residual_arrays(replace(lent, lattices=(smooth, *own)), section.arrays["measured_m"])
    return replace(section, arrays={**section.arrays, **arrays})


def one_factor(hw: HardwareProfile, section: Section, rows: Measured, test: Measured) -> FloatArray:
    """All times by the median ratio of the local ones."""
    ratio = np.median(rows.data.seconds / rows.times(hw).seconds)
    return np.asarray(ratio * test.times(hw).seconds)


def _moved(free: Sequence[str] | None, residual_grid: bool) -> Callable[..., FloatArray]:
    """Times by :func:`refitted`; ``free`` None: every constant that a table identifies."""

    def times(hw: HardwareProfile, section: Section, rows: Measured, test: Measured) -> FloatArray:
        names = free_constants(Machine.of(hw, rows.dtype)) if free is None else free
        return test.times(test.profile(refitted(section, rows, names, residual_grid))).seconds

    return times


MOVES: Mapping[str, Callable[..., FloatArray]] = {
    "0.1": _moved(None, residual_grid=True),
    "factor": one_factor,
    "three": _moved(("t0", "e_tc", "e_d"), residual_grid=False),
    "lattice": _moved((), residual_grid=True),
}
"""What the posterior is judged against, of GEMMs: version 0.1's mechanism, one factor, three constants, a lattice."""


def left_out(section: Section, table: Measured, seed: int, sizes: Sequence[int] = SIZES) -> list[Row]:
    """A section of one stack on another's table: as shipped, and moved by some of its rows in each way; all judged on
    the same rows of unseen groups."""
    rng = np.random.default_rng(seed + 50)
    unseen = table.drawn(None, seed)[1]
    test = unseen.take(np.sort(rng.permutation(len(unseen.data))[:MOST_ROWS]))
    pairs = test.pairs()
    pairs = pairs[np.sort(rng.permutation(len(pairs))[:MOST_PAIRS])]

    def scored(hw: HardwareProfile) -> dict[str, float]:
        time = test.times(hw)
        sure = {**coverage(time, test.data), **ratio_coverage(time, hw, test.data.seconds, pairs)}
        return {**errors(time.seconds, test.data), **speedups(time.seconds, test.data, pairs), **sure}

    hw = table.profile(section, same_stack=False)
    out = [row("as shipped", seed, 0, scored(hw))]
    for size in sizes:
        rows = table.drawn(size, seed)[0]
        out.append(row("posterior", seed, size, scored(anchor_profile(hw, rows.records()).profile), rows=size))
        for name, move in MOVES.items() if isinstance(table.data, Shapes) else ():
            found = move(hw, section, rows, test)
            scores = {**errors(found, test.data), **speedups(found, test.data, pairs)}
            out.append(row(name, seed, size, scores, rows=size))
    return out
