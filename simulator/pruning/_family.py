"""Define a pruning family, the sparsity of each row, and checks of options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import PHASES
from simulator.display import Displayed
from simulator.errors import InputError
from simulator.workload import Workload

QKV: tuple[str, ...] = ("q", "k", "v", "qkv")
# names of several projections in a sparsity per projection
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": (*QKV, "o"),
    "mlp": ("gate", "up", "gate_up", "down"),
    "qkv": QKV,
}
SUBLAYERS: tuple[str, ...] = ("attention", "mlp")
# parts of width that remove a share of the rest of other parts
NESTED: tuple[str, ...] = ("heads", "kv", "hidden")
ONE_SIZE: tuple[str, ...] = ("hidden",)  # parts that have one size in all layers
PROJECTIONS: tuple[str, ...] = (*GROUPS["attention"], *GROUPS["mlp"])
# weights of latent attention, experts and delta nets, which only families that remove heads,
# channels or more prune
LATENT: tuple[str, ...] = ("q_a", "kv_a", "qkv_a", "q_b", "kv_b", "absorb_k", "absorb_v")
WHOLE: tuple[str, ...] = (*LATENT, "experts", "delta_in", "delta_ba")
WEIGHTS: tuple[str, ...] = (*PROJECTIONS, *SUBLAYERS)  # parts of families that prune single weights

SCORE_BYTES = 4.0  # bytes of a score or an index: fp32 or int32
Pruned = tuple[Workload, float]  # the pruned workload, and its realised sparsity


@dataclass(frozen=True)
class Choice:
    # sparsity of every row, in [0, 1); 0 outside the layers and for parts that are not named
    rows: Array
    # the fraction, or the mean of several over the layers or over the weights in the layers
    asked: float
    # form of the argument: scalar, part, layer, or budget (``rows`` are 0: the family computes
    # them)
    form: str = "scalar"
    # sparsity of every row by the name of the part
    parts: Mapping[str, Array] = field(default_factory=dict)
    layers: Array | None = None  # layers from which a family selects whole layers; None: all

    def of(self, part: str) -> Array:
        """Return the sparsity of every row for a part; without parts it applies to attention and
        MLP."""
        if self.form == "part" or part not in SUBLAYERS:
            return self.parts.get(part, np.zeros(len(self.rows)))
        return self.rows


@dataclass(frozen=True, kw_only=True, repr=False)
class Family(Displayed):
    """A way to prune a decoder: ``function(workload, choice, *, ideal, **options)`` defines its
    name and options."""

    name: str = field(init=False)
    axis: str  # logical GEMM dimension that it changes
    # an engine needs a "config" (config.json states the shapes), a "checkpoint" (tensors of other
    # forms), or "kernels" (the pruning happens at inference: a dynamic family)
    loading: str
    # part of a request ("": a fraction without parts) -> sizes that lose the requested share; None:
    # sizes depend on the tokens of a request
    parts: Mapping[str, tuple[str, ...]] | None
    summary: str
    function: Callable[..., Pruned] = field(repr=False)
    order: int  # place in tables
    options: Mapping[str, Any] = field(init=False)  # option -> default
    support: tuple[str, ...] = PHASES  # phases in which it can save time; all phases are allowed
    targets: tuple[str, ...] = ()  # names of parts in a sparsity per part
    whole: bool = True  # whether it also prunes weights of WHOLE
    needs: str = ""  # field of the configuration that a model must have
    # "each": layers can have different sparsities; "some": the family removes whole layers, from a
    # list if one is given; "all": all layers are pruned equally
    layers: str = "each"
    narrows: bool = False  # whether it makes kernels smaller without removing one
    default: float | None = None  # sparsity if none is given
    # requests of one model that one call can prune together: "any", or "equal length" if the
    # function reads the prompt length from the workload
    together: str = "any"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.function.__name__)
        object.__setattr__(self, "options", dict(self.function.__kwdefaults__ or {}))

    @property
    def dynamic(self) -> bool:
        """Whether the family decides per token at inference."""
        return self.loading == "kernels"

    def sizes(self, part: str) -> tuple[str, ...]:
        """Return the sizes that a whole number of a part can mean; () if only a fraction has a
        meaning."""
        names = (self.parts or {}).get(part, ())
        return names if part or len(names) == 1 else ()

    def _title(self) -> str:
        return f"{self.name}: {self.summary}"


def check_fraction(value: Any, where: str = "sparsity", other: str = "") -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise InputError(f"{where}: expected a fraction in [0, 1), such as 0.25, got {value!r}")
    number = math.inf if abs(value) >= 1e300 else float(value)
    if not (math.isfinite(number) and 0.0 <= number < 1.0):
        hint = f"; for {number:g} % write {number / 100:g}" if 2.0 <= number < 100.0 else ""
        raise InputError(
            f"{where} {number:g}: expected a fraction in [0, 1), such as 0.25{other}{hint}"
        )
    return number


def whole(name: str, value: Any, low: int = 1) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or not low <= value < 2**31
    ):
        raise InputError(f"option {name}: expected a whole number from {low} up, got {value!r}")
    return int(value)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if not isinstance(value, str | int) or isinstance(value, bool) or value not in choices:
        raise InputError(f"option {name}: expected {' or '.join(map(str, choices))}, got {value!r}")
    return value
