"""The program: equal to brute force, and bounded."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from simulator.plans.solve import Program


def random_case(seed: int) -> tuple[Program, np.ndarray]:
    """A small program with limits on one to three costs, half of them of whole numbers with many
    ties."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 5, random.integers(1, 6))
    group, rows = np.repeat(np.arange(len(sizes)), sizes), int(random.integers(1, 4))
    if seed % 2:
        score = random.integers(0, 6, len(group)).astype(float)
        cost = random.integers(0, 6, (rows, len(group))).astype(float)
        limit = np.floor(cost.mean(axis=1) * len(sizes) * random.uniform(0.5, 1.1))
    else:
        score, cost = random.normal(size=len(group)), random.random((rows, len(group)))
        limit = cost.mean(axis=1) * len(sizes) * random.uniform(0.5, 1.1)
    return Program(group, score, cost), limit


def brute_force(program: Program, limit: np.ndarray) -> float | None:
    """Least score of all choices within the limits."""
    members = [np.flatnonzero(program.group == g) for g in np.unique(program.group)]
    within = [
        program.score[list(choice)].sum()
        for choice in itertools.product(*members)
        if (program.cost[:, list(choice)].sum(axis=1) <= limit + 1e-12).all()
    ]
    return min(within, default=None)


def check_optimum(program: Program, limit: np.ndarray) -> None:
    found, best = program.solve(limit), brute_force(program, limit)
    if best is None:
        assert found.excess > 0.0
    else:
        assert found.excess == found.gap == 0.0
        assert found.score == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert (program.cost[:, found.choice].sum(axis=1) <= limit * (1 + 1e-9) + 1e-9).all()


@pytest.mark.parametrize("seed", range(0, 300, 25))
def test_the_optimum_equals_brute_force(seed: int) -> None:
    for case in range(seed, seed + 25):
        check_optimum(*random_case(case))


@pytest.mark.parametrize("large", [1e6, 1e20, 1e299])
def test_the_optimum_with_far_larger_scores(large: float) -> None:
    """A perplexity without the first layer may be a million times those of the other variants."""
    for seed in range(12):
        random = np.random.default_rng(seed)
        group = np.repeat(np.arange(5), random.integers(2, 5, 5))
        first = np.unique(group, return_index=True)[1]
        score, cost = random.random(len(group)), random.random((1, len(group)))
        score[random.random(len(group)) < 0.2] *= large
        score[first], cost[:, first] = 0.0, 1.0
        check_optimum(Program(group, score, cost), cost.mean(axis=1) * 5 * random.uniform(0.5, 1.1))


def test_the_nearest_choice_exceeds_limits_least() -> None:
    program = Program(
        np.array([0, 0, 1, 1]), np.zeros(4), np.array([[4.0, 2.0, 6.0, 3.0], [1.0, 5.0, 1.0, 5.0]])
    )
    found = program.solve(np.array([4.0, 4.0]))
    # 4 + 3 of 4 at 1 + 5 of 4, or 2 + 6 of 4: the former exceeds less
    assert found.excess == pytest.approx(0.75)


@pytest.mark.quick
def test_the_hull_falls_in_cost_and_rises_in_score() -> None:
    program, _ = random_case(4)
    hull = program.hull()
    costs = [program.cost[0, choice].sum() for choice in hull]
    scores = [program.score[choice].sum() for choice in hull]
    assert costs == sorted(costs, reverse=True)
    assert scores == sorted(scores)
    least = sum(program.cost[0, program.group == g].min() for g in np.unique(program.group))
    assert costs[-1] == pytest.approx(least)


def test_a_gap_bounds_what_a_better_choice_could_save() -> None:
    random = np.random.default_rng(1)
    group = np.repeat(np.arange(30), 12)
    score = np.sort(random.random((30, 12)), axis=1).ravel()
    cost = np.sort(random.random((30, 12)), axis=1)[:, ::-1].ravel()[None]
    program, limit = Program(group, score, cost), np.array([cost.sum() / 12 / 1.5])
    coarse, exact = program.solve(limit, 0.05), program.solve(limit)
    assert exact.score <= coarse.score <= exact.score * 1.06
    assert coarse.score * (1.0 - coarse.gap) <= exact.score + 1e-9


MANY = """
import numpy as np
from simulator.plans.solve import Program

for seed in range(24):
    random = np.random.default_rng(seed)
    group, better = np.repeat(np.arange(32), 12), np.linspace(0.0, 1.0, 12)
    first = 1e-3 * np.sort(random.random((32, 12)), axis=1)[:, ::-1]
    second = 1e-3 * (1.0 - 0.8 * better) * random.uniform(0.9, 1.1, (32, 12))
    score = random.random((32, 12)) * better**2
    limit = np.array([first[:, 0].sum() / 1.7, second[:, 0].sum() / 1.5])
    Program(group, score.ravel(), np.vstack([first.ravel(), second.ravel()])).solve(limit)
"""


def test_the_solver_writes_nothing_to_standard_output() -> None:
    """HiGHS 1.12 does in some of these programs, even if it should be silent."""
    ran = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=True)
    assert ran.stdout == ""
