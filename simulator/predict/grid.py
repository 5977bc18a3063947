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
from simulator.files.fields import Fields, join
from simulator.files.yaml import Node, Problems, parse_yaml, read_text
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
    grid = None if root is None or len(problems) else _Reader(problems).grid(root)
    if grid is None or len(problems):
        raise InputError(_said(problems))
    return grid


def _said(problems: Problems) -> str:
    """The first problem and how many more; a wrong key before the missing one it was meant for."""
    first, *rest = sorted(problems.lines, key=lambda line: line.endswith(": is missing"))
    return first + (f" (and {len(rest)} more)" if rest else "")


class _Reader:
    """Nodes of a grid file to values; every problem is noted with its place."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.fields = Fields(problems)

    def grid(self, root: Node) -> Grid | None:
        nodes = self.fields.mapping(root, "", REQUIRED, OPTIONAL)
        loaded: dict[str, Callable[[str], Any]] = {"models": load_model, "hardware": load_hardware}
        axes: dict[str, Any] = {name: self.names(nodes.get(name), name, check) for name, check in loaded.items()}
        axes["sparsities"] = self.sparsities(nodes.get("sparsities"), "sparsities")
        axes["phases"] = self.chosen(nodes.get("phases"), "phases", PHASES)
        for name in ("batches", "seqs"):
            axes[name] = self.numbers(nodes.get(name), name, 1, MAX_TOKENS, "64", whole=True)
        if "families" in nodes:
            axes["families"] = self.families(nodes["families"])
        if "dtypes" in nodes:
            axes["dtypes"] = self.formats(nodes["dtypes"])
        if "runtimes" in nodes:
            axes["runtimes"] = self.chosen(nodes["runtimes"], "runtimes", RUNTIMES)
        if "devices" in nodes:
            axes["devices"] = self.numbers(nodes["devices"], "devices", 1, 100_000, "2", whole=True)
        if "parallel" in nodes:
            axes["parallel"] = self.fields.text(nodes["parallel"], "parallel", PARALLEL)
        if "new_tokens" in nodes:
            axes["new_tokens"] = self.integer(
                self.fields.number(nodes["new_tokens"], "new_tokens", 1, 1_000_000, "128", whole=True)
            )
        if "level" in nodes:
            axes["level"] = self.fields.number(nodes["level"], "level", 0.01, 0.999, "0.9")
        for name in ("fuse_qkv", "fuse_gate_up", "ideal"):
            if name in nodes:
                axes[name] = self.truth(nodes[name], name)
        if not len(self.problems):
            self.tokens(nodes, axes)
        return None if len(self.problems) else Grid(**axes)

    def tokens(self, nodes: Mapping[str, Node], axes: Mapping[str, Any]) -> None:
        """Refuse passes longer than the cost models are meant for."""
        batch, seq = max(axes["batches"]), max(axes["seqs"])
        if batch * seq > MAX_TOKENS and set(axes["phases"]) != {"decode"}:
            self.problems.add(
                nodes["seqs"], "seqs", f"batch {batch} x seq {seq}: expected at most {MAX_TOKENS} tokens in a pass"
            )

    def members(self, node: Node | None, key: str) -> list[tuple[Node, str]]:
        """Members of a list, or the one value that stands for a list."""
        if node is None:
            return []
        if node.kind != "list":
            return [(node, key)]
        if not node.items:
            self.problems.add(node, key, "is an empty list; expected at least one value")
        return [(item, join(key, str(i))) for i, item in enumerate(node.items)]

    def names(self, node: Node | None, key: str, check: Callable[[str], Any]) -> tuple[str, ...]:
        """Texts, each of which loads."""
        out: dict[str, None] = {}
        for item, at in self.members(node, key):
            text = self.fields.text(item, at)
            if text:
                try:
                    out[text if key == "models" else _device(text, check)] = None
                    check(text)
                except InputError as error:
                    self.problems.add(item, at, str(error))
        return tuple(out)

    def chosen(self, node: Node | None, key: str, choices: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys(filter(None, (self.fields.text(item, at, choices) for item, at in self.members(node, key))))
        )

    def numbers(
        self, node: Node | None, key: str, low: float, high: float, example: str, whole: bool
    ) -> tuple[Any, ...]:
        if node is not None and node.kind == "mapping":
            values: Sequence[float] = self.progression(node, key, low, high, example, whole)
        else:
            values = [self.fields.number(item, at, low, high, example, whole) for item, at in self.members(node, key)]
        kept = [v for v in values if not math.isnan(v)]
        return tuple(dict.fromkeys(self.integer(v) if whole else v for v in kept))

    def sparsities(self, node: Node | None, key: str) -> tuple[float, ...]:
        """Fractions in [0, 1)."""
        values = self.numbers(node, key, -1e9, 1e9, "0.25", whole=False)
        listed = [item for item, _ in self.members(node, key)]
        for value in values:
            try:
                check_fraction(value)
            except InputError as error:
                place = next((item for item in listed if item.kind == "scalar" and _same(item.text, value)), node)
                self.problems.add(place, key, str(error))
        return values

    def progression(self, node: Node, key: str, low: float, high: float, example: str, whole: bool) -> list[float]:
        """``{from, to, step}`` or ``{from, to, times}``, both ends included where they are hit."""
        nodes = self.fields.mapping(node, key, ("from", "to"), ("step", "times"))
        if "from" not in nodes or "to" not in nodes:
            return []
        if ("step" in nodes) == ("times" in nodes):
            self.problems.add(node, key, "expected either step or times beside from and to")
            return []
        start, end = (
            self.fields.number(nodes[name], join(key, name), low, high, example, whole) for name in ("from", "to")
        )
        how = "step" if "step" in nodes else "times"
        smallest = 1.0 if whole else 1e-6
        least = 1.0 + 1e-6 if how == "times" else smallest
        by = self.fields.number(
            nodes[how], join(key, how), least, 1e9, "2" if whole else "0.1", whole and how == "step"
        )
        if math.isnan(start) or math.isnan(end) or math.isnan(by):
            return []
        if end < start:
            self.problems.add(nodes["to"], join(key, "to"), f"expected at least the start {start:g}, got {end:g}")
            return []
        if how == "times" and start <= 0:
            self.problems.add(nodes["from"], join(key, "from"), f"expected a start above 0 to multiply, got {start:g}")
            return []
        many = (math.log(end / start) / math.log(by) if how == "times" else (end - start) / by) + 1e-9
        if many >= MOST_POINTS:
            self.problems.add(nodes[how], join(key, how), f"makes more than {MOST_POINTS} values; take a larger one")
            return []
        values = (start * by**i if how == "times" else start + i * by for i in range(int(many) + 1))
        return [float(round(v)) if whole else round(v, 9) for v in values]

    def integer(self, value: float) -> int:
        return 0 if math.isnan(value) else int(value)

    def truth(self, node: Node, key: str) -> bool:
        if node.kind != "scalar" or node.quoted or node.text not in ("true", "false"):
            self.problems.add(node, key, f"expected true or false, got {node}")
        return node.text == "true"

    def families(self, node: Node) -> tuple[FamilyChoice, ...]:
        found: dict[FamilyChoice, None] = {}
        for item, at in self.members(node, "families"):
            if item.kind == "mapping":
                for name, (key_node, value) in item.entries.items():
                    label = join(at, name)
                    if self.fields.text(key_node, label, tuple(FAMILIES)):
                        found[FamilyChoice(name, self.options(value, label, name))] = None
            else:
                text = self.fields.text(item, at, (*FAMILIES, "all"))
                found.update({FamilyChoice(name): None for name in (FAMILIES if text == "all" else [text]) if name})
        return tuple(found)

    def options(self, node: Node, key: str, family: str) -> tuple[tuple[str, Any], ...]:
        known = FAMILIES[family].options
        nodes = self.fields.mapping(node, key, (), tuple(known))
        options = tuple((name, self.option(value, join(key, name))) for name, value in sorted(nodes.items()))
        if not len(self.problems):
            try:
                prune(lower(load_model(_SMALL), phase="generate", seq=64, new_tokens=1), family, 0.5, **dict(options))
            except InputError as error:
                self.problems.add(node, key, str(error))
        return options

    def option(self, node: Node, key: str) -> Any:
        """A whole number, a number, true, false, a word, or a list of them; what it must be, the family says."""
        if node.kind == "list":
            return tuple(self.option(item, join(key, str(i))) for i, item in enumerate(node.items))
        if node.kind == "mapping":
            self.problems.add(node, key, "expected a value, got a mapping")
            return None
        if node.text in ("true", "false") and not node.quoted:
            return node.text == "true"
        try:
            value = float(node.text) if not node.quoted else math.nan
        except ValueError:
            value = math.nan
        if math.isnan(value):
            return self.fields.text(node, key)
        return int(value) if value.is_integer() and "." not in node.text and "e" not in node.text.lower() else value

    def formats(self, node: Node) -> tuple[Formats, ...]:
        out: dict[Formats, None] = {}
        for item, at in self.members(node, "dtypes"):
            if item.kind == "mapping":
                nodes = self.fields.mapping(item, at, ("dtype",), ("weight_dtype", "kv_dtype"))
                values = {name: self.fields.text(value, join(at, name), DTYPES) for name, value in nodes.items()}
                if all(values.values()) and "dtype" in values:
                    out[Formats(**values)] = None
            else:
                text = self.fields.text(item, at, DTYPES)
                if text:
                    out[Formats(text)] = None
        return tuple(out)


def _same(text: str, value: float) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return False


def _device(text: str, load: Callable[[str], Any]) -> str:
    """A shipped device by its own name, so that an alias does not count twice; a file by its path."""
    return text if Path(text).suffix in (".yaml", ".yml") or "/" in text else str(load(text).name)


def grid_facts(grid: Grid) -> Mapping[str, Any]:
    """A grid as plain values, for a digest and for people."""
    facts: dict[str, Any] = {name: getattr(grid, name) for name in (*REQUIRED, *OPTIONAL)}
    facts["families"] = [[f.name, f.label] for f in grid.families]
    facts["dtypes"] = [[f.dtype, f.weight_dtype, f.kv_dtype] for f in grid.dtypes]
    return MappingProxyType(facts)
