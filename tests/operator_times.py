"""Times of operators with their prediction intervals from sizes, as most tests ask for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from simulator.operators import attention, collective, delta_net, elementwise, experts
from simulator.operators.base import Estimate
from simulator.uncertainty.factors import Uncertainty
from simulator.uncertainty.operators import OperatorTimes, operator_time, predicted


def of_sizes(cost: Callable[..., Estimate]) -> Callable[..., OperatorTimes]:
    """Return the function from sizes and options to times for a cost on a profile ``hw``."""

    @wraps(cost)
    def times(*args: Any, level: float = 0.9, **options: Any) -> OperatorTimes:
        hw = signature(cost).bind(*args, **options).arguments["hw"]
        return operator_time(cost(*args, **options), hw, level)

    return times


def errors_of(cost: Callable[..., Estimate], *args: Any, **options: Any) -> Uncertainty:
    """Return the errors of the times."""
    return predicted(cost(*args, **options), signature(cost).bind(*args, **options).arguments["hw"])[1]


prefill_time, decode_time = of_sizes(attention.prefill), of_sizes(attention.decode)
elementwise_time, experts_time = of_sizes(elementwise.elementwise), of_sizes(experts.experts)
collective_time, delta_net_time = of_sizes(collective.collective), of_sizes(delta_net.delta_net)
