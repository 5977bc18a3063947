"""Read the description of a pruning method, from YAML or from a mapping: :class:`Description`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, ValuesView
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError, one_line, unknown
from simulator.files.fields import (
    BAD,
    Checked,
    Keyed,
    ListOf,
    Number,
    Scalar,
    Text,
    TreeReader,
    Truth,
    unknown_key,
)
from simulator.files.yaml import Node, Problems, first_of, parse_yaml, read_text
from simulator.names import PHASES
from simulator.pruning import FAMILIES, Family
from simulator.pruning._family import one_of
from simulator.pruning.described.expressions import Condition, Expression
from simulator.units import parse_quantity

MOST_CHARACTERS = 8000  # most characters of a file, which usually has 10 to 30 lines

# kernels that compute fewer tokens of a sublayer or of one product, and fewer channels; the first
# is the default
_SUBLAYER = ("dense", "gather", "masked", "block-sparse", "skipped")
_PRODUCT = ("dense", "block-sparse", "skipped")
_CHANNELS = ("dense", "gather", "looped", "grouped", "block-sparse", "2:4", "unstructured")
_ONE_CHOICE = ("dense", "2:4", "unstructured", "skipped")  # kernels of one choice for all tokens

# operator -> what can be smaller -> kernels that compute it
OPERATORS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **{
        operator: {"m": _PRODUCT, "n": _CHANNELS, "k": _CHANNELS}
        for operator in ("qkv", "o", "gate_up", "down")
    },
    "head": {"m": _PRODUCT, **dict.fromkeys(("n", "k"), ("dense", "block-sparse", "unstructured"))},
    "experts": {"m": _PRODUCT, "n": ("dense",), "top_k": ("dense",)},
    "attention": {"m": _SUBLAYER, **dict.fromkeys(("keys", "budget", "heads"), ("block-sparse",))},
    "mlp": {"m": _SUBLAYER, "n": _CHANNELS},
    "all": {"m": _SUBLAYER, "k": _CHANNELS},
    "cache": {"keep": ("dense",), "budget": ("dense",)},
    "prompt": {"keep": ("dense",)},
}
KERNELS = tuple(dict.fromkeys(k for axes in OPERATORS.values() for ks in axes.values() for k in ks))
# operator -> operators that contain it
_WITHIN: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gate_up", "down"), ("mlp", "all")),
    **dict.fromkeys(("qkv", "o", "attention", "mlp", "experts"), ("all",)),
}
# option of a change -> operators, axes or kernels that it needs
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "rolling": ("cache",),
    "block": ("keys", "budget"),
    "kv": ("attention", "all"),
    "router": ("masked", "grouped"),
    "tokens": ("m",),
    "groups": ("n", "k"),
    "align": ("n", "k"),
}
BLOCKS: tuple[int, ...] = (16, 64, 128)
ROLES: tuple[str, ...] = ("router", "gather", "scatter", "select", "sort", "mask", "fill", "norm")
PLACES: tuple[str, ...] = ("layer", "attention", "mlp", "sublayer")
EVERY: tuple[str, ...] = ("layer", "sublayer", "drop", "pass")
PASSES: tuple[str, ...] = ("prefill", "decode")  # phases of a pass


@dataclass(frozen=True)
class LayerRange:
    """Layers of any model: first to last, or every few, as ``4:-2`` or ``1::2``."""

    text: str
    slices: tuple[slice, ...] = field(hash=False)

    @classmethod
    def parse(cls, text: str) -> LayerRange:
        return cls(text, tuple(_slice(part.strip()) for part in text.split(",")))

    def numbers(self, layers: int) -> tuple[int, ...]:
        """Return the layers of a model with ``layers`` layers, in order; InputError if a layer is
        missing."""
        for one in self.slices:
            ends = [end for end in (one.start, one.stop) if end is not None]
            if any(abs(end) > layers for end in ends) or not range(layers)[one]:
                raise InputError(f"layers {self.text}: expected some of {layers} layers, got none")
        return tuple(sorted({i for one in self.slices for i in range(layers)[one]}))


_NUMBER = r"(?:0|[1-9]\d{0,4})"  # without leading zeros
_SLICE = re.compile(rf"(-?{_NUMBER})?:(-?{_NUMBER})?(:[1-9]\d{{0,4}})?", re.ASCII)
_RANGE = re.compile(rf"(-?{_NUMBER})(?:-({_NUMBER}))?", re.ASCII)  # both ends included


def _slice(text: str) -> slice:
    if _SLICE.fullmatch(text):
        return slice(*(int(end) if end else None for end in text.split(":")))
    match = _RANGE.fullmatch(text)
    if match is None:
        got = one_line(repr(text), 60)
        raise InputError(f"expected layers such as 4:-2, 1::2 or 0-3,8, got {got}")
    return slice(int(match[1]), int(match[2] or match[1]) + 1 or None)


@dataclass(frozen=True)
class ByLayer:
    """The value of ``s`` in each layer, given that of the whole model."""

    # one for all layers (an expression of ``layer``), or one per layer
    values: tuple[Expression, ...] = ()
    # the share that remains falls by the same factor from run to run of layers; its mean is 1 - s
    geometric: bool = False
    runs: int | None = None  # equal runs of layers with one value; None: each layer

    @property
    def names(self) -> frozenset[str]:
        return frozenset(["s"]) if self.geometric else _names(self.values)


@dataclass(frozen=True)
class PruneStep:
    """A step of a family, with expressions in place of numbers."""

    family: str
    # None: the default of the family, or what follows from a budget
    sparsity: Expression | Mapping[str, Expression] | None = field(default=None, hash=False)
    layers: LayerRange | None = None
    per_layer: ByLayer | None = None
    options: Mapping[str, int | bool | str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Change:
    """What stays of one operator for each token."""

    operator: str  # a key of OPERATORS
    axis: str  # m, n, k, keys, budget, heads, keep or top_k
    stays: Expression  # share of the axis; positions of a budget, experts of top_k
    kernel: str  # one of the kernels of the axis in OPERATORS
    per: int = 1  # neighbouring tokens that choose together
    shared: bool = False  # one choice for all tokens of a pass
    groups: int | None = None  # channel groups that a token chooses from
    align: int = 16  # multiple to which the remaining width is rounded up
    tokens: str = "binomial"  # distribution of the number of tokens: binomial, or exact
    kv: str = "stays"  # keys and values of skipped tokens: stays, or pruned
    block: int = 64  # edge of the blocks of queries and keys that attention skips
    rolling: bool = False  # a new position replaces an older one in the cache
    router: int = 2  # outputs of the router that the kernel "masked" contains
    layers: LayerRange | None = None


@dataclass(frozen=True)
class Addition:
    """A kernel that a method adds: a product, bytes, or a known time."""

    kind: str  # gemm, elementwise or time
    role: str  # one of ROLES
    sizes: Mapping[str, Expression] = field(hash=False)  # m, n, k; read, write in bytes; seconds
    place: str = "before layer"  # before or after, and one of PLACES
    every: str = "layer"  # one of EVERY
    kernels: int = 1
    when: Condition | None = None
    phases: tuple[str, ...] = PASSES
    layers: LayerRange | None = None


@dataclass(frozen=True)
class Description:
    """A pruning method: its families, what it changes per token, and what it adds."""

    name: str
    what: str = ""
    arxiv: str = ""
    sparsities: tuple[float, ...] = ()
    phases: tuple[str, ...] = PHASES
    layers: LayerRange | None = None
    per_layer: ByLayer | None = None
    prune: tuple[PruneStep, ...] = ()
    dynamic: tuple[Change, ...] = ()
    adds: tuple[Addition, ...] = ()

    @classmethod
    def read(cls, path: str | Path, problems: Problems | None = None) -> Description:
        """Return the method of a YAML file; InputError with its first problem and its place, all go
        to ``problems``."""
        problems = Problems(str(path)) if problems is None else problems
        return cls.of_text(read_text(Path(path), problems) or "", problems)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Description:
        """Return the method of a mapping with the content of a file."""
        try:
            return cls.of_text(json.dumps(content, default=float), Problems("method"))
        except InputError as error:  # the parts of a mapping have no lines
            raise InputError(re.sub(r"^method:\d+:\d+: ", "method: ", str(error))) from None
        except (TypeError, ValueError, RecursionError):
            expected = "expected a mapping of texts, numbers and lists"
            raise InputError(f"method: {expected}, got {shown(content)}") from None

    @classmethod
    def named(cls, name: str) -> Description:
        """Return a description with nothing but a name, of a method that is a function."""
        try:
            return cls(_NAME.value(Node("scalar", text=str(name), quoted=True)))
        except ValueError as error:
            raise InputError(f"method: {error}") from None

    @classmethod
    def of_text(cls, text: str, problems: Problems) -> Description:
        """Return the method of the text of a file; InputError with the first of its problems."""
        if len(text) > MOST_CHARACTERS:
            expected = f"expected at most {MOST_CHARACTERS:,} characters"
            problems.add(None, "file", f"{expected}, got {len(text):,}")
        root, found = None if len(problems) else parse_yaml(text, problems), None
        if not len(problems):
            reader = TreeReader(problems, (), {})
            found = _DESCRIPTION.read(root or Node("scalar"), (), reader)
        if not isinstance(found, Description):
            raise first_of(problems.lines)
        return found

    @property
    def names(self) -> frozenset[str]:
        """Names in the expressions of what it changes per token and adds."""
        return _names((self.dynamic, self.adds))

    @property
    def needs_sparsity(self) -> bool:
        """Whether a request must state ``s``."""
        steps = [(step, step.per_layer or self.per_layer) for step in self.prune]
        own = [(part, self.per_layer) for part in (*self.dynamic, *self.adds)]
        return any(
            "s" in _names(part) and (per_layer is None or "s" in per_layer.names)
            for part, per_layer in (*steps, *own)
        )


def _names(part: Any) -> frozenset[str]:
    """Return the names in the expressions of a part of a description."""
    if isinstance(part, Expression):
        return part.names
    if isinstance(part, PruneStep | Change | Addition | ByLayer):
        part = vars(part)
    parts = part.values() if isinstance(part, Mapping) else part
    several = isinstance(parts, tuple | ValuesView)
    return frozenset[str]().union(*map(_names, parts if several else ()))


@dataclass(frozen=True)
class _Parsed(Scalar):
    """A value that a function reads from a text, or from items joined by commas."""

    parse: Callable[[str], Any]
    listed: bool = False

    def value(self, node: Node) -> Any:
        if node.kind == "scalar":
            return self.parse(node.text)
        if not self.listed or not node.items:
            raise ValueError(f"expected a text or a number, got {node}")
        return self.parse(",".join(item.text for item in node.items))


def _formula(
    expected: str,
    low: float,
    high: float,
    parse: Callable[[str], Expression | None] = Expression.parse,
) -> Scalar:
    """Return the kind of an expression; a constant must be from ``low`` to ``high``."""

    def rule(found: Any) -> Any:
        constant = found and found.constant
        if constant is not None and not low <= constant <= high:
            raise ValueError(f"expected {expected}, got {found}")
        return found

    return Checked(_Parsed(parse), rule)


def _seconds(text: str) -> Expression:
    """Return a time with a unit, or an expression in seconds."""
    timed = re.fullmatch(r"\d[-+\d.eE]* *[^\W\d_]+", text)
    return Expression.parse(repr(parse_quantity(text, "s")) if timed else text)


def _removed(text: str) -> Expression | None:
    """Return the share that a family removes; None for an empty value."""
    return None if text in ("", "null") else Expression.parse(text)


@dataclass(frozen=True)
class _Object:
    """A mapping with given keys; ``make`` returns its value, or raises InputError."""

    kinds: Mapping[str, Any]
    make: Callable[[dict[str, Any]], Any]
    required: tuple[str, ...] = ()

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind != "mapping" or not node.entries:
            expected = f"expected some of {', '.join(self.kinds)}"
            return reader.wrong(node, path, f"{expected}, got {node}")
        found = {}
        for key, (at, value) in node.entries.items():
            if key in self.kinds:
                found[key] = self.kinds[key].read(value, (*path, key), reader)
            else:
                found[key] = reader.wrong(at, (*path, key), unknown_key(key, self.kinds))
        for key in self.required:
            if key not in found:
                found[key] = reader.wrong(node, (*path, key), "is missing")
        try:
            return BAD if BAD in found.values() else self.make(found)
        except InputError as error:
            return reader.wrong(node, path, str(error))


_several = partial(ListOf, some=True)
_SHARE = _formula("a share above 0, up to 1", 1e-12, 1.0)
_COUNT = _formula("a number from 1 up", 1.0, 2.0**53)
_BYTES = _formula("a number of bytes from 0 up", 0.0, 1e30)
_FAMILY_REMOVED = _formula("a fraction in [0, 1), or a size", 0.0, 2.0**31, _removed)
_PART_REMOVED = _formula("a fraction in [0, 1), or a size", 0.0, 2.0**31)
_OPTION = Number(0, 2**31, "16", whole=True)
_FRACTION = _formula("a fraction in [0, 1)", 0.0, 0.9999)
_WHOLE = Number(1, 2**20, "16", whole=True)
_LAYERS = _Parsed(LayerRange.parse, listed=True)


class _Per(Scalar):
    def value(self, node: Node) -> int:
        return 1 if node.text == "token" else int(_WHOLE.value(node))


_GEOMETRIC = _Object(
    {"geometric": Number(2, 1000, "4", whole=True)},
    lambda found: ByLayer(geometric=True, runs=found["geometric"]),
)


class _ByLayer:
    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        if node.kind == "mapping":
            return _GEOMETRIC.read(node, path, reader)
        if node.text == "geometric":
            return ByLayer(geometric=True)
        if node.kind == "list":
            values = _several(_FRACTION).read(node, path, reader)
            return BAD if values is BAD else ByLayer(values)
        value = _FRACTION.read(node, path, reader)
        return BAD if value is BAD else ByLayer((value,))


_WHERE: Mapping[str, Any] = {"layers": _LAYERS, "per_layer": _ByLayer()}


class _Step:
    """A step of ``prune``, whose keys depend on its family."""

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        names = [key for key in node.entries if key in FAMILIES]
        if not names:
            first = next(iter(node.entries), str(node))
            return reader.wrong(node, path, str(unknown("family", first, FAMILIES)))
        key, family = names[0], FAMILIES[names[0]]
        parts = family.targets if node.entries[key][1].kind == "mapping" else ()
        removed = _Object(dict.fromkeys(parts, _PART_REMOVED), dict) if parts else _FAMILY_REMOVED
        options = {
            name: _OPTIONS.get(type(default), _OPTION) for name, default in family.options.items()
        }
        kinds = {key: removed, **_WHERE, **options}
        return _Object(kinds, partial(_prune_step, family, key)).read(node, path, reader)


_OPTIONS: Mapping[type, Scalar] = {bool: Truth(), str: Text()}


def _prune_step(family: Family, key: str, found: dict[str, Any]) -> PruneStep:
    where = {name: found.pop(name, None) for name in _WHERE}
    sparsity = found.pop(key)
    if where["per_layer"] and "s" not in _names(sparsity):
        raise InputError(f"{key}: expected an expression of s, as per_layer states s")
    return PruneStep(family.name, sparsity, **where, options=found)


_AXES: Mapping[str, Any] = {
    **dict.fromkeys(("m", "n", "k", "keys", "heads", "keep"), _SHARE),
    **dict.fromkeys(("budget", "top_k"), _COUNT),
}
_CHANGE: Mapping[str, Any] = {
    "kernel": Text(choices=KERNELS),
    "per": _Per(),
    "shared": Truth(),
    "groups": _WHOLE,
    "align": _WHOLE,
    "tokens": Text(choices=("binomial", "exact")),
    "kv": Text(choices=("stays", "pruned")),
    "block": Checked(_WHOLE, lambda value: one_of("block", value, BLOCKS)),
    "rolling": Truth(),
    "router": _WHOLE,
    "layers": _LAYERS,
}


def _change(operator: str, found: dict[str, Any]) -> tuple[Change, ...]:
    axes = OPERATORS[operator]
    stated = [axis for axis in _AXES if axis in found]
    if not stated or len({*stated} - {"m"}) > 1 or not axes.keys() >= {*stated}:
        raise InputError(f"expected one of {', '.join(axes)}, got {' and '.join(stated) or 'none'}")
    kernels = {axis: found.get("kernel", axes[axis][0]) for axis in stated}
    for axis, kernel in kernels.items():
        if kernel not in axes[axis]:
            expected = " or ".join(axes[axis])
            raise InputError(f"kernel of {axis}: expected {expected}, got {kernel}")
        if found.get("shared") and (kernel not in _ONE_CHOICE or (axis, kernel) == ("m", "dense")):
            expected = "skipped" if axis == "m" else "dense"
            raise InputError(f"shared: expected kernel: {expected} with it, got {kernel}")
        if kernel == "2:4" and found[axis].constant not in (None, 0.5):
            raise InputError(f"{axis}: expected 0.5, as 2:4 removes half, got {found[axis]}")
    for option, needs in _NEEDS.items():
        if option in found and not {operator, *kernels.values(), *stated}.intersection(needs):
            raise InputError(f"{option}: expected it only with {' or '.join(needs)}")
    about = {name: value for name, value in found.items() if name not in (*stated, "kernel")}
    return tuple(Change(operator, axis, found[axis], kernels[axis], **about) for axis in stated)


def _changes(found: dict[str, tuple[Change, ...]]) -> tuple[Change, ...]:
    for name, changes in found.items():
        for outer in _WITHIN.get(name, ()):
            for one, other in product(changes, found.get(outer, ())):
                if (one.axis == "m") == (other.axis == "m") and one.axis in ("m", "n", "k"):
                    reason = f"as it changes {outer} too"
                    raise InputError(f"{name}: expected no part of {outer}, {reason}")
    return tuple(change for changes in found.values() for change in changes)


_DYNAMIC = _Object(
    {operator: _Object({**_AXES, **_CHANGE}, partial(_change, operator)) for operator in OPERATORS},
    _changes,
)

_SIZES: Mapping[str, Mapping[str, Any]] = {
    "gemm": dict.fromkeys(("m", "n", "k"), _COUNT),
    "elementwise": dict.fromkeys(("read", "write"), _BYTES),
    "time": {"seconds": _formula("a time of up to 1000 s", 0.0, 1000.0, _seconds)},
}
_ADDITION: Mapping[str, Any] = {
    "role": Text(choices=ROLES),
    "place": Text(choices=tuple(f"{side} {at}" for side in ("before", "after") for at in PLACES)),
    "every": Text(choices=EVERY),
    "kernels": _WHOLE,
    "when": _Parsed(Condition.parse),
    "phases": _several(Text(choices=PASSES)),
    "layers": _LAYERS,
}


def _addition(kind: str, found: dict[str, Any]) -> Addition:
    sizes = {name: found.pop(name) for name in _SIZES[kind]}
    sublayers = found.get("every") == "sublayer"
    place = found.setdefault("place", "before sublayer" if sublayers else "before layer")
    if sublayers != place.endswith("sublayer"):
        raise InputError(f"place: expected sublayer with every: sublayer only, got {place}")
    return Addition(kind, sizes=sizes, **found)


def _one_addition(found: dict[str, Addition]) -> Addition:
    if len(found) > 1:
        raise InputError(f"expected one of {', '.join(_SIZES)}, got {' and '.join(found)}")
    return next(iter(found.values()))


_ADDITIONS = _several(
    _Object(
        {
            kind: _Object({**sizes, **_ADDITION}, partial(_addition, kind), (*sizes, "role"))
            for kind, sizes in _SIZES.items()
        },
        _one_addition,
    )
)


_NAME = Text(pattern="[A-Za-z0-9][A-Za-z0-9.:-]{0,59}", right="letters, digits, - and .")


def _description(found: dict[str, Any]) -> Description:
    name = found.pop("method")
    if {*found.get("phases", ())} >= {*PASSES}:  # generate and serve consist of both passes
        found["phases"] = PHASES
    made = Description(name, **found)
    if not (made.prune or made.dynamic or made.adds):
        raise InputError("expected prune, dynamic or adds, got none of them")
    if made.per_layer and "s" not in _names((made.prune, made.dynamic, made.adds)):
        raise InputError("per_layer: expected none, as no expression contains s")
    if made.sparsities and not made.needs_sparsity:
        raise InputError("sparsities: expected none, as no expression contains s")
    if name in FAMILIES:
        raise InputError(f"method: expected a name that is not a family, got {name}")
    return made


_DESCRIPTION = _Object(
    {
        "method": _NAME,
        "what": Text(),
        "arxiv": Text(pattern=r"\d{4}\.\d{5}", right='the number of a paper such as "2310.17157"'),
        "sparsities": _several(Number(0.0, 0.9999, "0.5")),
        "phases": _several(Text(choices=PHASES)),
        **_WHERE,
        "prune": _several(_Step()),
        "dynamic": _DYNAMIC,
        "adds": _ADDITIONS,
    },
    _description,
    ("method",),
)
