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
from simulator.arrays import FloatArray, IndexArray
from simulator.display import Displayed
from simulator.errors import InputError, unknown
from simulator.pruning import FAMILIES, FamilyStep, Pruner, Target
from simulator.pruning._family import SUFFIXES, Choice, Family, check_fraction
from simulator.pruning._titles import TITLES
from simulator.pruning.described.description import ByLayer, Description, PruneStep
from simulator.pruning.described.expressions import Expression
from simulator.pruning.described.rows import family_of
from simulator.pruning.described.sizes import model_sizes
from simulator.request import Lowered
from simulator.workload import Workload

_FOLDER = Path(__file__).parent / "methods"

Change = Callable[[Workload, float], Workload]


@dataclass(frozen=True, repr=False)
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
        steps = self.description.prune
        return {name: value for step in steps for name, value in step.options.items()}

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
                per_layer = self.description.per_layer
                own = sparsity if per_layer is None else tuple(_by_layer(per_layer, target, s))
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
    per_layer, layers = step.per_layer or about.per_layer, step.layers or about.layers
    own = s if per_layer is None else _by_layer(per_layer, target, s)
    numbers = None if layers is None else layers.numbers(target.layers)

    def value(removed: Expression) -> Any:
        return _removed(removed, target, {**sizes, "s": own}, numbers)

    sparsity: Any = step.sparsity
    if isinstance(sparsity, Mapping):
        sparsity = {part: value(removed) for part, removed in sparsity.items()}
    elif sparsity is not None:
        sparsity = value(sparsity)
    of_parts = sparsity.values() if isinstance(sparsity, dict) else [sparsity]
    by_layer = any(np.ndim(one) for one in of_parts)
    return FamilyStep.of(step.family, sparsity, None if by_layer else numbers, step.options)


def _removed(
    expression: Expression,
    target: Target,
    sizes: Mapping[str, Any],
    layers: tuple[int, ...] | None,
) -> Any:
    """Return a fraction, one per layer (0 outside ``layers``), or a size that remains."""
    value = expression.value({**sizes, **_sizes(expression, target, sizes)})
    if not np.ndim(value):
        return int(value) if is_size(value) else check_fraction(value, expression.text)
    if layers is not None:
        value = np.where(np.isin(np.arange(target.layers), layers), value, 0.0)
    return tuple(np.asarray(value).tolist())


def _sizes(expression: Expression, target: Target, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a model that an expression names besides ``known``."""
    wanted = expression.names - known.keys()
    found = {} if target.model is None else model_sizes(target.model, wanted)
    if missing := wanted - found.keys():
        raise InputError(
            f"{expression.text!r}: expected no {min(missing)}, as a step of a family prunes before"
            " a pass has it"
        )
    return found


def _by_layer(per_layer: ByLayer, target: Target, s: float) -> FloatArray:
    """Return the value of ``s`` in each layer (L,)."""
    layers, values = target.layers, per_layer.values
    if per_layer.geometric:
        return _decay((per_layer.runs or layers) * np.arange(layers) // layers, s)
    if len(values) not in (1, layers):
        raise InputError(f"per_layer: expected {layers} values, got {len(values)}")
    known = {"s": s, "layer": np.arange(layers, dtype=np.float64)}
    each = [np.broadcast_to(v.value(known | _sizes(v, target, known)), layers) for v in values]
    table = np.diagonal(each) if len(values) > 1 else each[0]
    return np.array([check_fraction(one, f"s of layer {i}:") for i, one in enumerate(table)])


def _decay(run: IndexArray, s: float) -> FloatArray:
    """Return sparsities per layer with the mean ``s``: a layer keeps a share r^run of its
    tokens."""
    most = float(np.mean(run > 0))
    if s >= most:
        raise InputError(f"expected less than {most:.3g}, as the first layers keep all")
    low, high = 0.0, 1.0
    for _ in range(60):  # the mean grows with r
        r = (low + high) / 2.0
        low, high = (r, high) if np.mean(r**run) < 1.0 - s else (low, r)
    return np.asarray(1.0 - r**run)


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
