"""The grid of a sweep: its axes, and the YAML file that names them.

Use :func:`read_grid` for a file, :class:`Grid` to write one in Python. Everything a sweep could refuse is refused here,
before any work, with ``file:line:column: key: what is wrong, what would be right``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError
from simulator.files.fields import Checked, Keys, Kind, Many, Number, Text, Truth
from simulator.files.yaml import Node, Problems, join, parse_yaml, read_text
from simulator.hardware.library import load_hardware
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.predict.rows import FamilyChoice
from simulator.predict.settings import MAX_TOKENS, PARALLEL, Setting, check_fraction
from simulator.pruning import FAMILIES, prune
from simulator.workload import DTYPES, PHASES, RUNTIMES

MOST_POINTS = 100_000
"""Longest axis; a longer one is a mistake in a step."""

_SMALL = "llama-3.2-1b"
"""A model on which options of families are tried."""

REQUIRED: tuple[str, ...] = ("models", "hardware", "sparsities", "phases", "batches", "seqs")
OPTIONAL: tuple[str, ...] = (
    "families",
    "dtypes",
    "runtimes",
    "devices",
    "parallel",
    "new_tokens",
    "fuse_qkv",
    "fuse_gate_up",
    "ideal",
    "level",
)


@dataclass(frozen=True)
class Formats:
    """Number formats of a run; None: as the first says."""

    dtype: str = "bf16"
    weight_dtype: str | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True)
class Grid:
    """Axes of a sweep; every combination is predicted.

    Attributes
    ----------
    models : tuple of str or ModelConfig
        Names, paths or loaded models.
    hardware : tuple of str
        Names, aliases or paths.
    sparsities : tuple of float, [0, 1)
    phases, runtimes : tuple of str
    batches, seqs, devices : tuple of int
        Sequences; tokens (prefill) or cached positions (decode) of each; devices that share the model.
    families : tuple of FamilyChoice
        Default: all, each with its own defaults.
    dtypes : tuple of Formats
    parallel, new_tokens, fuse_qkv, fuse_gate_up, ideal, level
        As in :class:`simulator.predict.settings.Setting`, for the whole grid.

    Examples
    --------
    >>> grid = Grid(("llama-3.1-8b",), ("h100_sxm", "a100"), (0.25, 0.5), ("decode",), (1, 8), (2048,))
    >>> grid.size == 2 * 2 * 2 * len(FAMILIES)
    True
    """

    models: tuple[str | ModelConfig, ...]
    hardware: tuple[str, ...]
    sparsities: tuple[float, ...]
    phases: tuple[str, ...]
    batches: tuple[int, ...]
    seqs: tuple[int, ...]
    families: tuple[FamilyChoice, ...] = tuple(FamilyChoice(name) for name in FAMILIES)
    dtypes: tuple[Formats, ...] = (Formats(),)
    runtimes: tuple[str, ...] = ("cuda_graph",)
    devices: tuple[int, ...] = (1,)
    parallel: str = "tensor"
    new_tokens: int = 128
    fuse_qkv: bool = False
    fuse_gate_up: bool = False
    ideal: bool = False
    level: float = 0.9

    def __post_init__(self) -> None:
        for name in (*REQUIRED, "families", "dtypes", "runtimes", "devices"):
            if not getattr(self, name):
                raise InputError(f"{name}: expected at least one value")

    @property
    def size(self) -> int:
        """Configurations in the product."""
        axes = (*REQUIRED, "families", "dtypes", "runtimes", "devices")
        return math.prod(len(getattr(self, name)) for name in axes)

    def setting(self, formats: Formats, devices: int) -> Setting:
        """How a model is run at one point of the grid."""
        names = ("parallel", "new_tokens", "fuse_qkv", "fuse_gate_up", "level")
        return Setting(devices=devices, **asdict(formats), **{name: getattr(self, name) for name in names})


def read_grid(path: str | Path) -> Grid:
    """The grid a YAML file describes.

    An axis is a list, one value, or for numbers ``{from: 0.1, to: 0.9, step: 0.1}`` or ``{from: 1, to: 64, times: 2}``.
    A family is a name, ``all``, or a mapping ``{width: {align: 64}}``; a dtype a name or ``{dtype: bf16, weight_dtype:
    int4, kv_dtype: fp8}``.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    Grid

    Raises
    ------
    InputError
        The first problem of the file as ``file:line:column: key: reason``.
    """
    problems = Problems(str(path))
    text = read_text(Path(path), problems)
    root = None if text is None else parse_yaml(text, problems)
    if root is None and not len(problems):
        problems.add(None, "file", f"is empty; expected the axes {', '.join(REQUIRED)}")
    if root is not None and not len(problems):
        keys = Keys({name: _KINDS[name] for name in REQUIRED}, {name: _KINDS[name] for name in OPTIONAL})
        axes = keys.read(root, "", problems)
        if not len(problems):
            _check_tokens(root, axes, problems)
        if not len(problems):
            return Grid(**axes)
    # a wrong key is said before the missing one it was meant for
    first, *rest = sorted(problems.lines, key=lambda line: line.endswith(": is missing"))
    raise InputError(first + (f" (and {len(rest)} more)" if rest else ""))


def _check_tokens(root: Node, axes: Mapping[str, Any], problems: Problems) -> None:
    """Refuse passes longer than the cost models are meant for."""
    batch, seq = max(axes["batches"]), max(axes["seqs"])
    if batch * seq > MAX_TOKENS and set(axes["phases"]) != {"decode"}:
        reason = f"batch {batch} x seq {seq}: expected at most {MAX_TOKENS} tokens in a pass"
        problems.add(root.entries["seqs"][1], "seqs", reason)


@dataclass(frozen=True)
class _Axis:
    """A list, or one value that stands for a list; each value once."""

    kind: Kind

    def read(self, node: Node, key: str, problems: Problems) -> tuple[Any, ...]:
        if node.kind != "list":
            found: Sequence[Any] = [self.kind.read(node, key, problems)]
        else:
            found = Many(self.kind).read(node, key, problems)
            if not node.items:
                problems.add(node, key, "is an empty list; expected at least one value")
        return tuple(dict.fromkeys(value for value in found if value is not None))


@dataclass(frozen=True)
class _Numbers:
    """An axis of numbers: a list, one, or ``{from, to, step}`` or ``{from, to, times}``, ends included where hit."""

    number: Number
    rule: Callable[[float], Any] | None = None

    def read(self, node: Node, key: str, problems: Problems) -> tuple[Any, ...]:
        if node.kind == "mapping":
            values = tuple(dict.fromkeys(self.progression(node, key, problems)))
        else:
            values = _Axis(self.number).read(node, key, problems)
        for value in values:
            try:
                if self.rule:
                    self.rule(value)
            except InputError as error:
                place = next((item for item in node.items if _number_of(item) == value), node)
                problems.add(place, key, str(error))
        return values

    def progression(self, node: Node, key: str, problems: Problems) -> list[float]:
        whole, example = self.number.whole, "2" if self.number.whole else "0.1"
        by_step, by_times = Number(1 if whole else 1e-6, 1e9, example, whole), Number(1 + 1e-6, 1e9, example)
        ends = {"from": self.number, "to": self.number}
        nodes = Keys(ends, {"step": by_step, "times": by_times}).members(node, key, problems)

        def wrong(name: str, reason: str) -> list[float]:
            problems.add(nodes[name], join(key, name), reason)
            return []

        if "from" not in nodes or "to" not in nodes:
            return []
        if ("step" in nodes) == ("times" in nodes):
            problems.add(node, key, "expected either step or times beside from and to")
            return []
        how = "step" if "step" in nodes else "times"
        kinds = {"from": self.number, "to": self.number, how: by_step if how == "step" else by_times}
        start, end, by = (kind.read(nodes[name], join(key, name), problems) for name, kind in kinds.items())
        if start is None or end is None or by is None:
            return []
        if end < start:
            return wrong("to", f"expected at least the start {start:g}, got {end:g}")
        if how == "times" and start <= 0:
            return wrong("from", f"expected a start above 0 to multiply, got {start:g}")
        many = (math.log(end / start) / math.log(by) if how == "times" else (end - start) / by) + 1e-9
        if many >= MOST_POINTS:
            return wrong(how, f"makes more than {MOST_POINTS} values; take a larger one")
        values = (start * by**i if how == "times" else start + i * by for i in range(int(many) + 1))
        return [round(v) if whole else round(v, 9) for v in values]


class _Family:
    """A family's name, "all", or a mapping of names to options; gives the choices it stands for."""

    def read(self, node: Node, key: str, problems: Problems) -> tuple[FamilyChoice, ...]:
        if node.kind != "mapping":
            text = Text((*FAMILIES, "all")).read(node, key, problems)
            return tuple(FamilyChoice(name) for name in (FAMILIES if text == "all" else [text]) if name)
        found = []
        for name, (key_node, value) in node.entries.items():
            family = Text(tuple(FAMILIES)).read(key_node, join(key, name), problems)
            if family:
                found.append(FamilyChoice(family, self.options(value, join(key, name), family, problems)))
        return tuple(found)

    def options(self, node: Node, key: str, family: str, problems: Problems) -> tuple[tuple[str, Any], ...]:
        known = dict.fromkeys(FAMILIES[family].options, _Option())
        options = dict(sorted(Keys({}, known).read(node, key, problems).items()))
        if not len(problems):
            try:
                prune(lower(load_model(_SMALL), phase="generate", seq=64, new_tokens=1), family, 0.5, **options)
            except InputError as error:
                problems.add(node, key, str(error))
        return tuple(options.items())


class _Option:
    """A whole number, a number, true, false, a word, or a list of them; what it must be, the family says."""

    def read(self, node: Node, key: str, problems: Problems) -> Any:
        if node.kind == "list":
            return Many(self).read(node, key, problems)
        if node.kind == "mapping":
            problems.add(node, key, "expected a value, got a mapping")
            return None
        if node.text in ("true", "false") and not node.quoted:
            return node.text == "true"
        value = math.nan if node.quoted else _number_of(node)
        if math.isnan(value):
            return Text().read(node, key, problems)
        return int(value) if value.is_integer() and "." not in node.text and "e" not in node.text.lower() else value


class _Formats:
    """A dtype, or a mapping of the three."""

    def read(self, node: Node, key: str, problems: Problems) -> Formats | None:
        dtype = Text(DTYPES)
        if node.kind != "mapping":
            text = dtype.read(node, key, problems)
            return Formats(text) if text else None
        keys = Keys({"dtype": dtype}, {"weight_dtype": dtype, "kv_dtype": dtype}, Formats)
        formats: Formats | None = keys.read(node, key, problems)
        return formats


def _number_of(node: Node) -> float:
    try:
        return float(node.text)
    except ValueError:
        return math.nan


def _model(text: str) -> str:
    load_model(text)
    return text


def _device(text: str) -> str:
    """A shipped device by its own name, so that an alias does not count twice; a file by its path."""
    name = load_hardware(text).name
    return text if Path(text).suffix in (".yaml", ".yml") or "/" in text else name


def _flat(groups: Sequence[Sequence[FamilyChoice]]) -> tuple[FamilyChoice, ...]:
    return tuple(dict.fromkeys(choice for group in groups for choice in group))


_KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "models": _Axis(Checked(Text(), _model)),
        "hardware": _Axis(Checked(Text(), _device)),
        "sparsities": _Numbers(Number(-1e9, 1e9, "0.25"), check_fraction),
        "phases": _Axis(Text(PHASES)),
        "batches": _Numbers(Number(1, MAX_TOKENS, "64", whole=True)),
        "seqs": _Numbers(Number(1, MAX_TOKENS, "64", whole=True)),
        "families": Checked(_Axis(_Family()), _flat),
        "dtypes": _Axis(_Formats()),
        "runtimes": _Axis(Text(RUNTIMES)),
        "devices": _Numbers(Number(1, 100_000, "2", whole=True)),
        "parallel": Text(PARALLEL),
        "new_tokens": Number(1, 1_000_000, "128", whole=True),
        "fuse_qkv": Truth(),
        "fuse_gate_up": Truth(),
        "ideal": Truth(),
        "level": Number(0.01, 0.999, "0.9"),
    }
)


def grid_facts(grid: Grid) -> Mapping[str, Any]:
    """A grid as plain values, for a digest and for people."""
    facts: dict[str, Any] = {name: getattr(grid, name) for name in (*REQUIRED, *OPTIONAL)}
    facts["families"] = [[f.name, f.label] for f in grid.families]
    facts["dtypes"] = [[f.dtype, f.weight_dtype, f.kv_dtype] for f in grid.dtypes]
    return MappingProxyType(facts)
