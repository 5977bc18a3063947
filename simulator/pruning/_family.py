"""Define a pruning family, the sparsity of each layer, and checks of options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from simulator.arrays import Array, FloatArray
from simulator.codes import PHASES, Part
from simulator.display import Displayed
from simulator.errors import InputError
from simulator.models.form import ZEROS, Form
from simulator.models.model import Layer, Model
from simulator.models.sublayers import Sublayer
from simulator.workload import Workload

QKV: tuple[str, ...] = ("q", "k", "v", "qkv")
# names of several projections in a sparsity per projection
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": (*QKV, "o"),
    "mlp": ("gate", "up", "gate_up", "down"),
    "qkv": QKV,
    "gate_up": ("gate", "up", "gate_up"),
}
SUBLAYERS: tuple[str, ...] = ("attention", "mlp")
# kinds of sublayers that depth removes
KINDS: tuple[str, ...] = (*SUBLAYERS, "mamba", "conv")
MAMBA: tuple[str, ...] = ("mamba_heads", "mamba_channels", "mamba_state")  # parts of width
# parts of width that remove a share of the rest of other parts -> weights that lose it
NESTED: Mapping[str, tuple[str, ...]] = {
    "heads": ("q", "o", "q_b", "kv_b"),
    "kv": ("k", "v"),
    "hidden": (),
    **dict.fromkeys(MAMBA[:2], ("mamba_in", "mamba_x", "mamba_dt", "o")),
    "mamba_state": ("mamba_in", "mamba_x"),
}
ONE_SIZE: tuple[str, ...] = ("hidden",)  # parts that have one size in all layers
PROJECTIONS: tuple[str, ...] = (*GROUPS["attention"], *GROUPS["mlp"])
# weights of latent attention, experts and recurrences, which only families that remove heads,
# channels or more prune
WHOLE = frozenset(role for kind in Sublayer.__subclasses__() for role in kind.WHOLE)
WEIGHTS: tuple[str, ...] = (*PROJECTIONS, *SUBLAYERS)  # parts of families that prune single weights

SUFFIXES = (".yaml", ".yml", ".json")  # suffixes of plans and methods
SCORE_BYTES = 4.0  # bytes of a score or an index: fp32 or int32


@dataclass(frozen=True)
class Choice:
    """The requested sparsity of every layer, in [0, 1), which the function of a family receives.

    Parameters
    ----------
    fractions : array of float, shape (layers,)
        Sparsity of each layer, if parts of a layer do not differ.
    asked : float
        The fraction, or the mean of several over the layers or over the weights.
    form : str
        Form of the request: scalar, part, layer, or budget (fractions are 0: the family computes
        them).
    parts : mapping of str to array, shape (layers,)
        Sparsity of each layer by the name of the part.
    weights : mapping of tuple to array, shape (layers,)
        Sparsity of each layer by kind of sublayer and role of a weight; without parts all weights
        have the fractions.
    layers : array of int, optional
        Layers from which a family selects whole layers; None: all.
    by_layer : bool
        Whether layers can differ.

    Examples
    --------
    >>> import numpy as np
    >>> import simulator
    >>> choice = simulator.Choice(np.full(16, 0.25), 0.25)
    >>> bool((choice.rows(simulator.lower("llama-3.2-1b")) == 0.25).any())
    True
    """

    fractions: FloatArray
    asked: float
    form: str = "scalar"
    parts: Mapping[str, FloatArray] = field(default_factory=dict)
    weights: Mapping[tuple[str, str], FloatArray] = field(default_factory=dict)
    layers: Array | None = None
    by_layer: bool = False

    def of(self, part: str) -> FloatArray:
        """Return the sparsity of every layer for a part; without parts it applies to attention,
        MLP and heads of Mamba."""
        if self.form == "part" or part not in (*SUBLAYERS, "mamba_heads"):
            return self.parts.get(part, np.zeros(len(self.fractions)))
        return self.fractions

    @property
    def prunes(self) -> bool:
        """Whether anything is removed, or a budget decides."""
        some = self.form == "budget" or self.fractions.any()
        return bool(some or any(part.any() for part in self.parts.values()))

    def rows(self, w: Workload) -> FloatArray:
        """Return the sparsity of every row of a workload ``w``, 0 outside the layers."""
        layer = np.maximum(w.layer, 0)
        tables = {
            Part.ATTENTION: self.of("attention"),
            Part.MLP: self.of("mlp"),
        }
        out = np.zeros(len(w))
        for part, table in tables.items():
            inside = (w.layer >= 0) & (w.part == part)
            out[inside] = table[layer[inside]]
        return out


@dataclass(frozen=True, kw_only=True, repr=False)
class Family(Displayed):
    """A way to prune a decoder.

    The function of a static family maps a model to a model, ``function(model, choice, **options)``;
    that of a dynamic family maps a workload to a workload, ``function(workload, choice, *, ideal,
    **options)``. Both return the realised sparsity too. The function defines name and options.

    Parameters
    ----------
    axis : str
        Logical GEMM dimension that it changes.
    loading : str
        What an engine needs: a "config" (config.json states the shapes), a "checkpoint" (tensors
        of other forms), or "kernels" (the pruning happens at inference: a dynamic family).
    parts : mapping of str to tuple, optional
        Part of a request ("": a fraction without parts) and the sizes that lose the requested
        share; None: sizes depend on the tokens of a request.
    summary : str
        What it removes.
    function : callable
        The function of a model or of a workload.
    order : int
        Place in tables.
    support : tuple of str
        Phases in which it can save time; all phases are allowed.
    targets : tuple of str
        Names of parts in a sparsity per part.
    whole : bool
        Whether it also prunes weights of latent attention, experts and recurrent layers.
    needs : str
        Property of the model that it must have.
    layers : str
        "each": layers can have different sparsities; "some": the family removes whole layers, from
        a list if one is given; "all": all layers are pruned equally.
    narrows : bool
        Whether it makes kernels smaller without removing one.
    default : float, optional
        Sparsity if none is given.
    sets_sparsity : bool
        Whether it takes no sparsity.
    together : str
        Requests of one model that one call can prune together: "any", "equal length" if the
        function reads the prompt length from the workload, or "one".

    Examples
    --------
    >>> import simulator
    >>> simulator.FAMILIES["kv_cache"].options
    {'observed': 32, 'budget': None, 'rolling': False}
    """

    name: str = field(init=False)
    axis: str
    loading: str
    parts: Mapping[str, tuple[str, ...]] | None
    summary: str
    function: Callable[..., tuple[Any, float]] = field(repr=False)
    order: int
    options: Mapping[str, Any] = field(init=False)
    support: tuple[str, ...] = PHASES
    targets: tuple[str, ...] = ()
    whole: bool = True
    needs: str = ""
    layers: str = "each"
    narrows: bool = False
    default: float | None = None
    sets_sparsity: bool = False
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


def rounded(share: float, size: float) -> int:
    """Return ``share`` of ``size``, rounded to the nearest whole number (halves up)."""
    return math.floor(share * size + 0.5)


def changed(model: Model, change: Callable[..., Layer], *tables: FloatArray) -> Model:
    """Return the model with every layer changed by ``change(layer, *values)``, with the values of
    tables (L,). Equal layers with equal values are changed once."""
    known: dict[Any, Layer] = {}
    layers = []
    for layer, *values in zip(model.layers, *(table.tolist() for table in tables)):
        key = (layer, *values)
        if key not in known:
            known[key] = change(layer, *values)
        layers.append(known[key])
    return replace(model, layers=tuple(layers))


def changed_weights(
    model: Model, choice: Choice, change: Callable[[Form, float, int, int], Form]
) -> Model:
    """Return the model with other forms of the projections that a choice names: ``change(form,
    share, outputs, inputs)``."""
    keys = [key for key in choice.weights if choice.weights[key].any()]

    def with_forms(layer: Layer, *shares: float) -> Layer:
        by_key = dict(zip(keys, shares))

        def formed(sublayer: Sublayer) -> Sublayer:
            forms = {}
            for role, (n, k) in sublayer.weights(model.hidden).items():
                share = by_key.get((sublayer.kind, role), 0.0)
                if role in PROJECTIONS and share > 0:
                    forms[role] = change(sublayer.form(role), share, n, k)
            return sublayer.with_forms(forms) if forms else sublayer

        return layer.each(formed)

    return changed(model, with_forms, *(choice.weights[key] for key in keys))


def with_zeros(
    model: Model,
    choice: Choice,
    zeros: str,
    name: str,
    check: Callable[[float], None] = lambda share: None,
) -> Model:
    """Return the model with shares of its projections set to zero."""

    def zeroed(form: Form, share: float, n: int, k: int) -> Form:
        check(share)
        if form.zeros or model.declared == "2:4":
            kind = ZEROS[form.zeros or "2:4"].name.lower()
            raise InputError(
                f"{name}: expected dense projections, got sparse ones ({kind}); set zeros only once"
            )
        return replace(form, zeros=zeros, density=form.density * (1.0 - share))

    return changed_weights(model, choice, zeroed)


def weights_removed(model: Model, pruned: Model) -> float:
    return removed(model.weights, pruned.weights)


def removed(before: float, after: float) -> float:
    return max(0.0, 1.0 - after / before) if before > 0 else 0.0
