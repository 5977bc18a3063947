"""Answer the questions of a service: at equal concurrency, at equal memory, within limits, and at what cost.

Use :func:`serve`. A pruned model is faster with equally many requests in flight; it also leaves memory for more of
them, and keeps limits of latency at a higher load. :mod:`simulator.prediction.operating` finds the operating points,
:mod:`simulator.prediction.service_text` states them in sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulator.arguments import OneOrMore, listed, number, shown
from simulator.display import Displayed
from simulator.engines import DEFAULT_ENGINE
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.prediction.caveats import uncalibrated
from simulator.prediction.compare import scenario_results
from simulator.prediction.operating import CURVE, EQUAL, PRICE, Limits, OperatingPoint, Service, operating_points
from simulator.prediction.prunings import Excluded, difference_lines, exclude, excluded_lines, prunings_of, readable
from simulator.prediction.runnable import runnable
from simulator.prediction.scenario import Scenario, profiles, scenarios, whole_number
from simulator.prediction.table import dense_notes

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.config import ModelConfig


@dataclass(frozen=True, repr=False)
class Served(Displayed):
    """Services by engine and device, and notes on exclusions and limits of the predictions."""

    services: tuple[Service, ...]
    notes: tuple[str, ...] = ()

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """Operating points of all services, without curves."""
        return tuple(point for service in self.services for point in service.points)

    def to_dict(self) -> dict[str, Any]:
        """Return ``points`` as dictionaries, and ``notes``."""
        return {"points": [point.to_dict() for point in self.points], "notes": list(self.notes)}

    def _title(self) -> str:
        first = self.points[0]
        return f"{first.model} in {len(self.services)} services: {len(self.points)} operating points"

    def _columns(self) -> Mapping[str, Any]:
        """Return one row per operating point."""
        rows = [vars(point) for point in self.points]
        return {name: [row[name] for row in rows] for name in rows[0]}


def serve(
    model: str | ModelConfig,
    hardware: OneOrMore[str | HardwareProfile],
    family: OneOrMore[str] | None = None,
    sparsity: OneOrMore[float] | None = None,
    seq: int = 2048,
    *,
    method: OneOrMore[str] = (),
    pruned: OneOrMore[str | ModelConfig] = (),
    prune: OneOrMore[str] = (),
    engine: OneOrMore[str] = DEFAULT_ENGINE,
    concurrency: int | None = None,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    probability: float = 0.5,
    price: float | None = None,
    scenario: Scenario | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Served:
    """Compare the dense and pruned models in a server: at equal concurrency, at equal memory, and within limits.

    Parameters
    ----------
    model : str or ModelConfig
        Name, path or shapes of the dense model.
    hardware : one or more
        Devices: names, paths or profiles.
    family, sparsity : one or more
        Families and fractions removed, as in :func:`simulator.table`.
    seq : int
        Tokens of each prompt, at least 1.
    method, pruned, prune : one or more
        Instead of families: published methods, existing pruned models, or texts such as ``"width mlp=0.3"``.
    engine : one or more
        Names or paths of engines.
    concurrency : int, optional
        Requests in flight of the comparison at equal concurrency. Default: the largest number that fits the dense
        model.
    ttft_s, tpot_s : float, optional
        Limits of the time to the first token and of the time per further token, s.
    probability : float
        Probability with which the limits must hold, in (0, 1).
    price : float, optional
        Price of a GPU-hour, in any currency.
    scenario : Scenario
        Common inputs: new tokens, number formats, devices, cached prefix, token budget, level of the intervals.
    options : mapping
        Further options of a single family.
    progress : callable
        Called with services done and their number.

    Returns
    -------
    Served
        One :class:`Service` per engine and device, each with its operating points.

    Raises
    ------
    InputError
        For an unknown name or a value out of range, if no model fits a device, and if no pruning can be predicted.

    Examples
    --------
    >>> import simulator
    >>> found = simulator.serve("llama-3.1-8b", "h100", prune="depth 0.25", tpot_s=0.02)
    >>> for point in found.points:
    ...     print(f"{point.point}: {point.name} at {point.concurrency}")
    equal concurrency: dense at 214
    equal concurrency: depth at 25 % at 214
    equal memory: dense at 214
    equal memory: depth at 25 % at 303
    within limits: dense at 30
    within limits: depth at 25 % at 44
    """
    if not isinstance(options, Mapping | None):
        raise InputError(f"options: expected a mapping from option to value, got {shown(options)}")
    if concurrency is not None:
        whole_number("concurrency", concurrency)
    if price is not None:
        number("price", price, PRICE)
    if scenario is not None and scenario.dense_s is not None:
        raise InputError("dense time: expected none, as a service has many concurrencies")
    limits, dense = Limits(ttft_s, tpot_s, probability), load_model(model)
    devices, (existing, skipped) = profiles(hardware), readable(listed("pruned", pruned))
    chosen, fractions = (None if v is None else listed(n, v) for n, v in (("family", family), ("sparsity", sparsity)))
    texts = listed("prune", prune)
    prunings = prunings_of([dense], chosen, listed("method", method), existing, fractions, options, texts)
    requested = scenarios(scenario, [dense], engine, ["serve"], [concurrency or 1], [seq])
    excluded, several = Excluded(), len(prunings) > 1

    def reject(pruning: int | None, reason: str, device: str) -> None:
        if pruning is None or not several:
            raise InputError(reason)
        exclude(excluded, prunings[pruning], reason, device)

    services: list[Service] = []
    notes = dict.fromkeys((*skipped, *(line for p in prunings for line in difference_lines(dense, p.model or dense))))
    for done, (one, hw) in enumerate(((one, hw) for one in requested for hw in devices), start=1):
        results = scenario_results(one, prunings, [hw], reject)
        if len(results):
            own = [prunings[i] for i in results.pruning.tolist()]
            names = [r.pruning for r in results]
            points = operating_points(one, hw, own, names, concurrency=concurrency, limits=limits, price=price)
            kinds = tuple(p for p in points if p.point != CURVE), tuple(p for p in points if p.point == CURVE)
            service = Service(*kinds, limits, tuple(runnable(one, pruning) for pruning in own))
            services.append(service)
            notes |= dict.fromkeys((*dense_notes(results, one, [hw]), *_too_many(service), *uncalibrated(results)))
        if progress is not None:
            progress(done, len(requested) * len(devices))
    if not services:
        raise InputError(next(iter(excluded_lines(excluded)), "nothing to predict"))
    return Served(tuple(services), (*notes, *excluded_lines(excluded)))


def _too_many(service: Service) -> list[str]:
    """Return a note on each model that does not fit at equal concurrency; the dense model's memory has one already."""
    return [
        f"{p.name} at concurrency {p.concurrency} on {p.hardware}: {p.largest_concurrency} fit; hypothetical times"
        for p in service.kinds[EQUAL]
        if not p.fits and (p.pruning or p.limited_by == "engine")
    ]
