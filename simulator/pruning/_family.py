"""What a pruning family is: its description, the sparsity of every row that it is given, and checks of its options.

A family is one file of this package with a constant ``FAMILY``; nothing else lists it. What families do to rows is in
``_edits`` (change), ``_added`` (add) and ``_tokens`` (fewer tokens), how they find them in ``_rows``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.display import Displayed
from simulator.errors import InputError
from simulator.workload import PHASES, Workload

QKV: tuple[str, ...] = ("q", "k", "v", "qkv")
GROUPS: Mapping[str, tuple[str, ...]] = {"attention": (*QKV, "o"), "mlp": ("gate", "up", "gate_up", "down"), "qkv": QKV}
"""Names that stand for several projections in a per-projection sparsity."""
SUBLAYERS: tuple[str, ...] = ("attention", "mlp")
PROJECTIONS: tuple[str, ...] = (*GROUPS["attention"], *GROUPS["mlp"])
WHOLE: tuple[str, ...] = ("q_a", "kv_a", "qkv_a", "q_b", "kv_b", "absorb_k", "absorb_v", "experts")
"""Weights that only families which drop whole parts, heads or channels can prune: of latent attention, of experts."""
WEIGHTS: tuple[str, ...] = (*PROJECTIONS, *SUBLAYERS)
"""What a per-projection sparsity may name where every weight has one of its own."""

SCORE_BYTES = 4.0
"""A score or an index of a selection: fp32 or int32."""

Pruned = tuple[Workload, float]
"""The pruned workload, and the sparsity that it realised."""


@dataclass(frozen=True)
class Choice:
    """The sparsity asked for, resolved to rows."""

    rows: Array  # of every row of the workload, in [0, 1); 0 outside the layers and where a projection is not named
    asked: float  # the scalar, or the mean of a choice: over layers, or over the parameters of the projections
    form: str = "scalar"  # how it was given: scalar, projection or layer


@dataclass(frozen=True, kw_only=True, repr=False)
class Family(Displayed):
    """A way to prune a decoder. ``function(workload, choice, *, ideal, **options)`` gives it its name and options."""

    name: str = field(init=False)
    axis: str  # logical GEMM dimension it changes
    dynamic: bool = False  # decided per token at inference
    summary: str
    cost: str  # beside what it saves
    function: Callable[..., Pruned] = field(repr=False)
    order: int  # place in tables
    realised: str  # definition of its realised sparsity
    options: Mapping[str, Any] = field(init=False)  # with their defaults
    support: tuple[str, ...] = PHASES  # phases in which it can save time; allowed in all
    targets: tuple[str, ...] = ()  # names a per-projection sparsity may use
    whole: bool = True  # takes weights of WHOLE as well; else they must be left out
    needs: str = ""  # what only some models have: a field of their configuration
    per_layer: bool = True  # whether a per-layer sparsity means something
    # requests (batch, length) of one model that a call may prune together: "any", or those of "equal length" where the
    # function takes the prompt's length from the workload
    together: str = "any"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.function.__name__)
        object.__setattr__(self, "options", dict(self.function.__kwdefaults__ or {}))

    def _title(self) -> str:
        return f"{self.name}: {self.summary}"


def check_fraction(value: Any, where: str = "sparsity") -> float:
    """A fraction in [0, 1).

    >>> check_fraction(25)
    Traceback (most recent call last):
    simulator.errors.InputError: sparsity 25: expected a fraction in [0, 1), such as 0.25; for 25 % write 0.25
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(f"{where}: expected a fraction in [0, 1), such as 0.25, got {value!r}")
    number = math.inf if abs(value) >= 1e300 else float(value)
    if not (math.isfinite(number) and 0.0 <= number < 1.0):
        hint = f"; for {number:g} % write {number / 100:g}" if 1.0 < number < 100.0 else ""
        raise InputError(f"{where} {number:g}: expected a fraction in [0, 1), such as 0.25{hint}")
    return number


def whole(name: str, value: Any, low: int = 1) -> int:
    """An option that is a whole number from ``low`` up."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value < 2**31:
        raise InputError(f"option {name}: expected a whole number from {low} up, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """An option that is true or false."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"option {name}: expected true or false, got {value!r}")
    return bool(value)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """An option that is one of a few values."""
    if not isinstance(value, str | int) or isinstance(value, bool) or value not in choices:
        raise InputError(f"option {name}: expected {' or '.join(map(str, choices))}, got {value!r}")
    return value
