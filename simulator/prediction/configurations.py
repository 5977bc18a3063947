"""Find the shapes that reach a target with the fewest parameters removed, on all devices, engines and requests at once.

Use :func:`configurations_of`. Each of :data:`KINDS` changes certain dimensions, to aligned values; the result is the
configuration of that kind that keeps most parameters. For each combination of the other dimensions, bisection finds the
largest value of the last dimension that reaches the target. Time falls in steps, so configurations that keep slightly
more parameters are then tried too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import IndexArray
from simulator.errors import InputError
from simulator.models.changes import NONE, changed_keys, free_heads
from simulator.prediction.batch import batch_with
from simulator.prediction.compare import compare
from simulator.prediction.operating import check_probability, probability_of
from simulator.prediction.result import HasResult, Result
from simulator.prediction.scenario import Scenario, dense_seconds
from simulator.prediction.speedup import speedups
from simulator.units import percent, ratio, seconds
from simulator.workload_batch import WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.workload import Workload

KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "depth": ("layers",),
        "heads": ("kv_heads",),
        "inner": ("inner",),
        "width": ("kv_heads", "inner"),
        "hidden": ("hidden",),
        "depth+width": ("layers", "kv_heads", "inner"),
        "hidden+width": ("hidden", "kv_heads", "inner"),
        "all": ("layers", "hidden", "kv_heads", "inner"),
    }
)
"""Kinds of configurations and the dimensions they change; query heads are removed with their KV heads."""

FAMILIES = MappingProxyType({"layers": "depth", "kv_heads": "width", "inner": "width", "hidden": "width_cross"})
"""Dimension -> family that changes it."""

LARGEST_SPARSITY = 0.9
"""Largest sparsity of a dimension or family: no published method keeps a model useful beyond it."""

ALIKE = 0.5
"""Smallest ratio of the shares that two dimensions lose: a dimension that hardly changes does not count."""

ALIGN = (128, 64)
"""Widths are multiples, per device, of the first that divides the dense width, else of the last."""

MOST_COMBINATIONS = 1000
"""Most combinations of the dimensions except the last; more are thinned, then refined around the best."""

MOST_VALUES = 512
"""Most values of one dimension; more are thinned."""

ROWS_AT_ONCE = 200_000
"""Operators timed together, which bounds the memory."""


@dataclass(frozen=True)
class Target:
    """A target: a speedup, or a time or throughput of a pass (of a request in serve)."""

    speedup: float | None = None
    latency_s: float | None = None
    tokens_per_s: float | None = None  # new tokens of all sequences; in prefill, prompt tokens

    def __post_init__(self) -> None:
        given = [value for value in vars(self).values() if value is not None]
        if len(given) != 1:
            raise InputError("target: expected one of speedup, latency and tokens/s")
        if self.speedup is not None and not 1.0 < self.speedup <= 1000.0:
            raise InputError(f"target {self.speedup:g}: expected a speedup above 1, such as 1.5")
        if not 1e-9 < given[0] < 1e12:
            raise InputError(f"target {given[0]:g}: expected a number between 1e-9 and 1e12")

    @property
    def text(self) -> str:
        """Return the target as part of a sentence."""
        if self.speedup is not None:
            return f"{ratio(self.speedup)}x"
        return seconds(self.latency_s) if self.latency_s is not None else f"{self.tokens_per_s:,.4g} tokens/s"

    def over(self, dense_s: float, scenario: Scenario) -> float:
        """Return the required speedup over a dense time; at most 1 if the dense model reaches the target."""
        if self.speedup is not None:
            return self.speedup
        if self.latency_s is not None:
            return dense_s / self.latency_s
        ((batch, seq),) = scenario.shapes
        return dense_s / dense_seconds(self.tokens_per_s, scenario.phase, batch, seq, scenario.new_tokens)


@dataclass(frozen=True, repr=False)
class Configuration(HasResult):
    """Shapes of a pruned model, and their result in one scenario on one device."""

    result: Result
    configuration: str  # one of KINDS
    target: float
    probability: float  # of reaching the target, from the speedup's interval
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    parameters: int
    kept: float  # share of the dense model's parameters
    config: Mapping[str, Any]  # keys of config.json that change, and their values

    @property
    def shapes(self) -> str:
        """The dimensions that the configuration changes, as text."""
        heads = f"{self.heads} heads" + (f" on {self.kv_heads} KV heads" if self.heads != self.kv_heads else "")
        named = {"layers": f"{self.layers} layers", "hidden": f"hidden {self.hidden}", "kv_heads": heads}
        named["inner"] = f"MLP {self.inner}"
        return ", ".join(named[dimension] for dimension in KINDS[self.configuration])

    def _title(self) -> str:
        r = self.result
        shapes = f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads on {self.kv_heads}, MLP {self.inner}"
        reached = f"{self.configuration}, {shapes}: {ratio(r.speedup)}x, {percent(self.kept)} kept"
        return f"{r.model} on {r.request}: {reached}"


def _quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


@dataclass(frozen=True)
class RequiredSpeedups:
    """A scenario with one request on some devices, and the speedup required on each."""

    scenario: Scenario
    hardware: Sequence[HardwareProfile]
    speedups: Sequence[float]

    @classmethod
    def of(cls, scenario: Scenario, hardware: Sequence[HardwareProfile], target: Target) -> RequiredSpeedups:
        """Return the required speedups; for a target time or throughput they differ by device."""
        alone = WorkloadBatch.of(scenario.workloads)
        times = [compare(alone, hw, scenario.level, scenario.dense_s)[0]["dense_s"][0].item() for hw in hardware]
        return cls(scenario, hardware, [target.over(dense_s, scenario) for dense_s in times])

    @property
    def dense(self) -> Workload:
        """Return the dense workload."""
        return self.scenario.workloads[0]

    def lower(self, model: ModelConfig) -> Workload:
        """Return the workload of another model in the same scenario."""
        return replace(self.scenario, model=model).workloads[0]

    def reached(self, models: Sequence[ModelConfig], probability: float) -> NDArray[np.bool_]:
        """Return which models reach every target with at least a probability; models that cannot run do not."""
        out, lowered = np.zeros(len(models), dtype=bool), []
        for i, model in enumerate(models):
            with suppress(InputError):  # a number of heads that the devices cannot share
                lowered.append((i, self.lower(model)))
        many = max(1, ROWS_AT_ONCE // len(self.dense))
        for part in (lowered[i : i + many] for i in range(0, len(lowered), many)):
            out[[i for i, _ in part]] = self._enough([w for _, w in part], probability)
        return out

    def _enough(self, workloads: Sequence[Workload], probability: float) -> NDArray[np.bool_]:
        batch, out = batch_with(self.dense, workloads), np.ones(len(workloads), dtype=bool)
        level, needed = _quantile(0.5 + 0.5 * self.scenario.level), _quantile(probability)
        for hw, target in zip(self.hardware, self.speedups):
            c, _ = compare(batch, hw, self.scenario.level, self.scenario.dense_s)
            speedup = c["speedup"]
            half = speedup / c["speedup_lower"] if probability > 0.5 else c["speedup_upper"] / speedup
            out &= (np.log(speedup / target) >= needed / level * np.log(half))[1:]
        return out

    def rows(self, found: Mapping[str, ModelConfig], configs: Sequence[Mapping[str, Any]]) -> Iterator[Configuration]:
        """Yield one row per device and configuration."""
        dense, lowered = self.dense.meta.config, [self.lower(m) for m in found.values()]
        for hw, target in zip(self.hardware, self.speedups):
            results = speedups(self.dense, lowered, hw, self.scenario.level, dense_s=self.scenario.dense_s)
            for (name, new), config, r in zip(found.items(), configs, results):
                yield Configuration(
                    result=r,
                    configuration=name,
                    target=target,
                    probability=probability_of(target, r.speedup, r.speedup_lower, r.speedup_upper, r.level),
                    layers=new.layers,
                    hidden=new.hidden,
                    heads=new.heads,
                    kv_heads=new.kv_heads,
                    inner=new.inner,
                    parameters=new.parameters,
                    kept=new.parameters / dense.parameters,
                    config=config,
                )


def configurations_of(
    model: ModelConfig,
    places: Sequence[RequiredSpeedups],
    families: Sequence[str],
    probability: float = 0.5,
    content: Mapping[str, Any] = NONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Configuration], list[str]]:
    """Return the configurations of a model that reach all targets, by falling number of parameters, one row per
    scenario and device; and notes.

    ``families`` are the allowed families, ``probability`` is the minimum probability of reaching each target (0.5: the
    prediction reaches it). ``content`` is the model's ``config.json``, if it has one; configurations that it cannot
    express are excluded. ``progress`` is called with kinds done and their number.

    >>> from simulator.hardware.library import load_hardware
    >>> from simulator.models.library import load_model
    >>> model, hw = load_model("llama-3.1-8b"), load_hardware("h100")
    >>> place = RequiredSpeedups.of(Scenario(model=model, phase="decode", shapes=((8, 2048),)), [hw], Target(1.5))
    >>> [c.layers for c in configurations_of(model, [place], ["depth"])[0]]
    [19]
    """
    check_probability(probability)
    if model.blocks or model.experts or model.latent:
        needed = "configurations need equal layers without routed experts or latent attention"
        return [], [f"{model.name}: {needed}; read the minimum sparsity of each family instead"]
    space = _space(model, max(p.scenario.devices if p.scenario.parallel != "pipeline" else 1 for p in places))
    allowed = [name for name, family in FAMILIES.items() if family in families and name in space]
    found: dict[str, ModelConfig] = {}
    notes: list[str] = []

    def reached(models: Sequence[ModelConfig]) -> NDArray[np.bool_]:
        out = np.ones(len(models), dtype=bool)
        for place in places:
            left = np.flatnonzero(out).tolist()
            out[left] = place.reached([models[i] for i in left], probability)
        return out

    spaces: dict[str, Space] = {}
    for name, dimensions in KINDS.items():
        free = {d: space[d] for d in dimensions if d in allowed}
        if free and free.keys() not in [other.keys() for other in spaces.values()]:
            spaces[name] = free
    for done, (name, one) in enumerate(spaces.items(), start=1):
        if best := _best(model, one, reached):
            found[name] = best
        progress(done, len(spaces))
    if missed := [name for name in spaces if name not in found]:
        notes.append(f"{', '.join(missed)}: no configuration reaches the target everywhere; change more dimensions")
    keys = {}
    for name, new in found.items():
        try:
            keys[name] = changed_keys(model, new, content)
        except InputError as error:
            notes.append(f"configuration {name}: excluded: {error}")
    order = sorted(keys, key=lambda name: -found[name].parameters)
    rows = [row for place in places for row in place.rows({n: found[n] for n in order}, [keys[n] for n in order])]
    return sorted(rows, key=lambda row: order.index(row.configuration)), notes


# -- search ------------------------------------------------------------------------------------------------------------

Space = Mapping[str, NDArray[np.int64]]
"""Dimension -> its values below the dense value, falling."""

ReachTest = Callable[[Sequence["ModelConfig"]], NDArray[np.bool_]]


AGAIN = 300
"""Number of configurations with slightly more parameters than the best that are tried: time falls in steps."""


def _space(model: ModelConfig, devices: int) -> dict[str, NDArray[np.int64]]:
    """Return the aligned values of each dimension that the model's configuration can express."""
    steps = {"layers": 1, "kv_heads": ALIGN[-1] // math.gcd(ALIGN[-1], model.head_dim)}
    for name, shared in (("hidden", 1), ("inner", devices)):
        step = next((a for a in ALIGN if getattr(model, name) % a == 0), ALIGN[-1])
        steps[name] = math.lcm(step, ALIGN[-1] * shared)
    if not free_heads(model):  # heads follow from the hidden size and the width of a head
        steps["hidden"] = math.lcm(steps["hidden"], model.head_dim)
        del steps["kv_heads"]
    out = {}
    for name, step in steps.items():
        dense = getattr(model, name)
        values = np.arange((dense - 1) // step, 0, -1) * step
        values = values[values >= (1.0 - LARGEST_SPARSITY) * dense]
        out[name] = values[:: 1 + len(values) // MOST_VALUES]
    return {name: values for name, values in out.items() if len(values)}


def _pruned(model: ModelConfig, values: Mapping[str, int]) -> ModelConfig:
    """Return a model with some dimensions changed."""
    new = dict(values)
    if "hidden" in new and not free_heads(model):
        new["kv_heads"] = new["hidden"] // model.head_dim
    if "kv_heads" in new:
        new["heads"] = new["kv_heads"] * (model.heads // model.kv_heads)
    layers = new.get("layers", model.layers)
    return replace(model, windows=model.windows[:layers], **new)  # type: ignore[arg-type]


def _best(model: ModelConfig, space: Space, reached: ReachTest) -> ModelConfig | None:
    """Return the model of a space that reaches the target and keeps most parameters."""
    *others, last = space
    looked = dict(space)
    while math.prod(len(looked[name]) for name in others) > MOST_COMBINATIONS:
        longest = max(others, key=lambda name: len(looked[name]))
        looked[longest] = looked[longest][::2]
    found = _widest(model, looked, reached)
    thinned = {name: len(space[name]) // len(looked[name]) for name in others if len(looked[name]) < len(space[name])}
    if found is None or not thinned:
        return found
    near = {}
    for name, values in space.items():
        at = int(np.flatnonzero(values == getattr(found, name))[0])
        around = thinned.get(name, 1) if name != last else len(values)
        near[name] = values[max(0, at - around) : at + around + 1]
    fewer = 2 * math.prod(map(len, near.values())) <= math.prod(map(len, space.values()))
    return _best(model, near, reached) if fewer else found


def _widest(model: ModelConfig, space: Space, reached: ReachTest) -> ModelConfig | None:
    """Return the same as :func:`_best`, from all combinations of the dimensions except the last."""
    *others, last = space
    values, dense = space[last], [getattr(model, name) for name in others]
    combinations = list(itertools.product(*(space[name] for name in others)))
    grid = np.array(combinations, dtype=np.int64).reshape(len(combinations), len(others))
    low, high = np.zeros(len(grid), dtype=np.intp), np.full(len(grid), len(values) - 1)  # wider ones come first
    if others:  # range of the last dimension by the shares that the others lose
        lost, of_last = 1.0 - grid / dense, 1.0 - values / getattr(model, last)
        least, most = lost.max(axis=1) * ALIKE, lost.min(axis=1) / ALIKE
        low = np.searchsorted(of_last, least - 1e-9)
        high = np.searchsorted(of_last, most + 1e-9, side="right") - 1
        some = (least <= lost.min(axis=1)) & (low <= high)
        grid, low, high = grid[some], low[some], high[some]

    def model_at(row: int, at: int) -> ModelConfig:
        return _pruned(model, {**dict(zip(others, grid[row].tolist())), last: int(values[at])})

    def good(rows: IndexArray, at: IndexArray) -> NDArray[np.bool_]:
        return reached([model_at(*place) for place in zip(rows.tolist(), at.tolist())])

    rows, every = np.arange(len(grid)), np.arange(len(values))
    widest, narrowest = (np.array([model_at(r, at).parameters for r in rows.tolist()], float) for at in (0, -1))
    along = (values - values[-1]) / max(1, values[0] - values[-1])  # parameters are linear in the last dimension
    kept = narrowest[:, None] + along * (widest - narrowest)[:, None]
    inside = (low[:, None] <= every) & (every <= high[:, None])
    rows = rows[good(rows, high)]
    if not len(rows):
        return None
    low, high = low[rows] - 1, high[rows]  # between the narrowest that may miss and the widest that reaches
    while (may := (high - low > 1) & (kept[rows, low + 1] > kept[rows, high].max())).any():
        middle = (low + high) // 2
        yes = may.copy()
        yes[may] = good(rows[may], middle[may])
        low, high = np.where(may & ~yes, middle, low), np.where(yes, middle, high)
    at = int(kept[rows, high].argmax())
    best = int(rows[at]), int(high[at])
    while True:
        more = np.argwhere(inside & (kept > kept[best]))
        more = more[np.argsort(kept[tuple(more.T)], kind="stable")][:AGAIN]
        if not (yes := good(*more.T)).any():
            return model_at(*best)
        best = tuple(more[np.flatnonzero(yes)[-1]].tolist())
