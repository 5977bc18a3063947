"""What a pruning family is: its description, the sparsity of every row that it is given, and checks of its options.

A family is one file of this package with a constant ``FAMILY``; nothing else lists it. What families do to rows is in
``_rows`` and ``_tokens``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.workload import Workload

F = NDArray[np.float64]

QKV: tuple[str, ...] = ("q", "k", "v", "qkv")
PROJECTIONS: tuple[str, ...] = (*QKV, "o", "gate", "up", "gate_up", "down")
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"attention": (*QKV, "o"), "mlp": ("gate", "up", "gate_up", "down"), "qkv": QKV}
)
"""Names that stand for several projections in a per-projection sparsity."""
SUBLAYERS: tuple[str, ...] = ("attention", "mlp")
WEIGHTS: tuple[str, ...] = (*PROJECTIONS, *SUBLAYERS)
"""What a per-projection sparsity may name where every weight has one of its own."""


@dataclass(frozen=True)
class Choice:
    """The sparsity asked for, resolved to rows."""

    rows: F  # of every row of the workload, in [0, 1); 0 outside the layers and where a projection is not named
    asked: float  # the scalar, or the mean of a choice: over layers, or over the parameters of the projections
    form: str = "scalar"  # how it was given: scalar, projection or layer


@dataclass(frozen=True)
class Family:
    """A way to prune a decoder.

    ``function`` is called as ``(workload, choice, *, ideal, **options)`` and returns the pruned workload and the
    sparsity it realised.
    """

    name: str
    axis: str  # logical GEMM dimension it changes
    dynamic: bool  # decided per token at inference
    summary: str
    cost: str  # beside what it saves
    function: Callable[..., tuple[Workload, float]] = field(repr=False)
    order: int  # place in tables
    realised: str  # definition of its realised sparsity
    options: Mapping[str, Any] = field(default_factory=dict)  # with their defaults
    support: tuple[str, ...] = ("prefill", "decode", "generate")  # phases in which it can save time; allowed in all
    targets: tuple[str, ...] = ()  # names a per-projection sparsity may use
    per_layer: bool = True  # whether a per-layer sparsity means something
    # requests (batch, length) of one model whose rows a call may prune together: "any" where the function never looks
    # at the prompt's length, "equal length" where it takes it from the workload, else "one"
    together: str = "one"


def check_fraction(value: Any, where: str = "sparsity") -> float:
    """A fraction in [0, 1).

    >>> check_fraction(25)
    Traceback (most recent call last):
    simulator.errors.InputError: sparsity 25: expected a fraction in [0, 1), such as 0.25; for 25 % write 0.25
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(f"{where}: expected a fraction in [0, 1), such as 0.25, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and 0.0 <= number < 1.0):
        hint = f"; for {number:g} % write {number / 100:g}" if 1.0 < number < 100.0 else ""
        raise InputError(f"{where} {number:g}: expected a fraction in [0, 1), such as 0.25{hint}")
    return number


def whole(name: str, value: Any, low: int = 1) -> int:
    """An option that is a whole number from ``low`` up."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise InputError(f"option {name}: expected a whole number from {low} up, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """An option that is true or false."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"option {name}: expected true or false, got {value!r}")
    return bool(value)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """An option that is one of a few values."""
    if isinstance(value, bool) or value not in choices:
        raise InputError(f"option {name}: expected {' or '.join(map(str, choices))}, got {value!r}")
    return value
