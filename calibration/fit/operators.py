"""Calibration of operators by the common method: elementwise operators, collectives, routed experts
and indexers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from calibration.fit import solver
from calibration.fit.residual import Regularisation
from calibration.fit.section import Fit, blank_grid, floats
from calibration.fit.solver import ConstantsFit
from simulator.arrays import Array, FloatArray, IndexArray
from simulator.codes import ROLES
from simulator.operators.base import Machine, ResidualGrid, Values
from simulator.operators.collective import COLLECTIVE_CONSTANTS, COLLECTIVES, Messages
from simulator.operators.elementwise import CLASSES, ELEMENTWISE_CONSTANTS, Moves
from simulator.operators.experts import ALIGNED, EXPERTS_CONSTANTS, PARTS, Layers
from simulator.operators.indexer import IndexerCalls, IndexerSizes

# log standard deviation of the constants of collectives and experts around their defaults
PRIOR = 1.5
# log standard deviation of a class's constants around the constants of all classes
ELEMENTWISE_PRIOR = 0.7
FACTORS = ("t0", "e", "l2", "l2_share")  # kinds of constants, by the beginning of their names
OCTAVES = 2.0  # octaves of bytes between nodes: 1 is worse on held-out sizes
# points between two nodes at which the analytical model is evaluated; with them no time falls by
# over 1e-5
WITHIN = 32
# largest payloads of an engine's all-reduce to compare
OWN_BYTES = (2.0**23, 2.0**24, 2.0**25, 2.0**26)
OWN = tuple(name for name in COLLECTIVE_CONSTANTS if name.startswith("own_"))
MOST_LAYERS = 4000  # rows that the constants of experts are fitted on; more do not change them
# Time of an expert without tokens from which its search starts, s, and the largest loss with this
# time, relative to the loss without, at which kernels count as visiting every expert.
# Block-scaled fp8 of TensorRT-LLM has 0.35 to 0.42 (0.25 us per expert), other tables 0.82 to 1.
IDLE_S, IDLE_LOSS = 1e-7, 0.6
# role of a record by index into PARTS
PART_ROLES = np.array([-1, *(ROLES.index(name) for name in PARTS[1:])])
# minimum gain in loss of a variant with an engine's all-reduce, in units of the soft-L1 scale
ADDED = 1.0


@dataclass(frozen=True)
class ElementwiseFit(Fit):
    calls: Moves

    # along (class, log2 bytes); classes are independent; chosen on seeds 10-19
    REGULARISATION = Regularisation(0.0, (0.0, 0.1), 0.1)

    def groups(self, by: str = "") -> IndexArray:
        return solver.numbered(self.calls.bytes_)

    def usable(self) -> ElementwiseFit:
        bytes_, seconds = self.calls.bytes_, self.seconds
        known = np.isfinite(seconds) & (seconds > 0) & np.isfinite(bytes_) & (bytes_ > 0)
        return self.take(known & (seconds > bytes_ / (20.0 * self.calls.bandwidth)))

    def constants(self, start: Values | None = None) -> ConstantsFit:
        """Return constants of the classes with rows, around factors that all classes have in
        common."""
        default = self.defaults(self.calls.architecture)

        def scaled(factor: Values) -> dict[str, float]:
            moved = {}
            for name, constant in ELEMENTWISE_CONSTANTS.items():
                kind = name if name in FACTORS else name.split("_")[0]
                moved[name] = float(
                    np.clip(default[name] * factor[kind], constant.low, constant.high)
                )
            return moved

        one = dict.fromkeys(FACTORS, 1.0)
        wide = dict.fromkeys(FACTORS, SimpleNamespace(low=np.exp(-4.0), high=np.exp(4.0)))
        common = solver.minimise(
            lambda factors: self.log_residual(scaled(factors)), one, wide, prior=1.0
        )
        center = scaled(common.values)
        known = [name for i, name in enumerate(CLASSES) if np.any(self.calls.code == i)]
        own = {f"{kind}_{name}" for name in known for kind in ("t0", "e", "l2")}
        fixed = {
            n: solver.ABSENT
            for n in ELEMENTWISE_CONSTANTS
            if n.removesuffix("_s") not in {*own, "l2_share"}
        }
        # the common factors are the prior: a class of three rows must not move far
        return self.search(
            center, ELEMENTWISE_CONSTANTS, ELEMENTWISE_PRIOR, fixed=fixed, max_nfev=100
        )

    def blank(self) -> ResidualGrid:
        octaves = np.log2(np.maximum(self.calls.bytes_, 1.0))
        first, last = float(np.floor(octaves.min())), float(np.ceil(octaves.max()))
        # one class more: see class_residual
        return ResidualGrid(
            (0.0, first), (1.0, 1.0), np.zeros((len(CLASSES) + 1, int(last - first) + 1))
        )

    def arrays(self, residual: ResidualGrid) -> dict[str, Array]:
        return {"start": np.array(residual.start[1]), "values": residual.values[:-1]}

    def accuracy(self, errors: FloatArray, values: Values) -> dict[str, float]:
        found = super().accuracy(errors, values)
        del found["bias"]
        if (long := self.seconds > 1e-5).any():
            found["mape_over_10us"] = float(np.abs(np.expm1(errors[long])).mean())
        return found


@dataclass(frozen=True)
class CollectiveFit(Fit):
    calls: Messages

    # along (kind, log2 devices, log2 bytes); kinds are independent; the best of 12 on held-out rows
    # of six GPUs
    REGULARISATION = Regularisation((0.0, 0.1, 0.0), (0.0, 0.0, 0.1), 0.05)

    def groups(self, by: str = "") -> IndexArray:
        return solver.numbered(self.calls.payload)

    def usable(self) -> CollectiveFit:
        m, link = self.calls, self.calls.link
        known = np.isfinite(self.seconds) & (self.seconds > 0) & (m.payload > 0) & (m.devices >= 2)
        return self.take(known & (self.seconds > 0.5 * m.payload / link.bandwidth_bytes_per_s))

    def _variants(self) -> Iterator[dict[str, float]]:
        """Yield where the engine's all-reduce applies: nowhere, or up to a size on two devices
        (NVLink: on all)."""
        yield {"own_devices": 0.0}
        if (self.calls.code == 0).any():
            most = float(self.calls.link.max_devices) if self.calls.link.family == "nvlink" else 2.0
            yield from ({"own_devices": most, "own_bytes": size} for size in OWN_BYTES)

    def _fixed(self, variant: Values) -> dict[str, str]:
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

    def constants(self, start: Values | None = None) -> ConstantsFit:
        default = self.defaults(self.calls.link.family)
        best, least = {"own_devices": 0.0}, np.inf
        for variant in self._variants():
            fixed = self._fixed(variant)
            free = {
                name: constant
                for name, constant in COLLECTIVE_CONSTANTS.items()
                if name not in fixed
            }
            found = solver.minimise(
                self.log_residual, {**default, **variant}, free, prior=PRIOR, max_nfev=60
            )
            loss = solver.loss(found.rows)
            if loss < least - ADDED:
                best, least = variant, loss
        start = {**default, **best}
        return self.search(
            start, COLLECTIVE_CONSTANTS, PRIOR, fixed=self._fixed(best), max_nfev=100
        )

    def blank(self) -> ResidualGrid:
        size, devices = np.log2(np.maximum(self.calls.payload, 1.0)), np.log2(self.calls.devices)
        first = OCTAVES * float(np.floor(size.min() / OCTAVES))
        shape = (
            len(COLLECTIVES),
            int(np.ceil(devices.max())) + 1,
            int(np.ceil((size.max() - first) / OCTAVES)) + 1,
        )
        return ResidualGrid((0.0, 0.0, first), (1.0, 1.0, OCTAVES), np.zeros(shape))

    def residual(self, values: Values) -> ResidualGrid:
        """Return the grid nearest to the fitted one with which no time falls when bytes grow."""
        grid = super().residual(values)
        kinds, devices, nodes = grid.values.shape
        fine = grid.start[2] + OCTAVES * np.linspace(0.0, nodes - 1.0, (nodes - 1) * WITHIN + 1)
        code, several, size = np.meshgrid(np.arange(kinds), np.arange(devices), fine, indexing="ij")
        every = Messages(code, 2.0**size, 2.0 ** np.maximum(several, 1.0), self.calls.link)
        rise = np.diff(np.log(sum(every.parts(values))), axis=2)
        least: FloatArray = WITHIN * rise.reshape(kinds, devices, nodes - 1, WITHIN).min(axis=3)
        base = np.concatenate([np.zeros((kinds, devices, 1)), np.cumsum(least, axis=2)], axis=2)
        total = grid.values + base
        up, down = (
            np.maximum.accumulate(total, axis=2),
            np.minimum.accumulate(total[..., ::-1], axis=2)[..., ::-1],
        )
        return replace(grid, values=0.5 * (up + down) - base)


@dataclass(frozen=True)
class ExpertsFit(Fit):
    """Measured expert layers of one device, or their single products, with tokens distributed by a
    rule."""

    calls: Layers
    architecture: str

    FEWEST = 300  # about two models
    # along (tokens per expert, width, experts); the best of 21 on held-out models (seeds 10-12) of
    # eight tables: an error of 6.5 %, against 9.0 % without a residual
    REGULARISATION = Regularisation(0.1, 0.3, 0.1)
    ROUNDS = 4

    def groups(self, by: str = "") -> IndexArray:
        """Return the model of each row: hidden size, experts, and experts per token. Single
        products are timed for several numbers of devices that share the experts: the ratio of
        experts to experts per token identifies them."""
        c, whole = self.calls, self.calls.whole
        return solver.numbered(
            c.k, c.experts / np.where(whole, 1.0, c.active), np.where(whole, c.active, 0.0)
        )

    def constants(self, start: Values | None = None) -> ConstantsFit:
        start = start or self.defaults(self.architecture)
        few = self.sample(MOST_LAYERS)
        whole = few.calls.whole
        classes = {
            ("align",): few.calls.n % ALIGNED > 0,
            ("l2_gain", "l2_share"): few.calls.warm,
            ("product_s",): ~whole,
            ("t0_s", "expert_s", "e_io"): whole,
        }
        absent = [name for names, rows in classes.items() if not np.any(rows) for name in names]
        fixed = dict.fromkeys(absent, solver.ABSENT)

        def searched(idle_s: float, fixed: Mapping[str, str]) -> ConstantsFit:
            return few.search(
                {**start, "idle_s": idle_s},
                EXPERTS_CONSTANTS,
                PRIOR,
                fixed=fixed,
                moot=solver.NO_GAIN,
                max_nfev=60,
                x_scale=0.1,
            )

        free = searched(0.0, {**fixed, "idle_s": "experts without tokens take no time"})
        if not np.any(whole):
            return free
        visited = searched(IDLE_S, fixed)
        losses = [solver.loss(few.log_residual(fit.values)) for fit in (visited, free)]
        return visited if losses[0] < IDLE_LOSS * losses[1] else free

    def blank(self) -> ResidualGrid:
        return blank_grid(self.calls.position, (1.0, 2.0, 2.0))  # octaves

    def accuracy(self, errors: FloatArray, values: Values) -> dict[str, float]:
        analytical = float(np.abs(np.expm1(self.log_residual(values))).mean())
        return super().accuracy(errors, values) | {"core_mape": analytical}


@dataclass(frozen=True)
class IndexerFit(Fit):
    calls: IndexerCalls
    architecture: str

    REGULARISATION = Regularisation(0.1, 0.1, 0.1)

    def groups(self, by: str = "") -> IndexArray:
        x = self.calls.sizes
        return solver.numbered(x.batch, x.q_len, x.kv_len, x.heads)

    def constants(self, start: Values | None = None) -> ConstantsFit:
        start = start or self.defaults(self.architecture)
        return self.search(start, self.registry, PRIOR)

    def blank(self) -> ResidualGrid:
        x, step = self.calls.sizes, 2.0  # octaves
        axes = np.log2(x.batch * x.q_len), np.log2(x.heads * x.features), np.log2(x.kv_len)
        start = [float(axis.min()) for axis in axes]
        shape = [int(np.ceil(np.ptp(axis) / step)) + 1 for axis in axes]
        return ResidualGrid((start[0], start[1], start[2]), (step,) * 3, np.zeros(shape))


def index_sizes(r: Any, key_bytes: float) -> IndexerSizes:
    """Return the sizes of measured indexers, whose keys are those of single positions."""
    sizes: list[Any] = floats(r, "batch", "q_len", "kv_len", "heads", "head_dim", "k")
    features = sizes[4]
    return IndexerSizes(*[*sizes, np.ones_like(features), features, key_bytes])


def layers_of(records: Any, machine: Machine, architecture: str) -> ExpertsFit:
    names = ("m", "n", "k", "experts", "active", "skew")
    sizes: dict[str, Any] = dict(zip(names, floats(records, *names), strict=True))
    warm = ~np.asarray(records.cold)
    layers = Layers(machine, **sizes, warm=warm, part=experts_part(records))
    return ExpertsFit(layers, floats(records, "seconds")[0], architecture)


def experts_part(records: Any) -> IndexArray:
    return np.asarray(np.argmax(np.asarray(records.role)[:, None] == PART_ROLES, axis=1))
