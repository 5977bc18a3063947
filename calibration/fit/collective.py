"""Calibration of collectives: start, hops, ramp, share of the link, and the engine's own all-reduce, from measured
times.

Use :func:`fit_collective` on :class:`Messages`. What the rows cannot know keeps the default of the link's kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import solver
from calibration.fit.errors import accuracy_of, spread_of
from calibration.fit.residual import Stiffness, fit_lattice
from calibration.fit.solver import ConstantsFit, FittedPart, Minimum, Table
from simulator.arrays import FloatArray
from simulator.cost.collective import KINDS, CollectiveTime, collective_core, collective_place, uncertainty_of
from simulator.cost.residual_grid import ResidualGrid
from simulator.hardware.constants import COLLECTIVE_CONSTANTS as CONSTANTS
from simulator.hardware.profile import Link, Provenance, Section

PRIOR = 1.5
"""Log spread of the constants round their defaults."""
STIFFNESS = Stiffness((0.0, 0.1, 0.0), (0.0, 0.0, 0.1), 0.05)
"""Of the residual along (kind, log2 devices, log2 bytes): nothing joins two kinds; chosen among 12 on sizes and numbers
of devices left out, over five GPUs and the L40S."""
OCTAVES = 2.0  # between its nodes: 1 is worse on sizes left out
WITHIN = 32
"""Points between two nodes at which the core is looked at, so that no time falls with its payload by over 1e-5."""
FOLDS = 5
OWN_BYTES = (2.0**23, 2.0**24, 2.0**25, 2.0**26)
"""Where an engine may stop using its own all-reduce."""
OWN = tuple(name for name in CONSTANTS if name.startswith("own_"))
ADDED = 1.0
"""A variant with an own all-reduce must fit better by this much (its loss, in units of the soft-L1 scale)."""


@dataclass(frozen=True)
class Messages(Table):
    """Measured collectives over one link: index into :data:`KINDS`, payload (bytes), devices, time."""

    code: NDArray[np.intp]
    payload: FloatArray
    devices: FloatArray
    seconds: FloatArray
    link: Link

    def parts(self, values: Mapping[str, float]) -> CollectiveTime:
        """Core times, s."""
        return collective_core(self.code, self.payload, self.devices, self.link.bandwidth_bytes_per_s, values)

    def log_residual(self, values: Mapping[str, float]) -> FloatArray:
        """Log of core over measured time."""
        return np.asarray(np.log(self.parts(values).total) - np.log(self.seconds))

    @property
    def place(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        return collective_place(self.code, self.payload, self.devices)

    def _variants(self) -> Iterator[dict[str, float]]:
        """Who may use an own all-reduce up to where: nobody; else two devices over PCIe, all over NVLink."""
        yield {"own_devices": 0.0}
        if (self.code == 0).any():
            most = float(self.link.max_devices) if self.link.family == "nvlink" else 2.0
            yield from ({"own_devices": most, "own_bytes": size} for size in OWN_BYTES)

    def constants(self) -> ConstantsFit:
        """Constants round the defaults of the link's kind; the variant that fits best."""
        default = {name: constant.default(self.link.family) for name, constant in CONSTANTS.items()}

        def fixed(variant: Mapping[str, float]) -> dict[str, str]:
            out = dict.fromkeys(("own_devices", "own_bytes"), "chosen among a few")
            if not variant["own_devices"]:
                out = dict.fromkeys(OWN, "these rows show no all-reduce but the library's")
            elif variant["own_devices"] <= 2.0:
                out["own_hop_s"] = "no more than two devices"
            if self.link.family == "nvlink":
                out["sharing"] = "each device has its own links"
            elif len(np.unique(self.devices)) == 1:
                out["sharing"] = "one number of devices"
            if not (self.devices > 2.0).any() and (self.code != 0).all():
                out["hop_s"] = "one number of hops"
            return out

        def covariance(found: Minimum, values: Mapping[str, float]) -> tuple[FloatArray, float]:
            raw = solver.slopes(self.log_residual, values, found.names, 1e-4)
            every = np.concatenate([raw, solver.HUBER / PRIOR * np.eye(len(found.names))])
            freedom = max(len(self) - len(found.names), 1)
            spread = float(np.sqrt(np.sum(np.minimum(found.rows**2, (3 * solver.HUBER) ** 2)) / freedom))
            return solver.gauss_newton(every, spread), spread

        best, least = {"own_devices": 0.0}, np.inf
        for variant in self._variants():
            free = [name for name in CONSTANTS if name not in fixed(variant)]
            start = {**default, **variant}
            found = solver.minimise(self.log_residual, start, CONSTANTS, free, prior=PRIOR, max_nfev=60)
            loss = float(np.sum(np.sqrt(1.0 + (found.rows / solver.HUBER) ** 2) - 1.0))
            if loss < least - ADDED:
                best, least = variant, loss
        search: dict[str, Any] = {"prior": PRIOR, "center": default, "max_nfev": 100}
        return solver.fit_logs(
            self.log_residual, {**default, **best}, CONSTANTS, covariance, fixed=fixed(best), **search
        )

    def residual(self, values: Mapping[str, float]) -> ResidualGrid:
        """Residual over log2 bytes and log2 devices, of each kind."""
        _, devices, size = self.place
        first = OCTAVES * float(np.floor(size.min() / OCTAVES))
        shape = len(KINDS), int(np.ceil(devices.max())) + 1, int(np.ceil((size.max() - first) / OCTAVES)) + 1
        blank = ResidualGrid((0.0, 0.0, first), (1.0, 1.0, OCTAVES), np.zeros(shape))
        return self._rising(fit_lattice(blank, self.place, -self.log_residual(values), STIFFNESS, rounds=3), values)

    def _rising(self, residual_grid: ResidualGrid, values: Mapping[str, float]) -> ResidualGrid:
        """The lattice nearest to another with which more bytes never take less time: a node may lie below the last one
        by no more than the core rises in between at its slowest."""
        kinds, devices, nodes = residual_grid.values.shape
        fine = residual_grid.start[2] + OCTAVES * np.linspace(0.0, nodes - 1.0, (nodes - 1) * WITHIN + 1)
        code, several, size = np.meshgrid(np.arange(kinds), np.arange(devices), fine, indexing="ij")
        facts = 2.0**size, 2.0 ** np.maximum(several, 1.0), self.link.bandwidth_bytes_per_s
        rise = np.diff(np.log(collective_core(code, *facts, values).total), axis=2)
        least = WITHIN * rise.reshape(kinds, devices, nodes - 1, WITHIN).min(axis=3)
        base = np.concatenate([np.zeros((kinds, devices, 1)), np.cumsum(least, axis=2)], axis=2)
        total = residual_grid.values + base
        up, down = np.maximum.accumulate(total, axis=2), np.minimum.accumulate(total[..., ::-1], axis=2)[..., ::-1]
        return replace(residual_grid, values=0.5 * (up + down) - base)

    def predict(self, section: Section) -> FloatArray:
        """Times a fitted section gives, s."""
        residual = ResidualGrid.from_arrays(section.arrays)
        assert residual is not None
        values = {name: constant.value for name, constant in section.constants.items()}
        return np.asarray(self.parts(values).total * np.exp(residual(self.place)))


def fit_collective(messages: Messages, *, seed: int = 0, provenance: Provenance | None = None) -> FittedPart:
    """Fit the collective section of one device and stack; folds, by ``seed``, leave out sizes, not rows.

    ValueError with fewer than 20 usable rows (finite, positive, two devices at least, and not faster than the link).
    """
    m = messages
    known = np.isfinite(m.seconds) & (m.seconds > 0) & (m.payload > 0) & (m.devices >= 2)
    r = m.take(known & (m.seconds > 0.5 * m.payload / m.link.bandwidth_bytes_per_s))
    if len(r) < 20:
        raise ValueError(f"collectives: expected at least 20 usable rows, got {len(r)} of {len(m)}")
    constants = r.constants()
    errors = np.zeros(len(r))
    for train, test in solver.folds(solver.numbered(r.payload), FOLDS, np.random.default_rng(seed)):
        rest, left = r.take(train), r.take(test)
        values = rest.constants().values
        errors[test] = left.log_residual(values) + rest.residual(values)(left.place)
    arrays = r.residual(constants.values).arrays()
    accuracy = accuracy_of(np.expm1(errors))
    spread = spread_of(errors, uncertainty_of(r.parts(constants.values), r.place, r.link.family))
    section = Section(constants.fitted(), arrays, spread, accuracy, provenance, "calibrated")
    return FittedPart(section, constants, len(r), errors)
