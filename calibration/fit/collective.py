"""Calibration of collectives: start, hops, ramp, share of the link, and the engine's all-reduce.

Use :func:`calibration.fit.section.fit_section` with :class:`CollectiveFit`. Constants that the rows do not identify
keep the default of the link's kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from calibration.fit import solver
from calibration.fit.residual import Regularisation
from calibration.fit.section import Fit
from calibration.fit.solver import ConstantsFit
from simulator.arrays import FloatArray, IndexArray
from simulator.operators.collective import COLLECTIVE_CONSTANTS as CONSTANTS
from simulator.operators.collective import COLLECTIVES, Messages
from simulator.operators.residual_grid import ResidualGrid

PRIOR = 1.5
"""Log standard deviation of the constants around their defaults."""
OCTAVES = 2.0  # between nodes along log2 bytes: 1 is worse on held-out sizes
WITHIN = 32
"""Points between two nodes at which the analytical model is evaluated: no time falls by over 1e-5 with its payload."""
OWN_BYTES = (2.0**23, 2.0**24, 2.0**25, 2.0**26)
"""Payloads to compare as the end of an engine's all-reduce."""
OWN = tuple(name for name in CONSTANTS if name.startswith("own_"))
ADDED = 1.0
"""Minimum gain in loss of a variant with an engine's all-reduce, in units of the soft-L1 scale."""


@dataclass(frozen=True)
class CollectiveFit(Fit):
    """Measured collectives over one link."""

    calls: Messages

    # along (kind, log2 devices, log2 bytes); kinds are independent; the best of 12 on held-out sizes and numbers of
    # devices, over five GPUs and the L40S
    REGULARISATION = Regularisation((0.0, 0.1, 0.0), (0.0, 0.0, 0.1), 0.05)

    def groups(self, by: str = "") -> IndexArray:
        return solver.numbered(self.calls.payload)

    def usable(self) -> CollectiveFit:
        """Return the rows with a valid time, at least two devices, and a rate below that of the link."""
        m, link = self.calls, self.calls.link
        known = np.isfinite(self.seconds) & (self.seconds > 0) & (m.payload > 0) & (m.devices >= 2)
        return self.take(known & (self.seconds > 0.5 * m.payload / link.bandwidth_bytes_per_s))

    def _variants(self) -> Iterator[dict[str, float]]:
        """Yield where the engine's all-reduce applies: nowhere; else to two devices over PCIe or all over NVLink, by
        size."""
        yield {"own_devices": 0.0}
        if (self.calls.code == 0).any():
            most = float(self.calls.link.max_devices) if self.calls.link.family == "nvlink" else 2.0
            yield from ({"own_devices": most, "own_bytes": size} for size in OWN_BYTES)

    def _fixed(self, variant: Mapping[str, float]) -> dict[str, str]:
        """Return the constants that are not fitted, and why."""
        out = dict.fromkeys(("own_devices", "own_bytes"), "chosen among a few")
        if not variant["own_devices"]:
            out = dict.fromkeys(OWN, "these rows have only the library's all-reduce")
        elif variant["own_devices"] <= 2.0:
            out["own_hop_s"] = "no more than two devices"
        if self.calls.link.family == "nvlink":
            out["sharing"] = "each device has its own links"
        elif len(np.unique(self.calls.devices)) == 1:
            out["sharing"] = "one number of devices"
        if not (self.calls.devices > 2.0).any() and (self.calls.code != 0).all():
            out["hop_s"] = "one number of hops"
        return out

    def constants(self, start: Mapping[str, float] | None = None) -> ConstantsFit:
        """Return the constants of the best variant, around the defaults of the link's kind."""
        default = {name: constant.default(self.calls.link.family) for name, constant in CONSTANTS.items()}
        best, least = {"own_devices": 0.0}, np.inf
        for variant in self._variants():
            free = [name for name in CONSTANTS if name not in self._fixed(variant)]
            first = {**default, **variant}
            found = solver.minimise(self.log_residual, first, CONSTANTS, free, prior=PRIOR, max_nfev=60)
            loss = float(np.sum(np.sqrt(1.0 + (found.rows / solver.HUBER) ** 2) - 1.0))
            if loss < least - ADDED:
                best, least = variant, loss
        return solver.fit_logs(
            self.log_residual,
            {**default, **best},
            CONSTANTS,
            self.covariance(PRIOR),
            fixed=self._fixed(best),
            prior=PRIOR,
            center=default,
            max_nfev=100,
        )

    def blank(self) -> ResidualGrid:
        """Return a grid over log2 bytes and log2 devices, of each kind."""
        size, devices = np.log2(np.maximum(self.calls.payload, 1.0)), np.log2(self.calls.devices)
        first = OCTAVES * float(np.floor(size.min() / OCTAVES))
        shape = len(COLLECTIVES), int(np.ceil(devices.max())) + 1, int(np.ceil((size.max() - first) / OCTAVES)) + 1
        return ResidualGrid((0.0, 0.0, first), (1.0, 1.0, OCTAVES), np.zeros(shape))

    def residual(self, values: Mapping[str, float]) -> ResidualGrid:
        """Return the nearest grid to the fitted one with times that never fall with bytes: a node lies below the
        previous one by at most the smallest rise of the analytical time between them."""
        grid = super().residual(values)
        kinds, devices, nodes = grid.values.shape
        fine = grid.start[2] + OCTAVES * np.linspace(0.0, nodes - 1.0, (nodes - 1) * WITHIN + 1)
        code, several, size = np.meshgrid(np.arange(kinds), np.arange(devices), fine, indexing="ij")
        every = Messages(code, 2.0**size, 2.0 ** np.maximum(several, 1.0), self.calls.link)
        rise = np.diff(np.log(sum(every.parts(values))), axis=2)
        least: FloatArray = WITHIN * rise.reshape(kinds, devices, nodes - 1, WITHIN).min(axis=3)
        base = np.concatenate([np.zeros((kinds, devices, 1)), np.cumsum(least, axis=2)], axis=2)
        total = grid.values + base
        up, down = np.maximum.accumulate(total, axis=2), np.minimum.accumulate(total[..., ::-1], axis=2)[..., ::-1]
        return replace(grid, values=0.5 * (up + down) - base)
