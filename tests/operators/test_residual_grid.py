"""Residual grids: interpolation against a plain one, edges, reading and writing, rows of a CPU."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from simulator.hardware.library import load_hardware
from simulator.operators.residual_grid import ResidualGrid, RowResidual
from simulator.uncertainty.operators import gemm_time

pytestmark = pytest.mark.quick

SHAPES = [(7,), (6, 7), (4, 5, 3), (1, 4), (2, 1, 3)]


def grid(shape: tuple[int, ...], dtype: type = np.float64) -> ResidualGrid:
    values = np.random.default_rng(len(shape)).normal(size=shape).astype(dtype)
    return ResidualGrid((1.0, 2.0, 0.0)[: len(shape)], (2.0, 1.0, 0.5)[: len(shape)], values)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_interpolation_equals_scipys_and_is_flat_beyond_the_edges(shape: tuple[int, ...], dtype: type) -> None:
    one = grid(shape, dtype)
    points = np.random.default_rng(0).uniform(-3.0, 18.0, (len(shape), 500))
    # scipy needs two nodes an axis: one that stands alone is there twice
    nodes = [a + s * np.arange(max(n, 2)) for a, s, n in zip(one.start, one.step, shape, strict=True)]
    values = one.values.astype(np.float64)
    for axis, count in enumerate(shape):
        values = np.repeat(values, 2, axis) if count == 1 else values
    inside = np.stack([np.clip(p, x[0], x[-1]) for p, x in zip(points, nodes, strict=True)], axis=1)
    found = one(points)
    assert found.dtype == dtype
    expected = RegularGridInterpolator(nodes, values)(inside)
    np.testing.assert_allclose(found, expected, atol=1e-9 if dtype is np.float64 else 3e-5)


def test_rows_between_measured_numbers_of_rows_lie_between_their_factors() -> None:
    rows = RowResidual(np.array([1.0, 4.0, 64.0]), np.array([0.3, -0.1, 0.1]))
    again = RowResidual.from_arrays(rows.arrays())
    assert again is not None
    found = again(np.array([1.0, 2.0, 4.0, 16.0, 64.0, 4096.0], dtype=np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.3, 0.1, -0.1, 0.0, 0.1, 0.1], atol=1e-7)
    assert RowResidual.from_arrays(grid((3,)).arrays()) is None


def test_times_of_gemms_do_not_jump_from_one_m_to_the_next() -> None:
    times = gemm_time([391, 392, 393], 6144, 4096, load_hardware("h100")).seconds
    assert times.max() / times.min() < 1.01
