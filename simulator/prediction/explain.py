"""Explain predictions: a waterfall of the losses, and a conclusion in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from simulator.display import with_and
from simulator.engines.engine import load_engine
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.prediction.caveats import better_than_bound, inferred_by
from simulator.prediction.compare import scenario_results
from simulator.prediction.prunings import prunings_of
from simulator.prediction.result import HasResult, Result
from simulator.prediction.scenario import Scenario, check_measured, profiles, scenarios, setting
from simulator.prediction.waterfall import Waterfall, waterfall
from simulator.uncertainty.forward import forward_passes
from simulator.uncertainty.intervals import Inferred
from simulator.units import percent, seconds
from simulator.workload import WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig
    from simulator.workload import Workload

NOTABLE = 0.985
"""Steps with a factor below it (or above its inverse) are mentioned."""

MOST_CONCLUSIONS = 3
"""Explanations with a conclusion of their own at the beginning."""

NARROWER = frozenset(("width", "width_cross", "low_rank"))
"""Families that keep the number of kernels or raise it."""


@dataclass(frozen=True, repr=False)
class Explanation(HasResult):
    """A prediction with its waterfall."""

    result: Result
    steps: Waterfall
    dense: Workload = field(repr=False)
    pruned: Workload = field(repr=False)
    hardware: HardwareProfile = field(repr=False)
    inferred: Inferred | None = None  # from a measured time of the dense model
    dense_s: float | None = field(default=None, repr=False)  # the measured time

    def _title(self) -> str:
        return self.result._title()

    @cached_property
    def layer_s(self) -> float:
        """Host time to launch one layer of the dense model if either model is host-bound, s; else 0."""
        if self.inferred is not None and self.inferred.consistent:
            return self.inferred.layer_s if self.inferred.host_bound else 0.0
        p = forward_passes(WorkloadBatch.of([self.dense, self.pruned]), self.hardware)
        return float(p.host.layer[0]) if p.host_bound.any() else 0.0

    @cached_property
    def reason(self) -> str:
        """Reason for a speedup above its roofline bound; "" for other speedups."""
        r = self.result
        return better_than_bound(self.dense, self.pruned, self.hardware, r.speedup, r.roofline_bound)


def explanations(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    family: str | None = None,
    sparsity: float | None = None,
    phase: Sequence[str] = ("decode",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    method: str | None = None,
    pruned: Sequence[str | ModelConfig] = (),
    prune: Sequence[str] = (),
    engine: Sequence[str] = (),
    scenario: Scenario | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Explanation, ...]:
    """Return the waterfalls of one family at one sparsity, one published method, existing pruned models, or texts of
    ``--prune``, for every engine, phase, batch, length and device; the other arguments are those of
    :func:`simulator.table`.
    """
    config, devices = load_model(model), profiles(hardware)
    if not (pruned or prune) and family is None and method is None:
        raise InputError("prune: expected a pruning to explain, such as 'width mlp=0.3', a family, a method or a model")
    if family == "all":
        raise InputError("family 'all': expected one family to explain")
    fractions = None if sparsity is None else [sparsity]
    methods, names = [method] if method else [], None if family is None else [family]
    prunings = prunings_of([config], names, methods, pruned, fractions, options, prune)
    if len(prunings) > 1 and not (pruned or prune):
        raise InputError(f"sparsity: expected one to explain {method or family}, such as {prunings[0].sparsity:g}")
    requested = scenarios(scenario, [config], engine, phase, batch, seq)
    check_measured(requested, devices)
    order = [(one.phase, one.shapes) for one in requested]  # by request, then engine
    requested.sort(key=lambda one: order.index((one.phase, one.shapes)))
    out: list[Explanation] = []
    for one in requested:
        for pruning in prunings:
            for hw, r in zip(devices, scenario_results(one, [pruning], devices)):
                (dense,) = one.on(hw).workloads
                w = pruning.apply(dense, one)
                steps, inferred = waterfall(dense, w, hw, dense_s=one.dense_s), inferred_by(dense, hw, one)
                # rounded as in the waterfall
                r = replace(r, sparsity=1.0 - (1.0 - r.sparsity))
                out.append(Explanation(r, steps, dense, w, hw, inferred, one.dense_s))
                progress(len(out), len(requested) * len(prunings) * len(devices))
    return tuple(out)


def conclusion(e: Explanation) -> str:
    """Return nominal and predicted speedup, bottleneck and largest losses in a sentence, and advice for a host-bound
    model in another."""
    r, losses = e.result, sorted((s for s in e.steps[1:] if s.factor < NOTABLE), key=lambda s: s.factor)
    gains = [s for s in e.steps[1:] if s.factor > 1 / NOTABLE and s.name != "rounding"]
    share = f" ({percent(r.sparsity)} removed)" if percent(r.sparsity) not in r.pruning else ""
    nominal = f"{r.pruning}{share} of {r.model}: nominal {e.steps[0].speedup:.2f}x"
    predicted = f"predicted {r.speedup:.2f}x ({r.speedup_lower:.2f}-{r.speedup_upper:.2f})"
    parts = [f"{nominal}, {predicted} on {setting(r)}, {r.bottleneck}-bound"]
    if losses:
        parts.append("losses: " + with_and([f"{s.name} (x{s.factor:.2f})" for s in losses[:3]]))
    elif r.speedup > 1:
        parts.append(f"no single step loses more than {100 * (1 - NOTABLE):.1f} %")
    if gains:
        parts.append("gains: " + with_and([f"{s.name} (x{s.factor:.2f})" for s in gains[:2]]))
    if e.reason:
        parts.append(e.reason)
    if r.speedup_upper < 1:
        parts.append("the pruned model is slower")
    elif r.speedup_lower <= 1 and r.sparsity > 0:
        parts.append("the interval includes 1.00x, so a gain is uncertain")
    return f"{'; '.join(parts)}.{_host_bound(e)}"


def conclusions(found: Sequence[Explanation]) -> list[str]:
    """Return one to three conclusions of explanations: each :func:`conclusion`, or of more than three their range."""
    if len(found) <= MOST_CONCLUSIONS:
        return [conclusion(e) for e in found]
    best, worst = (pick(found, key=lambda e: e.result.speedup).result for pick in (max, min))
    first, settings = found[0].result, len({setting(e.result) for e in found})
    what = first.pruning
    several = f"{what} and {len(found) // settings - 1} more" if len(found) > settings else what
    ends = " to ".join(
        f"{r.speedup:.2f}x ({r.speedup_lower:.2f}-{r.speedup_upper:.2f}) on {setting(r)}" for r in (worst, best)
    )
    return [f"{several} of {first.model}, {settings} settings: predicted {ends}."]


def _host_bound(e: Explanation) -> str:
    """Return advice for a host-bound model, else ""."""
    if not e.layer_s:
        return ""
    engine = load_engine(e.dense.meta.engine)
    text = f"{engine.title}: the host needs {seconds(e.layer_s)} per layer; while the device needs less, narrower "
    text += "layers give no speedup: use fewer layers or a CUDA graph"
    if NARROWER & set(e.result.family.split("+")) and engine.own_code.source:
        text += f" (custom modelling code has cost up to another x{engine.own_code.value:g} in published results)"
    return f" {text}."
