"""Explain predictions: the steps from the nominal speedup to the predicted one (:func:`waterfall`),
and the waterfalls of requests (:func:`explanations`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.arguments import SECONDS, listed, number
from simulator.arrays import FloatArray
from simulator.codes import EXPERTS
from simulator.display import Displayed, as_plain, by_column
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.operators.base import Estimate
from simulator.power import PARTS
from simulator.prediction.batch import batch_with
from simulator.prediction.budget import KernelBudget, kernel_budget, reaching
from simulator.prediction.compare import compare, request_results
from simulator.prediction.energy import PassEnergy
from simulator.prediction.notes import better_than_bound, inferred_by
from simulator.prediction.prunings import Pruning, applied, asked, in_formats
from simulator.prediction.requests import check_measured, on, profiles
from simulator.prediction.result import HasResult, Result
from simulator.uncertainty.forward import PredictedPass, forward_passes
from simulator.uncertainty.intervals import Inferred
from simulator.uncertainty.operators import gemm_steps_of, operator_time
from simulator.workload import WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.model import Model
    from simulator.request import Request
    from simulator.workload import Workload


@dataclass(frozen=True)
class Step:
    """One step of the waterfall.

    Parameters
    ----------
    name : str
        Name of the step.
    factor : float
        Ratio that multiplies the speedup before the step.
    speedup : float
        Speedup after the step, a ratio.
    note : str
        Meaning of the step.

    Examples
    --------
    >>> Step("launch", 0.98, 1.27, "fixed time of each kernel").factor
    0.98
    """

    name: str
    factor: float
    speedup: float
    note: str


class Waterfall(Displayed, tuple[Step, ...]):
    """The steps from the nominal speedup to the predicted one, in order: a tuple of
    :class:`Step`."""

    def _title(self) -> str:
        return (
            f"{self[0].speedup:.2f}x nominal, {self[-1].speedup:.2f}x predicted, {len(self) - 1}"
            " steps between"
        )

    def _columns(self) -> Mapping[str, Any]:
        return by_column(self.to_dict()["steps"])

    def to_dict(self) -> dict[str, Any]:
        return {"steps": as_plain(tuple(self))}


NOTES: Mapping[str, str] = {
    "rounding": "rounded to whole layers, head groups and aligned widths",
    "parts not pruned": "unpruned attention, lm_head and norms: the FLOP bound",
    "memory-bound operators": "limited by bytes, not FLOPs: the roofline bound",
    "zeros the kernel computes": "the kernel computes or fetches zeros",
    "tile quantisation": "shapes padded to whole tiles",
    "wave quantisation": "the last wave of tiles leaves SMs idle",
    "alignment": "widths off multiples of 8 (16-bit) use slower kernels",
    "kernel efficiency": "efficiency of the kernels at these shapes",
    "overhead operators": "routers, gathers, ... that pruning adds",
    "launch": "fixed time of each kernel, gaps between kernels",
    "host time": "host and server time not hidden by the device",
}
"""Step -> meaning."""

ACTIVE = "active experts not pruned", "a token uses as many experts as before: the FLOP bound"
"""The step of models with routed experts after "parts not pruned", and its meaning."""


def waterfall(
    dense: Workload, pruned: Workload, hw: str | HardwareProfile, *, dense_s: float | None = None
) -> Waterfall:
    """Return named steps from the nominal speedup 1/(1 - s) to the predicted one.

    The factors multiply exactly.

    Each step adds one effect to the times of both workloads; its factor is the change of their
    ratio.

    Parameters
    ----------
    dense, pruned : Workload
        As for :func:`simulator.speedup`.
    hw : str or HardwareProfile
        The device: a name, or a profile.
    dense_s : float, optional
        Measured time of ``dense``, s.

    Returns
    -------
    Waterfall
        The first step is "nominal" with factor and speedup 1/(1 - s); the last has the predicted
        speedup.

    Raises
    ------
    InputError
        As :func:`simulator.speedup`.

    Examples
    --------
    >>> import simulator
    >>> dense = simulator.lower(simulator.load_model("llama-3.1-8b"), phase="decode", engine="hf")
    >>> pruned = simulator.prune(dense, "width", 0.25)
    >>> steps = waterfall(dense, pruned, "h100")
    >>> min(steps, key=lambda step: step.factor).name
    'host time'
    """
    if dense_s is not None:
        number("dense_s", dense_s, SECONDS)
    batch = batch_with(dense, [pruned])
    _, requested, realised = applied(dense, pruned)
    hw = load_hardware(hw)
    p = forward_passes(batch, hw)
    times = p.total_s if dense_s is None else compare(batch, hw, dense_s=dense_s)[0]["pruned_s"]
    before = 1.0 / max(1.0 - requested, 1e-9)
    note = f"1 / (1 - {requested:.3g}): a fraction of {requested:.3g} removed"
    steps = [Step("nominal", before, before, note)]
    # all layers may be removed
    values = [1.0 / max(1.0 - realised, 1e-9), *_device_ratios(p), float(times[0] / times[1])]
    for (name, note), value in zip(_notes(batch), values, strict=True):
        steps.append(Step(name, value / before, value, note))
        before = value
    return Waterfall(steps)


def _notes(batch: WorkloadBatch) -> list[tuple[str, str]]:
    notes = list(NOTES.items())
    if _expert_share(batch) is not None:
        notes[1:2] = [(notes[1][0], notes[1][1].partition(":")[0]), ACTIVE]
    return notes


def _device_ratios(p: PredictedPass) -> list[float]:
    """Return the ratios of dense to pruned work after each step on the device."""
    batch, seconds = p.workloads, effects(p)
    is_pruned = batch.owner > 0
    flops, share = [batch.flops], _expert_share(batch)
    if share is not None:  # first as if a token used fewer experts as well
        experts = (batch.rows.kind == EXPERTS) & is_pruned
        flops.insert(0, np.where(experts, share, 1.0) * batch.flops)
    added = batch.rows.overhead & is_pruned
    columns = [np.where(added, 0.0, column) for column in (*flops, *seconds.values())]
    totals = [batch.total(column) for column in (*columns, seconds["kernel"])]
    return [float(of_dense / of_pruned) for of_dense, of_pruned in (*totals, p.device_s)]


def _expert_share(batch: WorkloadBatch) -> float | None:
    """Return the share of routed experts that is left over the share of a token's experts that is
    left, at most 1."""
    w = batch.rows
    (experts, left), (active, uses) = (
        batch.total(w.count * (w.kind == EXPERTS) * n) for n in (w.experts, w.active)
    )
    return min(1.0, float(left / experts * active / uses)) if uses and experts else None


def effects(p: PredictedPass) -> dict[str, FloatArray]:
    """Return the seconds of rows with cumulative effects; rows other than GEMMs go from roofline to
    kernel in one step."""
    w, ideal = p.workloads.rows, p.ideal_s
    seconds = {name: ideal.copy() for name in ("ideal", "roofline", "tile", "wave", "alignment")}
    seconds["kernel"] = np.maximum(
        p.row_s - np.minimum(_fixed(p), p.row_s), np.minimum(ideal, p.row_s)
    )
    for operator, rows, formats in p.workloads.rows.operators():
        for some, e in operator.effects(rows, p.hw, formats):
            index, steps = rows.at[some], gemm_steps_of(operator_time(e, p.hw))
            for name in seconds.keys() & steps.keys():
                seconds[name][index] = steps[name] * w.count[index]
    return seconds


def filled_waves(p: PredictedPass) -> FloatArray:
    """Return ``Estimate.waves`` of all rows; 0 where no blocks run in waves."""
    out = np.zeros(len(p.workloads.rows))
    for operator, rows, formats in p.workloads.rows.operators():
        for some, e in operator.idling(rows, p.hw, formats):
            out[rows.at[some]] = np.ravel(e.waves)
    return out


def _fixed(p: PredictedPass) -> FloatArray:
    """Return the fixed time of rows, s; GEMMs have theirs beside their other effects."""
    w, out = p.workloads.rows, np.zeros(len(p.workloads.rows))
    for operator, rows, formats in p.workloads.rows.operators():
        fixed = operator.fixed(rows, p.hw, formats)
        out[rows.at] = operator_time(fixed, p.hw).seconds if isinstance(fixed, Estimate) else fixed
    return out * w.count


@dataclass(frozen=True, repr=False)
class Explanation(HasResult):
    result: Result
    steps: Waterfall
    dense: Workload = field(repr=False)
    pruned: Workload = field(repr=False)
    hardware: HardwareProfile = field(repr=False)
    inferred: Inferred | None = None  # from a measured time of the dense model
    request: Request = field(kw_only=True, repr=False)
    pruning: Pruning = field(kw_only=True, repr=False)
    target: float = field(default=1.0, repr=False)  # target of the kernel budget

    def _title(self) -> str:
        return self.result._title()

    @cached_property
    def passes(self) -> PredictedPass:
        """The dense and the pruned pass, without a measured time."""
        return forward_passes(WorkloadBatch.of([self.dense, self.pruned]), self.hardware)

    @property
    def seconds(self) -> FloatArray:
        """Times of both passes, s."""
        return np.array([self.result.dense_s, self.result.pruned_s])

    @cached_property
    def layer_s(self) -> float:
        """Host time to launch one layer of the dense model if either model is host-bound, s; else
        0."""
        if self.inferred is not None and self.inferred.consistent:
            return self.inferred.layer_s if self.inferred.host_bound else 0.0
        return float(self.passes.host.layer[0]) if self.passes.host_bound.any() else 0.0

    @cached_property
    def budget(self) -> KernelBudget | None:
        """The kernel budget for a speedup of 1 and for the target."""
        targets = tuple(dict.fromkeys((1.0, self.target)))
        asked = self.request, self.pruning, self.hardware
        return (budget := kernel_budget(*asked, targets)) and replace(
            budget, reached=tuple(one for target in targets for one in reaching(*asked, target))
        )

    @cached_property
    def energy_parts(self) -> dict[str, list[float]]:
        """Energy of a dense and of a pruned pass on all devices, J, by what draws the power."""
        return dict(zip(PARTS, PassEnergy.of(self.passes, self.seconds).parts.tolist()))

    @cached_property
    def reason(self) -> str:
        """Reason for a speedup above its roofline bound; "" for other speedups."""
        r = self.result
        return better_than_bound(
            self.dense, self.pruned, self.hardware, r.speedup, r.roofline_bound
        )


def explanations(
    model: str | Model,
    hardware: Sequence[str | HardwareProfile],
    excluded: dict[str, InputError] | None = None,
    target: float = 1.0,
    **settings: Any,
) -> tuple[Explanation, ...]:
    """Return the waterfalls of one family at one sparsity, one published method, existing pruned
    models, or texts of ``--prune``, for every request and device; the settings are those of
    :func:`simulator.table`, and ``target`` is the speedup of the kernel budget. Combinations that
    cannot run are errors; with ``excluded``, which takes notes on them, only if none can."""
    config, devices = load_model(model), profiles(hardware)
    _check_named(settings)
    prunings, every, _ = asked([config], settings)
    if len(prunings) > 1 and (name := _name(settings)):
        raise InputError(
            f"sparsity: expected one to explain {name}, such as {prunings[0].sparsity:g}"
        )
    prunings, kept = in_formats(prunings, every)
    check_measured(kept, devices)
    order = [(one.phase, one.batch, one.seq) for one in kept]  # by request, then engine
    requests = sorted(kept, key=lambda one: order.index((one.phase, one.batch, one.seq)))
    out: list[Explanation] = []
    for request, pruning, hw in itertools.product(requests, prunings, devices):
        try:
            out.append(replace(explanation(request, pruning, hw), target=target))
        except InputError as error:
            if excluded is None:
                raise
            excluded[f"{hw.label} in {request.engine} is excluded: {error}"] = error
    if excluded and not out:
        raise next(iter(excluded.values()))
    return tuple(out)


def _name(settings: Mapping[str, Any]) -> str:
    return ", ".join(listed("family", settings.get("method") or settings.get("family") or ()))


def _check_named(settings: Mapping[str, Any]) -> None:
    if any(settings.get(other) for other in ("pruned", "prune")):
        return
    if not (name := _name(settings)):
        raise InputError(
            "prune: expected a pruning to explain, such as 'width mlp=0.3', a family, a method or a"
            " model"
        )
    if name == "all":
        raise InputError("family 'all': expected one family to explain")


def explanation(request: Request, pruning: Pruning, hw: HardwareProfile) -> Explanation:
    """Return the waterfall of one request."""
    (request,) = on([request], hw)
    pruning = pruning.computed(request, hw)
    dense = lower(request)
    pruned = pruning.apply(dense, request)
    r = request_results([request], [pruning], [hw])[0]
    return Explanation(
        result=replace(r, sparsity=1.0 - (1.0 - r.sparsity)),  # rounded as in the waterfall
        steps=waterfall(dense, pruned, hw, dense_s=request.dense_s),
        dense=dense,
        pruned=pruned,
        hardware=hw,
        inferred=inferred_by(dense, hw, request),
        request=request,
        pruning=pruning,
    )
