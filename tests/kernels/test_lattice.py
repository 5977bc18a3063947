"""Residual lattices: interpolation against a plain one, reading and writing, places of m."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from simulator.hardware.constants import AXES
from simulator.hardware.constants import GEMM_CONSTANTS as CONSTANTS
from simulator.hardware.library import load_hardware
from simulator.kernels.gemm import gemm_kernel, gemm_time
from simulator.kernels.gemm_core import Machine, core_time, machine_core
from simulator.kernels.lattice import (
    Coordinates,
    Residual,
    Term,
    between_measured,
    m_places,
    residual_arrays,
    residual_of,
    smooth_arrays,
)

MACHINE = Machine(3.12e14, 2.0e12, 4e7, 108, 1.0, 2.0, 2.0, False)
CORE = machine_core(MACHINE, {name: c.default("ampere") for name, c in CONSTANTS.items()})


def coordinates(size: int = 500, seed: int = 0) -> Coordinates:
    rng = np.random.default_rng(seed)
    m, n, k = (np.ceil(2.0 ** rng.uniform(0, 14, size)) for _ in range(3))
    return Coordinates(m, n, k, core_time(m, n, k, CORE), CORE, m_places(np.array([1.0, 2, 4, 8, 16, 17, 32, 33, 64])))


@pytest.mark.parametrize("axes", [("m",), ("time", "nk"), ("m", "n", "k"), ("k", "tiles", "tile")])
def test_interpolation_equals_scipys(axes: tuple[str, ...]) -> None:
    known = coordinates()
    shape = (7, 5, 6)[: len(axes)]
    values = np.random.default_rng(1).normal(size=shape)
    start, step = (0.0, 2.0, 0.0)[: len(axes)], (1.0, 2.0, 0.5)[: len(axes)]
    term = Term(axes, start, tuple(1 / s for s in step), shape, values.reshape(-1))
    nodes = [a + s * np.arange(c) for a, s, c in zip(start, step, shape, strict=True)]
    points = np.stack([np.clip(known[a], x[0], x[-1]) for a, x in zip(axes, nodes, strict=True)], axis=1)
    np.testing.assert_allclose(
        Residual((term,), known.m_places).at(known.m, known.n, known.k, known.parts, CORE),
        RegularGridInterpolator(nodes, values)(points),
        atol=1e-3,
    )  # the last cell stops 1e-4 short


def test_lattices_add_up() -> None:
    known = coordinates()
    rng = np.random.default_rng(2)
    terms = tuple(
        Term(axes, (1.0,) * len(axes), (0.5,) * len(axes), shape, rng.normal(size=int(np.prod(shape))))
        for axes, shape in (
            (("m", "n", "k"), (4, 5, 3)),
            (("time", "nk"), (6, 7)),
            (("tile", "k", "mn"), (3, 4, 5)),
            (("blocks", "m"), (2, 9)),
        )
    )

    def at(*some: Term) -> np.ndarray:
        return Residual(some, known.m_places).at(known.m, known.n, known.k, known.parts, CORE)

    np.testing.assert_allclose(at(*terms), sum(at(t) for t in terms), rtol=1e-12)


def test_every_axis_is_finite_and_of_the_shapes_length() -> None:
    known = coordinates()
    for axis in AXES:
        assert np.isfinite(known[axis]).all(), axis
        assert known[axis].shape == known.m.shape, axis


def test_arrays_round_trip() -> None:
    measured = np.array([1.0, 8, 16, 17, 64])
    rng = np.random.default_rng(0)
    terms = (
        Term(("m", "n", "k"), (0.0, 5.0, 5.0), (1.0, 1.0, 0.5), (4, 3, 5), rng.normal(size=60)),
        Term(("m_exact", "time"), (0.0, 1.0), (1.0, 2.0), (5, 4), rng.normal(size=20)),
    )
    first = Residual(terms, m_places(measured))
    again = residual_of(residual_arrays(first, measured))
    assert again is not None
    known = coordinates()
    np.testing.assert_allclose(
        again.at(known.m, known.n, known.k, known.parts, CORE),
        first.at(known.m, known.n, known.k, known.parts, CORE),
        atol=1e-6,
    )
    smooth = residual_of(smooth_arrays(residual_arrays(first, measured)))
    assert smooth is not None
    assert [t.axes for t in smooth.terms] == [("m", "n", "k")]


def test_arrays_that_do_not_fit_are_refused() -> None:
    good = residual_arrays(
        Residual((Term(("m", "n", "k"), (0.0,) * 3, (1.0,) * 3, (2, 2, 2), np.zeros(8)),), m_places(np.ones(1))),
        np.ones(1),
    )
    with pytest.raises(ValueError, match="7 values"):
        residual_of({**good, "values": good["values"][:7]})
    with pytest.raises(ValueError, match="fit together"):
        residual_of({**good, "grids": good["grids"][:, :2]})
    with pytest.raises(ValueError, match="fit together"):
        residual_of({**good, "terms": good["terms"] + 1000})
    assert residual_of({}) is None


def test_places_part_aligned_from_other_m() -> None:
    places = m_places(np.array([1.0, 8, 16, 17, 32, 33, 64, 65]))
    assert places[[1, 8, 17, 33, 65]].tolist() == [0, 1, 2, 3, 4]
    assert places[[16, 32, 64]].tolist() == [5, 6, 7]
    assert 5 < places[24] < 6
    assert 2 < places[25] < 3
    assert places[40_00] == 7


def test_between_measured_m_the_residual_leads_from_one_to_the_next() -> None:
    hw = load_hardware("h100")
    measured = hw.section("gemm", "bf16").arrays["measured_m"]
    plain = residual_of(hw.section("gemm", "bf16").arrays)
    assert plain is not None
    led = between_measured(plain, measured)
    m = measured[measured > 16]
    core = gemm_kernel(hw, "bf16", None, 0).core
    n, k = np.full(len(m), 4096.0), np.full(len(m), 5120.0)
    parts = core_time(m, n, k, core)
    np.testing.assert_allclose(led.at(m, n, k, parts, core), plain.at(m, n, k, parts, core), atol=1e-5)
    times = gemm_time([391, 392, 393], 6144, 4096, hw).seconds  # no table has an m between 257 and 512
    assert times.max() / times.min() < 1.01
