"""Pruning methods: published ones by name (:data:`METHODS`), those that a file describes, and
functions.

A published method is a file of the folder ``methods``. A description states how a method changes
shapes, not how it selects weights. Widths and ranks are rounded as in the family; the code of a
method can leave odd widths, which are slower (``align=1`` of the family).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from simulator.arguments import is_size, shown
from simulator.arrays import FloatArray
from simulator.display import Displayed
from simulator.errors import InputError, unknown
from simulator.pruning import FAMILIES, FamilyStep, Pruner, Target
from simulator.pruning._family import SUFFIXES, Choice, Family, check_fraction
from simulator.pruning._titles import TITLES
from simulator.pruning.described.description import ByLayer, Description, LayerRange, PruneStep
from simulator.pruning.described.expressions import Expression
from simulator.pruning.described.rows import family_of
from simulator.pruning.described.sizes import model_sizes
from simulator.request import Lowered
from simulator.workload import Workload

_FOLDER = Path(__file__).parent / "methods"

Change = Callable[[Workload, float], Workload]


@dataclass(frozen=True, repr=False, eq=False)
class Method(Displayed):
    """A pruning method: published, described in a file, or a function.

    Parameters
    ----------
    description : Description
        What the method prunes, changes per token and adds; see :meth:`of` and :meth:`read`.
    function : callable, optional
        Function from a workload and a sparsity in [0, 1) to the pruned workload, in place of a
        description; see :meth:`of_function`.

    Examples
    --------
    >>> import simulator
    >>> method = simulator.Method.of({
    ...     "method": "half-keys",
    ...     "dynamic": {"attention": {"keys": "1 - s", "block": 64}},
    ... })
    >>> w = simulator.lower("llama-3.1-8b", phase="prefill", seq=4096)
    >>> bool(method.prune(w, 0.5).flops.sum() < w.flops.sum())
    True
    """

    description: Description
    function: Change | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Method:
        """Return the method of a mapping, whose ``content`` has the keys of a method file."""
        return cls(Description.of(content))

    @classmethod
    def read(cls, path: str | Path) -> Method:
        """Return the method of the YAML or JSON file at ``path``."""
        return cls(Description.read(Path(path)))

    @classmethod
    def of_function(cls, name: str, function: Change) -> Method:
        """Return the method ``name`` that ``function`` of a workload and a sparsity computes."""
        return cls(Description.named(name), function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and (self.description, self.function) == (
            other.description,
            other.function,
        )

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def name(self) -> str:
        """Name, as ``--method`` states it."""
        return self.description.name

    @property
    def what(self) -> str:
        """Removed parts, and their layers."""
        return self.description.what

    @property
    def arxiv(self) -> str:
        """Number of the paper."""
        return self.description.arxiv

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Sparsities in the paper, as the family defines them; none if the method sets its own."""
        return self.description.sparsities

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases that it prunes."""
        return self.description.phases

    def _title(self) -> str:
        return f"{self.name} ({self.family}): {self.what}"

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """Families in their order; what no family does is one of the method's name."""
        found = [FAMILIES[step.family] for step in self.description.prune]
        if self.function is not None:
            found.append(_family_of_function(self.name, self.function))
        elif self.description.dynamic or self.description.adds:
            found.append(family_of(self.description))
        return tuple(found)

    @property
    def family(self) -> str:
        """Names of its families, joined by "+"."""
        return "+".join(dict.fromkeys(family.name for family in self.families))

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of its families."""
        return {
            name: _plain(value)
            for step in self.description.prune
            for name, value in step.options.items()
        }

    @property
    def budget(self) -> int | None:
        """Tokens that a family keeps, from which its sparsity follows; None: none."""
        return self.options.get("budget")

    @property
    def takes_sparsity(self) -> bool:
        """Whether an expression of the method names ``s``."""
        return self.function is not None or self.description.needs_sparsity

    def prune(
        self, workload: Workload, sparsity: float | None = None, *, ideal: bool = False
    ) -> Workload:
        """Return the pruned ``workload``. ``sparsity`` is None for a method that states what stays;
        ``ideal`` omits the work that it adds."""
        pruner = Pruner(workload, ideal)
        for step in self.steps(pruner.target, sparsity, workload.meta):
            pruner.add(step)
        return pruner.workload()

    def steps(
        self, target: Target, sparsity: float | None, meta: Lowered | None = None
    ) -> Iterator[FamilyStep]:
        """Yield the steps of families that prune a model, the ``target``, at a ``sparsity``;
        ``meta`` has the sizes of the request."""
        if meta is not None and meta.phase not in self.phases:
            raise InputError(
                f"{self.name}: expected --phase {' or '.join(self.phases)}, got {meta.phase}"
            )
        s = self._checked(sparsity)
        sizes = {} if meta is None else {"batch": float(meta.batch), "seq": float(meta.seq)}
        try:
            for step in self.description.prune:
                yield _family_step(step, self.description, target, s, sizes)
            for family in self.families[len(self.description.prune) :]:
                by_layer = self.description.by_layer
                table = None if by_layer is None else _by_layer(by_layer, target, s)
                own = sparsity if table is None else tuple(table.tolist())
                yield FamilyStep(family, own)
        except InputError as error:
            at = "" if sparsity is None else f" at sparsity {sparsity:g}"
            raise InputError(f"{self.name}{at}: {error}") from None

    def _checked(self, sparsity: float | None) -> float:
        if self.takes_sparsity:
            return check_fraction(sparsity)
        if sparsity is not None:
            reason = "as no expression of the method names s"
            if self.budget is not None:
                reason = f"as it keeps {self.budget:,} tokens"
            raise InputError(f"{self.name}: expected no sparsity, {reason}; got {sparsity!r}")
        return 0.0


def _family_step(
    step: PruneStep,
    about: Description,
    target: Target,
    s: float,
    sizes: Mapping[str, float],
) -> FamilyStep:
    by_layer = step.by_layer or about.by_layer
    table = s if by_layer is None else _by_layer(by_layer, target, s)
    layers = step.layers or about.layers
    values = _Values(target, {**sizes, "s": table}, layers)
    sparsity: Any = None
    if isinstance(step.sparsity, Expression):
        sparsity = values.of(step.sparsity)
    elif step.sparsity is not None:
        sparsity = {part: values.of(one) for part, one in step.sparsity.items()}
    options = {name: values.option(name, one) for name, one in step.options.items()}
    listed = None
    if layers is not None and not values.by_layer:
        listed = layers.numbers(target.layers)
    return FamilyStep.of(step.family, sparsity, listed, options)


class _Values:
    """Values of expressions in the step of a family."""

    def __init__(self, target: Target, sizes: Mapping[str, Any], layers: LayerRange | None) -> None:
        self.target, self.sizes, self.layers = target, sizes, layers
        self.by_layer = False  # whether a value differs between layers

    def of(self, expression: Expression) -> Any:
        """Return a fraction, one per layer, or a size that remains."""
        value = expression.value(self._sizes(expression))
        if not np.ndim(value):
            return int(value) if is_size(value) else check_fraction(value, expression.text)
        self.by_layer = True
        if self.layers is not None:
            listed = np.isin(np.arange(self.target.layers), self.layers.numbers(self.target.layers))
            value = np.where(listed, value, 0.0)
        return tuple(np.asarray(value).tolist())

    def option(self, name: str, value: Any) -> Any:
        """Return the value of an option: whole numbers are rounded up."""
        if not isinstance(value, Expression):
            return value
        found = value.value(self._sizes(value))
        if np.ndim(found):
            raise InputError(f"option {name}: expected one value for all layers")
        return int(np.ceil(float(found) - 1e-9))

    def _sizes(self, expression: Expression) -> dict[str, Any]:
        wanted = expression.names - self.sizes.keys()
        found = dict(self.sizes)
        if self.target.model is not None:
            found |= model_sizes(self.target.model, wanted)
        if missing := expression.names - found.keys():
            raise InputError(
                f"{expression.text!r}: expected no {min(missing)}, as a step of a family prunes"
                " before a pass has it"
            )
        return found


def _by_layer(by_layer: ByLayer, target: Target, s: float) -> FloatArray:
    """Return the value of ``s`` in each layer (L,)."""
    layers, values = target.layers, by_layer.values
    count = by_layer.stages or layers
    stage = count * np.arange(layers) // layers
    if by_layer.geometric:
        return _decay(stage, s)
    sizes: dict[str, Any] = {"s": s, "layer": np.arange(layers, dtype=np.float64)}
    names = {name for value in values for name in value.names} - sizes.keys()
    if target.model is not None:
        sizes |= model_sizes(target.model, names)
    if len(values) not in (1, count):
        raise InputError(f"per_layer: expected {layers} values, got {len(values)}")
    each = [np.broadcast_to(np.asarray(value.value(sizes), float), layers) for value in values]
    table: FloatArray = np.stack(each)[stage if len(values) > 1 else 0 * stage, np.arange(layers)]
    return np.array([check_fraction(one, f"s of layer {i}:") for i, one in enumerate(table)])


def _decay(stage: Any, s: float) -> FloatArray:
    """Return sparsities per layer with the mean ``s``: a layer keeps a share r^stage of its
    tokens."""
    most = float(np.mean(stage > 0))
    if s >= most:
        raise InputError(f"expected less than {most:.3g}, as the first stage keeps all")
    low, high = 0.0, 1.0
    for _ in range(60):  # the mean grows with r
        r = (low + high) / 2.0
        low, high = (r, high) if np.mean(r**stage) < 1.0 - s else (low, r)
    return np.asarray(1.0 - r**stage)


def _plain(value: Any) -> Any:
    """Return the number of an expression without names, or its text."""
    if not isinstance(value, Expression):
        return value
    if value.names:
        return value.text
    number = float(np.asarray(value.value({})))
    return int(number) if number.is_integer() else number


@dataclass(frozen=True)
class _OfFunction:
    """The function of the family of a user's function."""

    name: str
    function: Change
    __kwdefaults__ = None

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, w: Workload, choice: Choice, *, ideal: bool) -> tuple[Workload, float]:
        pruned = self.function(w, choice.asked)
        if not isinstance(pruned, Workload):
            raise InputError(f"expected a workload from the function, got {type(pruned).__name__}")
        if ideal:
            pruned = pruned.take(~pruned.overhead)
        return pruned, choice.asked


def _family_of_function(name: str, function: Change) -> Family:
    return Family(
        function=_OfFunction(name, function),
        axis="described",
        loading="kernels",
        parts=None,
        order=20,
        together="one",
        layers="all",
        summary="a function of the user",
    )


def load_method(name: str | Method) -> Method:
    """Return a published method by name, the method of a file, or a method as it is."""
    if isinstance(name, Method):
        return name
    if not isinstance(name, str):
        expected = "expected a text or a simulator.Method, such as Method.of(mapping)"
        raise InputError(f"prune or method: {expected}, got {shown(name)}")
    if name.endswith(SUFFIXES):
        return Method.read(name)
    if name not in METHODS:
        raise unknown("pruning method", name, METHODS)
    return METHODS[name]


class _Published(Mapping[str, Method]):
    """The methods of the folder; each file is read when its method is used."""

    def __getitem__(self, name: str) -> Method:
        if name not in TITLES:
            raise KeyError(name)
        return _read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(TITLES)

    def __len__(self) -> int:
        return len(TITLES)


@cache
def _read(name: str) -> Method:
    return Method.read(method_file(name))


def method_file(name: str) -> Path:
    """Return the file of a published method."""
    return _FOLDER / f"{name.replace(':', '-')}.yaml"


METHODS: Mapping[str, Method] = _Published()
