"""Read prunings as steps, from a text or a plan: :func:`read_steps`; apply them to a workload:
:func:`prune_steps`.

In every step, layers have their numbers in the dense model: steps that remove layers are applied
last.

A text has steps joined by ``+``. A step is the name of a family or of a published method, then a
fraction (``0.25``, ``25%``) or fractions by part (``mlp=0.3``), then ``layers=4-29`` and options
(``align=64``), in any order. A whole number above 1 is the size that remains (``depth 24``,
``mlp=9216``). ``FILE 0.5`` or ``FILE s=0.5`` is a method that a file describes
(:mod:`simulator.pruning.described`). A plan is a YAML or JSON file::

    prune: depth 0.1                        # optional: steps of the whole model
    layers:                                 # layers of the dense model, from 0
      4-11: width mlp=0.3 attention=0.25
      12,14: width mlp=0.5
      20-23: depth                          # removes these layers
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from simulator.arrays import FloatArray
from simulator.display import consecutive
from simulator.errors import InputError, one_line, unknown
from simulator.files.yaml import Node, Problems, first_of, parse_yaml, path_of, read_text
from simulator.models.model import Model
from simulator.pruning import FAMILIES, Family, FamilyStep, Pruner, Target, listed_layers
from simulator.pruning._family import SUBLAYERS, SUFFIXES, check_fraction, one_of
from simulator.units import parse_fraction, parse_value
from simulator.workload import Workload

if TYPE_CHECKING:
    from simulator.pruning._methods import Method
    from simulator.request import Lowered

T = TypeVar("T")
# a fraction, one fraction per layer, or one of these per part
Sparsity = float | tuple[float, ...] | tuple[tuple[str, float | tuple[float, ...]], ...] | None


@dataclass(frozen=True)
class PruningStep:
    """One step of a pruning: a family or a published method, how much it removes, and where."""

    name: str
    sparsity: Sparsity = None  # None: the default of the family, or whole listed layers
    layers: tuple[int, ...] | None = None  # None: all
    options: tuple[tuple[str, Any], ...] = ()
    described: Method | None = None  # a method that is not published; its name can be a file

    def __str__(self) -> str:
        return self._text(self.name)

    @property
    def title(self) -> str:
        """The step with the name of a described method in place of its file."""
        return self._text(self.described.name if self.described else self.name)

    def _text(self, name: str) -> str:
        parts, sparsity = [name], _argument(self.sparsity)
        if isinstance(sparsity, dict):
            parts += [f"{part}={_sparsity_text(value)}" for part, value in sparsity.items()]
        elif sparsity is not None:
            parts.append(_sparsity_text(sparsity))
        if self.layers is not None:
            parts.append(f"layers={','.join(consecutive(self.layers))}")
        parts += [
            f"{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in self.options
        ]
        return " ".join(parts)

    @cached_property
    def method(self) -> Method | None:
        """The method of the step; None for a family."""
        return self.described or _published(self.name)

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """Families of the step: one, those of a method, or none if the name is unknown."""
        if self.method is not None:
            return self.method.families
        return (FAMILIES[self.name],) if self.name in FAMILIES else ()

    @property
    def sets_sparsity(self) -> bool:
        """Whether the step takes no sparsity: it keeps a number of tokens, or a method states what
        stays."""
        if self.method is not None:
            return not self.method.takes_sparsity
        own = any(family.sets_sparsity for family in self.families)
        return own or dict(self.options).get("budget") is not None

    @property
    def removes_layers(self) -> bool:
        return any(family.layers == "some" for family in self.families)

    @property
    def argument(self) -> Any:
        sparsity = _argument(self.sparsity)
        if sparsity is None and self.layers is None and not self.sets_sparsity:
            sparsity = self.families[0].default
            if sparsity is None:
                raise InputError(f"{self.name}: expected a fraction such as {self.name} 0.25")
        return sparsity

    def by_family(self, target: Target, meta: Lowered | None = None) -> Iterator[FamilyStep]:
        """Yield the steps of the families; ``meta`` has the sizes of a request."""
        if self.method is None:
            yield self.of_family
        else:
            yield from self.method.steps(target, _argument(self.sparsity), meta)

    @property
    def of_family(self) -> FamilyStep:
        return FamilyStep.of(self.name, self.argument, self.layers, dict(self.options))


def _published(name: str) -> Method | None:
    """Return a published method; their table is imported only for a name that is not a family."""
    if name in FAMILIES:
        return None
    from simulator.pruning._methods import METHODS

    return METHODS.get(name)


def _argument(sparsity: Sparsity) -> Any:
    found: Any = sparsity
    return dict(found) if isinstance(found, tuple) and isinstance(found[0], tuple) else found


def _sparsity_text(sparsity: float | tuple[float, ...]) -> str:
    return "by layer" if isinstance(sparsity, tuple) else f"{sparsity:.9g}"


def prune_steps(
    workload: Workload,
    steps: Sequence[PruningStep],
    *,
    ideal: bool = False,
    plan: str = "",
    named: bool = True,
    lowered: Callable[[Model], Workload] | None = None,
) -> Workload:
    """Return the workload pruned by steps. Errors name the step if ``named``, and the plan that
    contains the steps. ``lowered`` makes the workload of a pruned model."""
    pruner = Pruner(workload, ideal, lowered)
    place = ""
    try:
        for step in in_order(steps, pruner.target.layers):
            place = str(step) if named else ""
            for one in step.by_family(pruner.target, workload.meta):
                pruner.add(one, place)
        place = ""
        return pruner.workload()
    except InputError as error:
        raise InputError(": ".join(filter(None, (plan, place, str(error))))) from None


def in_order(steps: Sequence[PruningStep], layers: int) -> Iterator[PruningStep]:
    """Yield the steps in the order in which they prune a model of ``layers``: those that remove
    layers are last."""
    keeping = [step for step in steps if not step.removes_layers]
    listed = [step for step in steps if step.removes_layers and step.layers is not None]
    rest = [step for step in steps if step.removes_layers and step.layers is None]
    yield from (*_joined(keeping, layers), *_renumbered(listed), *rest)


def _joined(steps: Sequence[PruningStep], layers: int) -> Iterator[PruningStep]:
    """Yield steps; steps of one family at different layers become one step with a sparsity per
    layer."""
    groups: list[list[PruningStep]] = []
    for step in steps:
        for group in groups:
            first, taken = group[0], {layer for s in group for layer in s.layers or ()}
            equal = (step.name, step.options) == (first.name, first.options)
            if equal and step.layers and first.layers and taken.isdisjoint(step.layers):
                group.append(step)
                break
        else:
            groups.append([step])
    for group in groups:
        yield group[0] if len(group) == 1 else _by_layer(group, layers)


def _by_layer(steps: Sequence[PruningStep], layers: int) -> PruningStep:
    first, family = steps[0], steps[0].families[0]
    tables: dict[str, FloatArray] = {}
    named = any(isinstance(_argument(step.sparsity), dict) for step in steps)
    for step in steps:
        found = _argument(family.default if step.sparsity is None else step.sparsity)
        if found is None:
            raise InputError(f"{step}: expected a fraction")
        whole = dict.fromkeys(SUBLAYERS if named else ("",), found)
        for part, fraction in (found if isinstance(found, dict) else whole).items():
            table = tables.setdefault(part, np.zeros(layers))
            table[listed_layers(step.layers, layers)] = fraction
    each = tuple((part, tuple(table.tolist())) for part, table in tables.items())
    return PruningStep(first.name, each if named else each[0][1], options=first.options)


def _renumbered(steps: Sequence[PruningStep]) -> Iterator[PruningStep]:
    """Yield steps that remove listed layers; after a step, layers have new numbers."""
    if len(steps) < 2:
        yield from steps
        return
    gone: dict[str, set[int]] = {part: set() for part in SUBLAYERS}
    for step in steps:
        unit = dict(step.options).get("unit", "layer")
        one_of("unit", unit, ("layer", "both", *SUBLAYERS))
        if step.sparsity is not None:
            raise InputError(f"{step}: expected no fraction, as several steps remove listed layers")
        for part in SUBLAYERS if unit in ("layer", "both") else (unit,):
            gone[part] |= set(step.layers or ())
    whole = sorted(set.intersection(*gone.values()))
    if whole:
        yield PruningStep("depth", layers=tuple(whole))
    for part, layers in gone.items():
        if left := sorted(layers.difference(whole)):
            now = tuple(layer - int(np.searchsorted(whole, layer)) for layer in left)
            yield PruningStep("depth", layers=now, options=(("unit", part),))


MOST_CHARACTERS = 2000
MOST_LAYERS = 10_000  # largest accepted layer number; models have fewer layers
_RANGE = re.compile(r"(0|[1-9]\d{0,4})(?:-(0|[1-9]\d{0,4}))?", re.ASCII)

_TOKEN = re.compile(
    r"(?P<name>[^\s+=%]+)\s*=\s*(?P<value>[^\s+=%]+(?:\s*%)?)|(?P<word>[^\s+=%]+(?:\s*%)?)|(?P<plus>\+)|(?P<wrong>[=%])"
)


def read_steps(text: str | Method) -> tuple[PruningStep, ...]:
    """Return the steps of a text, of the plan at a path, or of a method; errors have the column,
    or line and column, of a mistake."""
    if not isinstance(text, str):
        from simulator.pruning._methods import load_method

        method = load_method(text)
        return (_complete(PruningStep(method.name, described=method), 1, 1),)
    if is_plan(text):
        path = text.strip()
        if is_method(path):
            return (_complete(_step_of_file(path), 1, len(path) + 1),)
        problems = Problems(path)
        return plan_steps(read_text(Path(path), problems), problems)
    try:
        return _steps(text)
    except _MisplacedError as wrong:
        place = f", column {wrong.column}" if text.strip() else ""
        raise InputError(f"pruning {one_line(text, 120)!r}{place}: {wrong}") from None


def is_plan(text: str | Method) -> bool:
    """Return whether a text is the path of a plan or of a method."""
    return isinstance(text, str) and text.strip().endswith(SUFFIXES) and " + " not in text


def is_method(path: str) -> bool:
    """Return whether a file describes a method: it has the key ``method``."""
    problems = Problems(path)
    text = read_text(Path(path), problems)
    root = None if text is None else parse_yaml(text, problems)
    return root is not None and "method" in root.entries


def _step_of_file(path: str) -> PruningStep:
    from simulator.pruning._methods import Method

    return PruningStep(path, described=Method.read(path))


class _MisplacedError(InputError):
    """A mistake at a column of a text, from 1."""

    def __init__(self, column: int, message: str) -> None:
        super().__init__(message)
        self.column = column


def _placed(column: int, read: Callable[..., T], *texts: str) -> T:
    """Return what a function reads of a text; its error gets the column of the text."""
    try:
        return read(*texts)
    except InputError as error:
        raise _MisplacedError(column, str(error)) from None


def _steps(text: str, layers: tuple[int, ...] | None = None) -> tuple[PruningStep, ...]:
    """Return the steps of a text; in a plan, ``layers`` are the layers of its entry."""
    if len(text) > MOST_CHARACTERS:
        raise _MisplacedError(
            MOST_CHARACTERS, f"expected at most {MOST_CHARACTERS} characters, got {len(text)}"
        )
    steps: list[list[re.Match[str]]] = [[]]
    for token in _TOKEN.finditer(text):
        if token["wrong"]:
            raise _MisplacedError(
                token.start() + 1, f"expected NAME=VALUE or a fraction, got {token['wrong']!r}"
            )
        if token["plus"]:
            if not steps[-1]:
                raise _MisplacedError(token.start() + 1, "expected a family or method before +")
            steps.append([])
        else:
            steps[-1].append(token)
    if not steps[-1]:
        raise _MisplacedError(len(text) + 1, "expected a family or method, such as depth 0.25")
    return tuple(_step(tokens, layers) for tokens in steps)


def _step(tokens: Sequence[re.Match[str]], listed: tuple[int, ...] | None) -> PruningStep:
    first, at = tokens[0], tokens[0].start() + 1
    name = first["word"] or first["name"]
    name = FAMILIES[name].name if name in FAMILIES else name
    described = None
    if name.endswith(SUFFIXES):
        if Path(name).is_file() and not is_method(name):
            raise _MisplacedError(at, f"{name} is a plan; expected a plan alone, without + or s")
        described = _step_of_file(name).described
    method = described or _published(name)
    if name not in FAMILIES and method is None:
        from simulator.pruning._methods import METHODS

        if name in FAMILIES["width"].targets:
            text = " ".join(token[0] for token in tokens) if first["name"] else f"{name}=0.25"
            raise _MisplacedError(
                at, f"expected a family before the part {name}, such as width {text}"
            )
        raise _MisplacedError(
            at, str(unknown("family or method", name, [*FAMILIES, *METHODS], FAMILIES))
        )
    if not first["word"]:
        raise _MisplacedError(
            at, f"expected a fraction or a part after {name}, such as {name} 0.25"
        )
    if method and listed is not None:
        raise _MisplacedError(
            at,
            f"method {name} selects its own layers; expected a family, or the method under prune",
        )
    targets = () if method else FAMILIES[name].targets
    known = ("s",) if described else () if method else ("layers", *targets, *FAMILIES[name].options)
    parts: dict[str, float] = {}
    options: dict[str, Any] = {}
    sparsity, layers = None, listed
    for token in tokens[1:]:
        at, key, value = token.start() + 1, token["name"], token["value"]
        if token["word"]:
            if sparsity is not None:
                raise _MisplacedError(
                    at, f"expected NAME=VALUE or + after the fraction, got {token['word']!r}"
                )
            sparsity = _removed(token["word"], at, None if method else FAMILIES[name])
        elif not known:
            raise _MisplacedError(
                at, f"method {name} sets its own parts and options; expected a fraction only"
            )
        elif key not in known:
            raise _MisplacedError(at, str(unknown(f"part or option of {name}", key, known)))
        elif key == "layers" and listed is not None:
            raise _MisplacedError(at, "expected no layers, as the key of the plan lists them")
        elif key in parts or key in options or (key == "layers" and layers is not None):
            raise _MisplacedError(at, f"{key} is given twice")
        elif key == "s" and described:
            if sparsity is not None:
                raise _MisplacedError(at, "s is given twice")
            sparsity = _removed(value, token.start("value") + 1, None)
        elif key == "layers":
            layers = _placed(token.start("value") + 1, layer_numbers, value)
        elif key in targets:
            parts[key] = _removed(value, token.start("value") + 1, FAMILIES[name], key)
        else:
            options[key] = parse_value(value)
    if parts and sparsity is not None:
        raise _MisplacedError(
            first.start() + 1, f"{name}: expected one fraction or fractions by part, got both"
        )
    found = PruningStep(
        name, tuple(parts.items()) or sparsity, layers, tuple(sorted(options.items())), described
    )
    return _complete(found, first.start() + 1, tokens[-1].end() + 1)


def _complete(step: PruningStep, at: int, end: int) -> PruningStep:
    """Return a step with the usual fraction of its family or method, if the text has none and one
    is needed."""
    name = step.name
    if method := step.method:
        usual = method.sparsities
        if step.sets_sparsity:
            if step.sparsity is not None:
                reason = (
                    "it sets its own" if method.budget is None else "it keeps a number of tokens"
                )
                raise _MisplacedError(at, f"{name}: expected no fraction, as {reason}")
            return step
        if step.sparsity is None and len(usual) != 1:
            papers = " or ".join(f"{name} {s:g}" for s in usual)
            usual_text = f"; the paper of {name} has {papers}" if usual else f", such as {name} 0.5"
            raise _MisplacedError(end, f"expected a fraction{usual_text}")
        return replace(step, sparsity=usual[0]) if step.sparsity is None else step
    family = FAMILIES[name]
    if step.layers is not None and family.layers == "all":
        raise _MisplacedError(
            at, f"family {name}: expected no layers, as it prunes all layers equally"
        )
    if (
        step.sparsity is not None
        or step.sets_sparsity
        or (step.layers is not None and family.layers == "some")
    ):
        return step
    if family.default is None:
        some = f", or parts, such as {name} {family.targets[0]}=0.25" if family.targets else ""
        some += (
            f", or a budget of tokens, such as {name} budget=1024"
            if "budget" in family.options
            else ""
        )
        raise _MisplacedError(end, f"expected a fraction, such as {name} 0.25{some}")
    return replace(step, sparsity=family.default)


def _removed(text: str, column: int, family: Family | None, part: str = "") -> float:
    """Return the fraction that a text removes, or the size that remains of a part."""
    if family and family.sizes(part) and re.fullmatch(r"[0-9]{1,9}", text) and int(text) > 1:
        return int(text)
    return _placed(column, lambda: check_fraction(parse_fraction(text), "fraction"))


def layer_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a text such as ``4-29`` or ``0,5,8-11``, in order. A range has both
    ends, and no number has a leading zero."""
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MOST_LAYERS:
            expected = "expected layer numbers such as 4-29 or 0,5,8-11"
            raise InputError(f"{expected}, got {one_line(text, 120)!r}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def plan_steps(text: str | None, problems: Problems | None = None) -> tuple[PruningStep, ...]:
    """Return the steps of the content of a plan; the InputError is its first problem,
    ``file:line:column: reason``."""
    problems = Problems("plan") if problems is None else problems
    steps: tuple[PruningStep, ...] = ()
    root = None if text is None else parse_yaml(text, problems)
    if root is None or root.kind != "mapping":
        if not len(problems):
            problems.add(root, "file", "expected the keys layers or prune")
        raise InputError(problems.lines[0])
    for key, (key_node, node) in root.entries.items():
        if key == "prune":
            steps += _of_node(node, "prune", problems)
        elif key != "layers":
            problems.add(key_node, key, "is unknown; expected layers or prune")
        elif node.kind != "mapping":
            problems.add(node, "layers", f"expected a mapping from layers to prunings, got {node}")
        else:
            steps += _of_layers(node, problems)
    if not steps and not len(problems):
        problems.add(root, "file", "expected at least one pruning in layers or prune")
    if len(problems):
        raise first_of(problems.lines)
    return steps


def _of_layers(node: Node, problems: Problems) -> tuple[PruningStep, ...]:
    steps: tuple[PruningStep, ...] = ()
    taken: set[int] = set()
    for text, (key_node, value) in node.entries.items():
        key = path_of(("layers", text))
        try:
            layers = layer_numbers(text)
        except InputError as error:
            problems.add(key_node, key, str(error))
            continue
        if again := taken.intersection(layers):
            problems.add(key_node, key, f"layer {min(again)} is listed twice")
            break  # the steps of thousands of ranges that overlap would fill the memory
        taken.update(layers)
        steps += _of_node(value, key, problems, layers)
    return steps


def _of_node(
    node: Node, key: str, problems: Problems, layers: tuple[int, ...] | None = None
) -> tuple[PruningStep, ...]:
    if node.kind != "scalar":
        problems.add(node, key, f"expected a text such as width mlp=0.3, got {node}")
        return ()
    try:
        return _steps(node.text, layers)
    except _MisplacedError as wrong:
        problems.add(
            node._replace(column=node.column + node.quoted + wrong.column - 1), key, str(wrong)
        )
        return ()
