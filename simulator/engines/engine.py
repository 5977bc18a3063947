"""Engines as data: what a serving stack fuses, launches and spends on the host, each value with its source and spread.

Use :func:`load_engine` with a name, an alias or the path of a YAML file of one's own; :func:`check_engine` for all that
is wrong with a file. An engine says nothing of a GPU: whose kernels it runs it names by stack, and a profile has them
or lends others (``HardwareProfile.serving``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import shown
from simulator.display import Displayed
from simulator.engines import DEFAULT_ENGINE as DEFAULT_ENGINE
from simulator.errors import InputError, unknown
from simulator.files.fields import (
    CheckedField,
    FieldType,
    ListField,
    MapField,
    NumberField,
    ObjectField,
    QuantityField,
    TextField,
    field_of,
)
from simulator.files.yaml import Node, Problems, parse_yaml, read_text
from simulator.workload import DTYPES, ROLES, STACKS

SCHEMA_VERSION = 1
FUSIONS: tuple[str, ...] = ("qkv", "gate_up")
"""Projections that one GEMM may compute."""

PASSES: tuple[str, ...] = ("prefill", "decode")
_ENGINES = resources.files(__package__)
_PATH = re.compile(r"[/\\]|\.ya?ml$")


@dataclass(frozen=True)
class HostTime:
    """Time the host spends, s, and how far hosts differ: the standard deviation of its log."""

    value: Annotated[float, QuantityField("s", 0.0, 1.0)]
    log_sd: Annotated[float, NumberField(0, 3, "0.4")]
    source: str
    note: str = ""


@dataclass(frozen=True)
class Share:
    """A number without a unit."""

    value: Annotated[float, NumberField(0, 3, "0.65")]
    source: str
    note: str = ""


NOTHING = HostTime(0.0, 0.0, "")


@dataclass(frozen=True, repr=False)
class Engine(Displayed):
    """How a decoder is run. The default is kernels under a CUDA graph and nothing else.

    >>> load_engine("transformers").name, load_engine("hf").graph, load_engine("vllm").fuse
    ('hf', (), ('qkv', 'gate_up'))
    """

    name: str = "kernels"
    title: str = "kernels under a CUDA graph, nothing around them"
    aliases: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()  # whose kernels it runs, the most alike first
    fuse: tuple[str, ...] = ()  # of FUSIONS
    logits: str = "last"  # positions of a prefill that go through the head, or "all"
    graph: tuple[str, ...] = PASSES  # where no launch waits for the host
    cache: str = "paged"  # a decode step writes its own keys and values, or "copied": all of them, and heads repeated
    experts: str = "grouped"  # routed experts run together, or "looped": one by one, launches are those of each
    launches: Mapping[str, int] = field(default_factory=dict)  # kernels of an operator by role; 0: part of another
    gap: HostTime = NOTHING  # idle between two kernels of a graph
    each_pass: HostTime = NOTHING  # the host's, before the next pass can start
    each_sequence: HostTime = NOTHING  # of a decode step, the same
    quantize_fused: Share = Share(0.0, "")  # part of the quantising of activations that other kernels do on the way
    one_token: Share = Share(1.0, "")  # time of a GEMM of one token, in units of that of the kernels it borrows
    prefill_wait: Share = Share(0.0, "")  # other prompts' prefills a request waits for before its first token, a share
    own_code: Share = Share(1.0, "")  # what modelling code of a pruned model's own has lost beside
    log_sd: Share = Share(0.0, "")  # of what no operator explains, by pass: alike in all models
    apart_log_sd: Share = Share(0.0, "")  # the same, of each model by itself
    composed_log_sd: Share = Share(0.0, "")  # of an operator that several kernels put together: none was timed
    weight_only: tuple[str, ...] = ()  # formats of weights that its kernels read beside 16-bit activations
    sparse24: tuple[str, ...] = ()  # formats it has 2:4 kernels for
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    def _title(self) -> str:
        return f"{self.name}: {self.title}"

    @property
    def kernels(self) -> NDArray[np.float64]:
        """Kernels launched for one operator, by role code."""
        return np.array([self.launches.get(role, 1) for role in ROLES], dtype=np.float64)

    def in_graph(self, phase: str) -> bool:
        """Whether the kernels of a prefill or a decode step are launched as one."""
        return phase in self.graph


def list_engines() -> tuple[str, ...]:
    """Names of the shipped engines, sorted.

    >>> list_engines()
    ('compile', 'hf', 'reference', 'sglang', 'trtllm', 'vllm')
    """
    return tuple(sorted(f.name.removesuffix(".yaml") for f in _ENGINES.iterdir() if f.name.endswith(".yaml")))


def load_engine(name_or_path: str) -> Engine:
    """An engine by name, alias (case, blanks, dashes and underscores do not matter) or path of its YAML, whichever
    ``name_or_path`` is; "" for bare kernels.

    InputError for an unknown name, with the closest, or a bad file: its first problem as ``file:line:column: key:
    reason``.

    >>> load_engine("transformers")
    <Engine: hf: Hugging Face Transformers, eager>
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise InputError(f"engine: expected a name or a path, got {shown(name_or_path)}")
    name_or_path = os.fspath(name_or_path)
    if not name_or_path:
        return _KERNELS
    if _PATH.search(name_or_path):
        try:
            status = os.stat(name_or_path)
            stamp = (status.st_mtime_ns, status.st_size)
        except (OSError, ValueError):
            stamp = (-1, -1)
        return _load(name_or_path, stamp)
    names = _names()
    if _plain(name_or_path) not in names:
        raise unknown("engine", name_or_path, list_engines())
    return _load(names[_plain(name_or_path)], (0, 0))


def check_engine(path: str) -> list[str]:
    """All problems of an engine file, one line each: ``file:line:column: key: reason, what would be right``."""
    return _read(Path(path))[1].lines


def sparse24_engines() -> tuple[str, ...]:
    """Shipped engines that have 2:4 kernels."""
    return tuple(name for name in list_engines() if load_engine(name).sparse24)


_KERNELS = Engine()


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]+", "", name.strip().lower())


@lru_cache(maxsize=1)
def _names() -> Mapping[str, str]:
    """Plain names and aliases -> file. Reads one line of each file: parsing all would take too long."""
    found: dict[str, str] = {}
    for name in list_engines():
        path = str(_ENGINES / f"{name}.yaml")
        line = re.search(r"^aliases: *\[(.*)\] *$", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
        for alias in (name, *(a.strip(" \"'") for a in (line.group(1).split(",") if line else []))):
            found[_plain(alias)] = path
    return MappingProxyType(found)


@lru_cache(maxsize=32)
def _load(path: str, _stamp: tuple[int, int]) -> Engine:
    engine, problems = _read(Path(path))
    if engine is None:
        raise problems.error("engines")
    return engine


def _read(path: Path) -> tuple[Engine | None, Problems]:
    problems = Problems(str(path))
    text = read_text(path, problems)
    root = None if text is None else parse_yaml(text, problems)
    if root is None or len(problems):
        if not len(problems):
            start = f"an engine that starts with schema_version: {SCHEMA_VERSION}"
            problems.add(None, "file", f"is empty; expected {start}")
        return None, problems
    top = _kinds(root).read(root, "", problems)
    if len(problems):
        return None, problems
    host, more = top.get("host", {}), {key: top[key] for key in _PLAIN if key in top}
    times = {"each_pass": host.get("pass", NOTHING), "each_sequence": host.get("sequence", NOTHING)}
    return Engine(**more, **times, gap=host.get("gap", NOTHING), path=path), problems


_PLAIN = (
    "name", "title", "aliases", "stacks", "fuse", "logits", "graph", "cache", "launches", "quantize_fused", "one_token",
    "prefill_wait", "own_code", "experts",
    "log_sd", "apart_log_sd", "composed_log_sd", "weight_only", "sparse24", "notes", "sources",
)  # fmt: skip
_NAME = TextField((), "[a-z0-9][a-z0-9_.-]{0,63}", "a name of lower-case letters, digits, _ - and ., at most 64")


def _kinds(root: Node) -> ObjectField:
    """What a file must hold; sources are those it lists."""
    listed = root.entries["sources"][1].entries if "sources" in root.entries else {}

    def source(short: str) -> str:
        if short not in listed:
            raise ValueError(f"{short!r} is not listed under sources; add it there with a title and an address")
        return short

    def sourced(cls: type) -> FieldType:
        kinds = field_of(cls)
        required = {**kinds.required, "source": CheckedField(TextField(), source)}
        return ObjectField(required, kinds.optional, cls, "{value: ..., source: ...}")

    time, share = sourced(HostTime), sourced(Share)
    role = MapField(
        NumberField(0, 100, "7", whole=True),
        lambda name: "" if name in ROLES else f"unknown operator; expected one of {', '.join(ROLES)}",
    )
    top: dict[str, FieldType] = {
        "schema_version": NumberField(SCHEMA_VERSION, SCHEMA_VERSION, str(SCHEMA_VERSION), whole=True),
        "name": _NAME,
        "title": TextField(),
        "stacks": ListField(TextField(STACKS)),
        "sources": MapField(TextField()),
    }
    optional: dict[str, FieldType] = {
        "aliases": ListField(TextField()),
        "fuse": ListField(TextField(FUSIONS)),
        "logits": TextField(("last", "all")),
        "graph": ListField(TextField(PASSES)),
        "cache": TextField(("paged", "copied")),
        "experts": TextField(("grouped", "looped")),
        "launches": role,
        "host": ObjectField({}, {"pass": time, "sequence": time, "gap": time}),
        "quantize_fused": share,
        "one_token": share,
        "prefill_wait": share,
        "own_code": share,
        "log_sd": share,
        "apart_log_sd": share,
        "composed_log_sd": share,
        "weight_only": ListField(TextField(DTYPES)),
        "sparse24": ListField(TextField(DTYPES)),
        "notes": ListField(TextField()),
    }
    return ObjectField(top, optional)
