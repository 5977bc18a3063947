"""Read InferSim's tables of grouped products: gate and up, and down, of a layer's experts, timed alone by DeepGEMM.

A line has the time of both products, without permutation and activation. Its scripts
(``kernel_benchmark/deepgemm_grouped_gemm_*.py`` of alibaba/InferSim) draw the tokens of each expert from the whole
numbers between 0.7 and 1.3 times their mean, for each product anew; ``skew`` -0.3 stands for this rule. Times are those
of a profiler, without launches; L2 is overwritten before each.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibration.records.screening import Screen
from simulator.arrays import Array
from simulator.cost.experts import PARTS
from simulator.workload import ROLES

GROUPED_SHAPE = (
    *("num_experts", "num_local_experts", "topk", "hidden_size", "intermediate_size", "tokens_per_expert"),
    *("up_proj_us", "down_proj_us"),
)
"""Columns of such a table."""
AROUND_MEAN = -0.3
"""Power of the rule that distributes tokens (:func:`simulator.cost.experts.dealt_load`)."""
FEWEST = 4
"""Experts from which the number of tokens is known within 9 %, the standard deviation of what was drawn."""


def read_grouped(table: Mapping[str, Array]) -> tuple[dict[str, Array], Screen]:
    """Return columns of records, all products of gate and up before all of down; refuse rows of few experts.

    The number of tokens is inferred from their number per expert, which the table rounds to what ran.

    >>> line = [128.0, 32.0, 8.0, 4096.0, 1536.0, 16.0, 228.7, 117.9]
    >>> columns, screen = read_grouped({name: np.array([v]) for name, v in zip(GROUPED_SHAPE, line)})
    >>> columns["m"].tolist(), columns["active"].tolist(), screen.kept.tolist()
    ([256.0, 256.0], [2.0, 2.0], [True, True])
    """
    every, experts, top, k, n, tokens, up, down = (np.asarray(table[name], dtype=np.float64) for name in GROUPED_SHAPE)
    once = {"m": np.rint(tokens * every / top), "n": n, "k": k, "experts": experts, "active": top * experts / every}
    columns = {name: np.tile(column, 2) for name, column in once.items()}
    size = 2 * len(n)
    columns |= {
        "operator": np.full(size, "experts", dtype=object),
        "role": np.repeat([float(ROLES.index(name)) for name in PARTS[1:]], len(n)),
        "dtype": np.full(size, "fp8", dtype=object),
        "weight_dtype": np.full(size, "fp8_block", dtype=object),
        "skew": np.full(size, AROUND_MEAN),
        "seconds": 1e-6 * np.concatenate([up, down]),
        "cold": np.ones(size, np.bool_),
        "launch": np.full(size, "excluded", dtype=object),
    }
    screen = Screen(size)
    screen.refuse(columns["experts"] < FEWEST, f"under {FEWEST} experts: their number of tokens was drawn")
    return columns, screen
