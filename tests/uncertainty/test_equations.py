"""The intervals of docs/model.md ("Uncertainty"), computed again from the errors of rows: of times
and their ratio, over hosts, and after a measured time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest

import simulator
from simulator.arrays import FloatArray
from simulator.uncertainty.factors import COVERAGE_FACTOR, ERROR_FACTORS, FACTOR_INDEX, in_order
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.intervals import workload_time
from simulator.workload import WorkloadBatch, segment_of

pytestmark = pytest.mark.quick

H100 = simulator.load_hardware("h100")
DENSE = simulator.lower("llama-3.1-8b", phase="prefill", batch=1, seq=2048)
PRUNED = simulator.prune(DENSE, "width", 0.25)  # leaves the number of operators as it is


class GroupError(NamedTuple):
    correlated: float
    independent: float
    coordinates: FloatArray
    kind: int
    seconds: float  # time of one operator


Errors = tuple[FloatArray, dict[int, GroupError]]  # systematic ones, and those of groups


def errors_of(p: PredictedPass, i: int) -> Errors:
    rows = p.workloads.owner == i
    w, share = p.workloads.rows.take(np.flatnonzero(rows)), p.row_s[rows] / p.device_s[i]
    e = in_order(p.errors, len(p.workloads.shapes[0])).take(p.workloads.shapes[1][rows])
    systematic, groups = share @ e.wide(), (segment_of(w) * 100 + w.kind) * 1000 + w.role
    gaps = p.gap_s[i] / p.device_s[i]
    systematic[FACTOR_INDEX["machine launch"]] += ERROR_FACTORS["machine launch"] * gaps
    of = {}
    for g in np.unique(groups).tolist():
        at = groups == g
        of[g] = GroupError(
            share[at] @ e.correlated[at],
            share[at] @ np.sqrt(e.independent[at]),
            (share[at, None] * e.coordinates[at]).sum(axis=0) / share[at].sum(),
            w.kind[at][0],
            share[at].sum() * p.device_s[i] / w.count[at].sum(),
        )
    return systematic, of


def covariance(a: Errors, b: Errors) -> float:
    """Return the covariance of the logs of two passes; equal shapes share their independent
    errors."""
    total = float(a[0] @ b[0])
    for x in a[1].values():
        for y in b[1].values():
            apart = np.abs(x.coordinates - y.coordinates).sum()
            total += (x.kind == y.kind) * x.correlated * y.correlated * math.exp(-apart / 1.5)
    pairs = [(x, b[1][g]) for g, x in a[1].items() if g in b[1]]
    alike = [(x, y) for x, y in pairs if math.isclose(x.seconds, y.seconds, rel_tol=1e-9)]
    return total + sum(x.independent * y.independent for x, y in alike)


def ends(log: FloatArray, variance: FloatArray) -> list[float]:
    """Return the ends of an interval from logs at three or five hosts (the typical one first) and
    the variances at each."""
    out = []
    for side in (-1, 1):
        change = side * (log - log[0])
        square = COVERAGE_FACTOR**2 * (variance[0] + variance[np.argmax(change)]) / 2
        square += sum(max(change[i : i + 2].max(), 0) ** 2 for i in range(1, len(log), 2))
        out.append(math.exp(log[0] + side * math.sqrt(square)))
    return out


P = forward_passes(WorkloadBatch.of([DENSE, PRUNED]), H100)
ERRORS = [errors_of(P, i) for i in (0, 1)]
VAR_D, VAR_P, COV = (covariance(ERRORS[i], ERRORS[j]) for i, j in ((0, 0), (1, 1), (0, 1)))
EPSILON = P.engine.log_sd.value
S = simulator.speedup(DENSE, PRUNED, H100)


def test_the_interval_of_a_speedup_combines_kernels_and_hosts() -> None:
    y = COVERAGE_FACTOR * np.array([0.0, -1.0, 1.0])  # a prompt has no host time per sequence
    seconds, alpha = P.at(y, y)
    (a_d, a_p), logs = alpha.T, np.log(seconds)
    dense = ends(logs[:, 0], a_d**2 * VAR_D + EPSILON**2)
    assert [S.dense_lower, S.dense_upper] == pytest.approx(dense, rel=1e-9)
    pruned = ends(logs[:, 1], a_p**2 * VAR_P + EPSILON**2)
    assert [S.pruned_lower, S.pruned_upper] == pytest.approx(pruned, rel=1e-9)
    between = a_d**2 * VAR_D + a_p**2 * VAR_P - 2 * a_d * a_p * COV + 0.01**2
    between += (1 - a_d[0]) * (1 - a_p[0]) * 2 * 0.01**2
    ratio = ends(logs[:, 0] - logs[:, 1], between)
    assert [S.lower, S.upper] == pytest.approx(ratio, rel=1e-9)


def test_an_eager_host_has_two_speeds() -> None:
    eager = simulator.lower("llama-3.1-8b", phase="decode", batch=1, seq=512, engine="hf")
    q = forward_passes(WorkloadBatch.of([eager]), H100)
    y, e = COVERAGE_FACTOR * np.array([[0, -1, 1, 0, 0], [0, 0, 0, -1, 1]])
    r = q.engine.host_correlation.value
    seconds, alpha = q.at(r * y + np.sqrt(1 - r**2) * e, y)
    variance = alpha[:, 0] ** 2 * q.uncertainty.variance()[0] + q.engine.log_sd.value**2
    t = workload_time(eager, H100)
    wide = ends(np.log(seconds[:, 0]), variance)
    assert [t.total_lower_s, t.total_upper_s] == pytest.approx(wide, rel=1e-9)


def test_a_measured_time_conditions_hosts_and_kernels() -> None:
    measured, grid = 1.1 * S.dense_s, 0.05 * np.arange(-100, 101)
    seconds, alpha = P.at(grid, grid)
    omega = alpha[:, 0] ** 2 * VAR_D + EPSILON**2 + 0.01**2
    rho = np.log(measured / seconds[:, 0])
    slow = math.sqrt(2 * math.pi) / (math.log(200) / P.host.widest_log_sd) * (grid > 2)
    weight = (0.95 * np.exp(-(grid**2) / 2) + 0.05 * slow) * np.exp(-(rho**2) / omega / 2)
    weight /= np.sqrt(omega)
    weight, inside = weight / weight.sum(), math.erf(COVERAGE_FACTOR / math.sqrt(2))
    quantiles = [0.5, 0.5 - inside / 2, 0.5 + inside / 2]
    y = np.interp(quantiles, np.cumsum(weight) - weight / 2, grid)
    seconds, alpha = P.at(y, y)
    shared = np.maximum(EPSILON**2, np.log(measured / seconds[:, 0]) ** 2)
    omega = alpha[:, 0] ** 2 * VAR_D + shared + 0.01**2
    with_dense = np.stack([alpha[:, 0] ** 2 * VAR_D, alpha[:, 1] * alpha[:, 0] * COV], axis=1)
    with_dense += shared[:, None]
    logs = np.log(seconds) + with_dense * np.log(measured / seconds[:, :1]) / omega[:, None]
    given = simulator.speedup(DENSE, PRUNED, H100, dense_s=measured)
    assert [given.dense_s, given.pruned_s] == pytest.approx(np.exp(logs[0]).tolist(), rel=1e-9)
    (a_d, a_p), (c_d, c_p) = alpha.T, with_dense.T
    unexplained = 0.3 * np.log(measured / S.dense_s)
    beyond = (unexplained * (1 - np.exp(-np.abs(logs[:, 1] - logs[:, 0])))) ** 2
    pruned = a_p**2 * VAR_P + shared - c_p**2 / omega + (1 - a_p[0]) ** 2 * 2 * 0.01**2 + beyond
    expected = ends(logs[:, 1], pruned)
    assert [given.pruned_lower, given.pruned_upper] == pytest.approx(expected, rel=1e-9)
    between = a_d**2 * VAR_D + a_p**2 * VAR_P - 2 * a_d * a_p * COV + 0.01**2
    between += (1 - a_d[0]) * (1 - a_p[0]) * 2 * 0.01**2 + beyond - (c_d - c_p) ** 2 / omega
    expected = ends(logs[:, 0] - logs[:, 1], between)
    assert [given.lower, given.upper] == pytest.approx(expected, rel=1e-9)
