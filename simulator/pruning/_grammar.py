"""Read prunings as text: ``width mlp=0.3 heads=0.2 + depth 0.25``, and plans, which list layers in a file.

A text has steps joined by ``+``. A step is the name of a family or of a published method, then a fraction (``0.25``,
``25%``) or fractions by part (``mlp=0.3``), then ``layers=4-29`` and options (``align=64``), in any order. A plan is a
YAML or JSON file::

    prune: depth 0.1                        # optional: steps of the whole model
    layers:                                 # layers of the dense model, from 0
      4-11: width mlp=0.3 attention=0.25
      12,14: width mlp=0.5
      20-23: depth                          # removes these layers
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulator.errors import InputError, one_line, unknown
from simulator.files.yaml import Node, Problems, first_of, parse_yaml, path_of, read_text
from simulator.pruning import FAMILIES
from simulator.pruning._family import check_fraction
from simulator.pruning._methods import METHODS
from simulator.pruning._steps import PruningStep
from simulator.units import parse_fraction, parse_value

MOST_CHARACTERS = 2000
MOST_LAYERS = 10_000  # largest accepted layer number; models have fewer layers

_TOKEN = re.compile(
    r"(?P<name>[^\s+=%]+)\s*=\s*(?P<value>[^\s+=%]+(?:\s*%)?)|(?P<word>[^\s+=%]+(?:\s*%)?)|(?P<plus>\+)|(?P<wrong>[=%])"
)


def read_steps(text: str) -> tuple[PruningStep, ...]:
    """Return the steps of a text or of the plan at a path; errors have the column, or line and column, of a mistake."""
    if not isinstance(text, str):
        raise InputError(f"pruning: expected a text such as 'width mlp=0.3 + depth 0.25', got {text!r}")
    if is_plan(text):
        problems = Problems(text.strip())
        return plan_steps(read_text(Path(text.strip()), problems), problems)
    try:
        return _steps(text)
    except _MisplacedError as wrong:
        place = f", column {wrong.column}" if text.strip() else ""
        raise InputError(f"pruning {one_line(text, 120)!r}{place}: {wrong}") from None


def is_plan(text: str) -> bool:
    return text.strip().endswith((".yaml", ".yml", ".json"))


class _MisplacedError(InputError):
    """A mistake at a column of a text, from 1."""

    def __init__(self, column: int, message: str) -> None:
        super().__init__(message)
        self.column = column


def _steps(text: str, layers: tuple[int, ...] | None = None) -> tuple[PruningStep, ...]:
    """Return the steps of a text; in a plan, ``layers`` are the layers of its entry."""
    if len(text) > MOST_CHARACTERS:
        raise _MisplacedError(MOST_CHARACTERS, f"expected at most {MOST_CHARACTERS} characters, got {len(text)}")
    steps: list[list[re.Match[str]]] = [[]]
    for token in _TOKEN.finditer(text):
        if token["wrong"]:
            raise _MisplacedError(token.start() + 1, f"expected NAME=VALUE or a fraction, got {token['wrong']!r}")
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
    if name not in FAMILIES and name not in METHODS:
        raise _MisplacedError(at, str(unknown("family or method", name, [*FAMILIES, *METHODS], FAMILIES)))
    if not first["word"]:
        raise _MisplacedError(at, f"expected a fraction or a part after {name}, such as {name} 0.25")
    if name in METHODS and listed is not None:
        raise _MisplacedError(at, f"method {name} selects its own layers; expected a family, or the method under prune")
    targets = () if name in METHODS else FAMILIES[name].targets
    known = () if name in METHODS else ("layers", *targets, *FAMILIES[name].options)
    parts: dict[str, float] = {}
    options: dict[str, Any] = {}
    sparsity, layers = None, listed
    for token in tokens[1:]:
        at, key, value = token.start() + 1, token["name"], token["value"]
        if token["word"]:
            if sparsity is not None:
                raise _MisplacedError(at, f"expected NAME=VALUE or + after the fraction, got {token['word']!r}")
            sparsity = _fraction(token["word"], at)
        elif not known:
            raise _MisplacedError(at, f"method {name} sets its own parts and options; expected a fraction only")
        elif key not in known:
            raise _MisplacedError(at, str(unknown(f"part or option of {name}", key, known)))
        elif key == "layers" and listed is not None:
            raise _MisplacedError(at, "expected no layers, as the key of the plan lists them")
        elif key in parts or key in options or (key == "layers" and layers is not None):
            raise _MisplacedError(at, f"{key} is given twice")
        elif key == "layers":
            layers = _layers(value, token.start("value") + 1)
        elif key in targets:
            parts[key] = _fraction(value, token.start("value") + 1)
        else:
            options[key] = parse_value(value)
    if parts and sparsity is not None:
        raise _MisplacedError(first.start() + 1, f"{name}: expected one fraction or fractions by part, got both")
    found = PruningStep(name, tuple(parts.items()) or sparsity, layers, tuple(sorted(options.items())))
    return _complete(found, first.start() + 1, tokens[-1].end() + 1)


def _complete(step: PruningStep, at: int, end: int) -> PruningStep:
    """Return a step with the usual fraction of its family or method, if the text has none and one is needed."""
    name = step.name
    if name in METHODS:
        usual = METHODS[name].sparsities
        if step.budgeted and step.sparsity is not None:
            raise _MisplacedError(at, f"{name} keeps a number of tokens; expected no fraction, as it follows from them")
        if step.sparsity is None and len(usual) > 1:
            papers = " or ".join(f"{name} {s:g}" for s in usual)
            raise _MisplacedError(end, f"expected a fraction; the paper of {name} has {papers}")
        return replace(step, sparsity=usual[0]) if step.sparsity is None and usual else step
    family = FAMILIES[name]
    if step.layers is not None and family.layers == "all":
        raise _MisplacedError(at, f"family {name}: expected no layers, as it prunes all layers equally")
    if step.sparsity is not None or step.budgeted or (step.layers is not None and family.layers == "some"):
        return step
    if family.default is None:
        some = f", or parts, such as {name} {family.targets[0]}=0.25" if family.targets else ""
        some += f", or a budget of tokens, such as {name} budget=1024" if "budget" in family.options else ""
        raise _MisplacedError(end, f"expected a fraction, such as {name} 0.25{some}")
    return replace(step, sparsity=family.default)


def _fraction(text: str, column: int) -> float:
    try:
        return check_fraction(parse_fraction(text), "fraction")
    except InputError as error:
        raise _MisplacedError(column, str(error)) from None


def _layers(text: str, column: int) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MOST_LAYERS:
            expected = "expected layer numbers such as 4-29 or 0,5,8-11"
            raise _MisplacedError(column, f"{expected}, got {one_line(text, 120)!r}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def plan_steps(text: str | None, problems: Problems | None = None) -> tuple[PruningStep, ...]:
    """Return the steps of the content of a plan; the InputError is its first problem, ``file:line:column: reason``."""
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
            layers = _layers(text, 1)
        except InputError as error:
            problems.add(key_node, key, str(error))
            continue
        if again := taken.intersection(layers):
            problems.add(key_node, key, f"layer {min(again)} is listed twice")
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
        problems.add(node._replace(column=node.column + node.quoted + wrong.column - 1), key, str(wrong))
        return ()
