"""Times of operators with their prediction intervals from sizes, as most tests ask for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from simulator.hardware.profile import HardwareProfile
from simulator.operators import attention, collective, elementwise, experts, indexer
from simulator.operators.base import ELEMENT_BYTES, Estimate, ready
from simulator.operators.delta_net import DeltaNets
from simulator.operators.short_conv import Convolutions
from simulator.operators.state_space import Recurrences
from simulator.uncertainty.factors import Uncertainty
from simulator.uncertainty.operators import OperatorTimes, operator_time, predicted


def prefill(
    batch: Any,
    q_len: Any,
    kv_len: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    hw: Any,
    *,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    **options: Any,
) -> Estimate:
    """Return the cost of prefill attention."""
    calls = attention.Geometry.of(batch, q_len, kv_len, heads, kv_heads, head_dim, **options)
    return attention.prefill(calls, hw, dtype, kv_dtype)


def decode(
    batch: Any,
    kv_len: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    hw: Any,
    *,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    cold: bool = True,
    **options: Any,
) -> Estimate:
    """Return the cost of decode attention."""
    calls = attention.Geometry.of(
        batch, 1, kv_len, heads, kv_heads, head_dim, warm=not cold, **options
    )
    return attention.decode(calls, hw, dtype, kv_dtype)


def of_experts(
    m: Any, n: Any, k: Any, number: Any, active: Any, hw: Any, **options: Any
) -> Estimate:
    """Return the cost of routed experts."""
    further = {name: options.pop(name) for name in ("skew", "devices") if name in options}
    return experts.experts(experts.ExpertSizes(m, n, k, number, active, **further), hw, **options)


def of_delta_net(
    *sizes: Any, conv: Any = 4, dtype: str = "bf16", state_dtype: str = "fp32"
) -> Estimate:
    """Return the cost of gated delta nets, from their sizes and a profile."""
    *shape, hw = sizes
    return ready(hw, "delta_net", dtype, state_dtype).of_sizes(DeltaNets, *shape, conv, False)


def of_recurrences(*sizes: Any, dtype: str = "bf16", state_dtype: str = "fp32") -> Estimate:
    """Return the cost of recurrences, from their sizes and a profile."""
    *shape, hw = sizes
    return ready(hw, "state_space", dtype, state_dtype).of_sizes(Recurrences, *shape)


def of_convolutions(*sizes: Any, dtype: str = "bf16") -> Estimate:
    """Return the cost of convolutions, from their sizes and a profile."""
    *shape, hw = sizes
    return ready(hw, "short_conv", dtype).of_sizes(Convolutions, *shape)


def of_indexer(*sizes: Any, key_dtype: str = "fp8", **options: Any) -> Estimate:
    """Return the cost of indexers, from their sizes and a profile."""
    *columns, hw = sizes
    arrays = (np.asarray(x, dtype=np.float64) for x in np.broadcast_arrays(*columns))
    names = ("batch", "q_len", "kv_len", "heads", "features", "topk", "ratio", "stored")
    shape = indexer.IndexerSizes(**dict(zip(names, arrays)), key_bytes=ELEMENT_BYTES[key_dtype])
    return indexer.indexer(shape, hw, key_dtype=key_dtype, **options)


def of_sizes(cost: Callable[..., Estimate]) -> Callable[..., OperatorTimes]:
    """Return the function from sizes and options to times for a cost on a profile ``hw``."""

    @wraps(cost)
    def times(*args: Any, level: float = 0.9, **options: Any) -> OperatorTimes:
        return operator_time(cost(*args, **options), _profile(args, options), level)

    return times


def errors_of(cost: Callable[..., Estimate], *args: Any, **options: Any) -> Uncertainty:
    """Return the errors of the times."""
    return predicted(cost(*args, **options), _profile(args, options))[1]


def _profile(args: tuple[Any, ...], options: dict[str, Any]) -> HardwareProfile:
    return next(a for a in (*options.values(), *args) if isinstance(a, HardwareProfile))


prefill_time, decode_time = of_sizes(prefill), of_sizes(decode)
elementwise_time, experts_time = of_sizes(elementwise.elementwise), of_sizes(of_experts)
collective_time, delta_net_time = of_sizes(collective.collective), of_sizes(of_delta_net)
indexer_time = of_sizes(of_indexer)
state_space_time = of_sizes(of_recurrences)
short_conv_time = of_sizes(of_convolutions)
