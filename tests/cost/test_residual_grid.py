"""Lattices: interpolation against a plain one, sums, reading and writing, places of m."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from simulator.cost.gemm import gemm_time
from simulator.cost.gemm_model import Machine, core_time, machine_core
from simulator.cost.residual_grid import (
    Coordinates,
    LatticeSum,
    Residual,
    ResidualGrid,
    between_measured,
    m_places,
    residual_arrays,
    residual_of,
)
from simulator.hardware.constants import AXES
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.library import load_hardware

pytestmark = pytest.mark.quick

MACHINE = Machine(3.12e14, 2.0e12, 4e7, 108, 1.0, 2.0, 2.0, False)
CORE = machine_core(MACHINE, {name: c.default("ampere") for name, c in CONSTANTS.items()})
MEASURED = np.array([1.0, 2, 4, 8, 16, 17, 32, 33, 64])


def coordinates() -> Coordinates:
    m, n, k = np.ceil(2.0 ** np.random.default_rng(0).uniform(0, 14, (3, 500)))
    return Coordinates(m, n, k, core_time(m, n, k, CORE), CORE, m_places(MEASURED))


def residual_grid(axes: tuple[str, ...], *shape: int) -> ResidualGrid:
    values = np.random.default_rng(len(shape)).normal(size=shape)
    return ResidualGrid((1.0, 2.0, 0.0)[: len(axes)], (2.0, 1.0, 0.5)[: len(axes)], values, axes)


SHAPES = {("m",): (7,), ("m", "n", "k"): (4, 5, 3), ("time", "nk"): (6, 7), ("tile", "k", "mn"): (3, 4, 5)}
LATTICES = tuple(residual_grid(axes, *shape) for axes, shape in SHAPES.items())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_interpolation_equals_scipys_and_lattices_add_up(dtype: type) -> None:
    known, parts = coordinates(), []
    for one in LATTICES:
        nodes = [a + s * np.arange(n) for _, a, s, n, _ in one.grid]
        points = np.stack([np.clip(known[axis], x[0], x[-1]) for axis, x in zip(one.axes, nodes, strict=True)], axis=1)
        parts.append(RegularGridInterpolator(nodes, one.values)(points))
    cast = tuple(replace(one, values=one.values.astype(dtype)) for one in LATTICES)
    tolerance = 1e-9 if dtype is np.float64 else 3e-5
    for one, expected in zip(cast, parts, strict=True):
        np.testing.assert_allclose(one(known), expected, atol=tolerance)
    total = LatticeSum(cast)(known)
    assert total.dtype == dtype
    np.testing.assert_allclose(total, sum(parts), atol=5 * tolerance)


def test_a_lattice_is_exact_on_its_nodes_flat_outside_and_broadcasts() -> None:
    box = replace(residual_grid((), 4, 3, 2), start=(1.0, 0.0, 0.0), step=(0.5, 1.0, 1.0), axes=())
    i, j, k = np.indices((4, 3, 2))
    np.testing.assert_allclose(box((1.0 + 0.5 * i, j, k)), box.values)
    assert float(box((99.0, -5.0, np.array(9.0)))) == pytest.approx(box.values[3, 0, 1])
    assert box((np.zeros((3, 1)), np.ones(2), 0.0)).shape == (3, 2)
    again = ResidualGrid.from_arrays(box.arrays())
    assert again is not None
    assert box.arrays()["values"].shape == (2, 3, 4)
    np.testing.assert_array_equal(again((i, j + 0.3, k)), box((i, j + 0.3, k)))
    assert ResidualGrid.from_arrays({}) is None


def test_an_inset_stops_short_of_the_last_node_and_one_node_is_flat() -> None:
    line = ResidualGrid((0.0,), (1.0,), np.array([0.0, 1.0, 2.0]), inset=0.25)
    assert line((np.array([1.5, 2.0, 9.0]),)).tolist() == [1.5, 1.75, 1.75]
    wide = ResidualGrid((0.0, 3.0), (1.0, 1.0), np.array([[0.0], [4.0]]))
    assert wide((np.array([0.25, 9.0]), np.array([7.0, -7.0]))).tolist() == [1.0, 4.0]


def test_arrays_round_trip() -> None:
    first = Residual(
        (residual_grid(("m", "n", "k"), 4, 3, 5), residual_grid(("m_exact", "time"), 5, 4)), m_places(MEASURED)
    )
    known, arrays = coordinates(), residual_arrays(first, MEASURED)
    assert all(np.isfinite(known[axis]).all() and known[axis].shape == known.m.shape for axis in AXES)
    again = residual_of(arrays)
    assert again is not None
    places = known.m, known.n, known.k, known.parts, CORE
    np.testing.assert_allclose(again.at(*places), first.at(*places), atol=1e-3)  # as read, 1e-4 short of the last node
    assert residual_of({}) is None


def test_places_part_aligned_from_other_m() -> None:
    places = m_places(np.array([1.0, 8, 16, 17, 32, 33, 64, 65]))
    assert places[[1, 8, 17, 33, 65]].tolist() == [0, 1, 2, 3, 4]
    assert places[[16, 32, 64, 4000]].tolist() == [5, 6, 7, 7]
    assert 5 < places[24] < 6
    assert 2 < places[25] < 3
    assert m_places(np.array([16.0, 64.0]))[[1, 32, 100]].tolist() == [0, 0.5, 1]


def test_between_measured_m_the_residual_leads_from_one_to_the_next() -> None:
    hw = load_hardware("h100")
    arrays = hw.section("gemm", "bf16").arrays
    plain, measured = residual_of(arrays), arrays["measured_m"]
    assert plain is not None
    m = measured[measured > 16]
    n, k = np.full(len(m), 4096.0), np.full(len(m), 5120.0)
    core = machine_core(replace(MACHINE, persistent=True), {x: c.default("hopper") for x, c in CONSTANTS.items()})
    places = m, n, k, core_time(m, n, k, core), core
    np.testing.assert_allclose(between_measured(plain, measured).at(*places), plain.at(*places), atol=1e-5)
    times = gemm_time([391, 392, 393], 6144, 4096, hw).seconds  # no table has an m between 257 and 512
    assert times.max() / times.min() < 1.01
