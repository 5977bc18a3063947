"""Engines as data: what a serving stack fuses, launches and spends on the host, each value with its source.

Use :func:`load_engine` with a name, an alias or the path of your own YAML file; :func:`check_engine` lists all problems
of a file. An engine describes no GPU. It names the software stacks whose kernels it runs, and a hardware profile has
the fitted sections of these stacks (``HardwareProfile.serving``). Releases that differ are generations of one engine
(:mod:`simulator.engines.generations`): ``load_engine("vllm@0.19")``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import shown
from simulator.display import Displayed
from simulator.engines import DEFAULT_ENGINE as DEFAULT_ENGINE
from simulator.engines.generations import SINCE, Generation, GenerationsField, selected, split
from simulator.engines.loading import FEATURES, LIBRARIES, DynamicKernels, Loading, Sparse24, Width
from simulator.engines.schedule import Schedule, StepLimit
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
from simulator.files.yaml import Node, Problems, aliases_of, parse_yaml, read_text
from simulator.workload import DTYPE_BYTES, DTYPES, ROLES, STACKS, dtype_code

SCHEMA_VERSION = 1
FUSIONS: tuple[str, ...] = ("qkv", "gate_up")
"""Groups of projections that one GEMM can compute."""
INPUTS: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
"""Products with activations of their own: outputs of a norm, of attention, of a norm, of the MLP's activation."""

PASSES: tuple[str, ...] = ("prefill", "decode")
_FOLDER = resources.files(__package__)
_PATH = re.compile(r"[/\\]|\.ya?ml$")


@dataclass(frozen=True)
class HostTime:
    """Time of the host, s, and the standard deviation of its log between hosts."""

    value: Annotated[float, QuantityField("s", 0.0, 1.0)]
    log_sd: Annotated[float, NumberField(0, 3, "0.4")]
    source: str
    note: str = ""


@dataclass(frozen=True)
class Share:
    """A number without a unit."""

    value: Annotated[float, NumberField(0, 3, "0.65")]
    source: str
    sd: Annotated[float, NumberField(0, 3, "0.1")] = 0.0  # its standard deviation between users
    note: str = ""


@dataclass(frozen=True)
class Quantisation:
    """Products in formats below 16 bits whose activations a kernel of its own converts; the kernel before the others
    writes their format."""

    inputs: Annotated[tuple[str, ...], ListField(TextField(INPUTS))]
    source: str
    note: str = ""


@dataclass(frozen=True)
class Correlation:
    """Correlation, over hosts, of the speeds of two kinds of host time."""

    value: Annotated[float, NumberField(0, 1, "0.5")]
    source: str
    note: str = ""


NOTHING = HostTime(0.0, 0.0, "")


@dataclass(frozen=True, repr=False)
class Engine(Displayed):
    """How an engine runs a decoder; the default is bare kernels in a CUDA graph.

    >>> load_engine("transformers").name, load_engine("hf").graph, load_engine("vllm").fuse
    ('hf', (), ('qkv', 'gate_up'))
    """

    name: str = "kernels"
    title: str = "bare kernels in a CUDA graph"
    short_title: str = ""  # name in figures; the name if empty
    aliases: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()  # software stacks whose kernels it runs, the most similar first
    fuse: tuple[str, ...] = ()  # of FUSIONS
    logits: str = "last"  # positions of a prefill that the head computes: "last" or "all"
    graph: tuple[str, ...] = PASSES  # passes that run as a CUDA graph, so no launch waits for the host
    cache: str = "paged"  # a decode step writes only its own keys and values; "copied": it copies the cache, and heads
    experts: str = "grouped"  # routed experts run together; one by one: "touched" (those that tokens use), or "all"
    launches: Mapping[str, int] = field(default_factory=dict)  # kernels per operator, by role; 0: fused into another
    schedule: Schedule | None = None  # how a server fills its steps; None: a pass computes all prompts together
    gap: HostTime = NOTHING  # idle time between two kernels of a graph
    each_pass: HostTime = NOTHING  # host time before the next pass can start
    each_sequence: HostTime = NOTHING  # further host time per sequence of a decode step
    host_correlation: Correlation = Correlation(1.0, "")  # of the host time per pass and the other host time
    quantize: Quantisation = Quantisation(INPUTS, "")  # of activations, by kernels of their own
    one_token: Share = Share(1.0, "")  # time of a GEMM of one token over the time of its stack's kernel
    memory: Share = Share(1.0, "")  # share of the device's memory that a server takes for weights, cache, activations
    prefill_wait: Share = Share(0.0, "")  # share of the other prompts' prefills that delays a request's first token
    first_wait_sd: Share = Share(0.0, "")  # spread of that share in measured times to the first token: queues count
    own_code: Share = Share(1.0, "")  # largest published slowdown from custom modelling code of a pruned model
    log_sd: Share = Share(0.0, "")  # unexplained error of a pass, the same for all models
    apart_log_sd: Share = Share(0.0, "")  # unexplained error of a pass, independent for each model
    composed_log_sd: Share = Share(0.0, "")  # further error of an operator of several kernels, which is not measured
    weight_only: tuple[str, ...] = ()  # formats of weights that its kernels read with 16-bit activations
    sparse24: Mapping[str, Sparse24] = field(default_factory=dict)  # 2:4 kernels by library
    dynamic: Mapping[str, DynamicKernels] = field(default_factory=dict)  # dynamic pruning families with kernels
    widths: Mapping[str, Width] = field(default_factory=dict)  # by format; others: multiples of 16 bytes
    loads: Mapping[str, Loading] = field(default_factory=dict)  # by feature of a checkpoint; empty: not stated
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    generations: tuple[Generation, ...] = ()  # oldest first
    generation: str = ""  # name of the one that this engine is; "" if it has none
    path: Path | None = None

    def _title(self) -> str:
        return f"{self.name}: {self.title}"

    @cached_property
    def kernels(self) -> NDArray[np.float64]:
        """Kernels launched for one operator, by role code."""
        return np.array([self.launches.get(role, 1) for role in ROLES], dtype=np.float64)

    def sparse24_kernels(self, dtype: str, weight_dtype: str, architecture: str = "") -> Sparse24 | None:
        """Return the 2:4 kernels for a format of activations and one of weights, on an architecture or ("") on any;
        None without such kernels.

        >>> load_engine("compile").sparse24_kernels("bf16", "int4") is load_engine("compile").sparse24["marlin"]
        True
        """
        alone = DTYPE_BYTES[dtype_code(weight_dtype)] < DTYPE_BYTES[dtype_code(dtype)]
        for library, kernels in self.sparse24.items():
            runs = (weight_dtype if alone else dtype) in kernels.formats
            if runs and alone == (library == "marlin") and (architecture in ("", *kernels.on) or not kernels.on):
                return kernels
        return None

    def limit(self, memory_bytes: float, device: str) -> StepLimit | None:
        """Return the most tokens and sequences of a step on a device; None without a limit.

        >>> [load_engine("vllm").limit(8e10, device).tokens for device in ("a100_sxm_80gb", "h100_sxm")]
        [2048, 8192]
        """
        return None if self.schedule is None else self.schedule.limit(memory_bytes, device)

    def in_graph(self, phase: str) -> bool:
        """Return whether a prefill or a decode step runs as one CUDA graph."""
        return phase in self.graph


def list_engines() -> tuple[str, ...]:
    """Return the names of the shipped engines.

    Returns
    -------
    tuple of str
        Names that :func:`simulator.load_engine` accepts, sorted.

    Examples
    --------
    >>> list_engines()
    ('compile', 'hf', 'reference', 'sglang', 'trtllm', 'vllm')
    """
    return tuple(sorted(f.name.removesuffix(".yaml") for f in _FOLDER.iterdir() if f.name.endswith(".yaml")))


def load_engine(name_or_path: str) -> Engine:
    """Load an engine.

    Parameters
    ----------
    name_or_path : str
        Name or alias of a shipped engine (case, blanks, dashes, dots and underscores do not matter), path of a YAML
        file, or "" for bare kernels in a CUDA graph. ``@`` and a version, or the name of a generation, select a
        generation: ``vllm@0.6``, ``vllm@v1``. Without it the engine is its newest generation.

    Returns
    -------
    Engine
        How the engine runs a decoder. Its name includes the version, if one was given.

    Raises
    ------
    InputError
        If the name is unknown (the error lists the closest names), the engine has no such generation, or the file is
        invalid (the error is its first problem, ``file:line:column: key: reason``).

    Examples
    --------
    >>> load_engine("transformers")
    <Engine: hf: Hugging Face Transformers from 5.0, eager>
    >>> load_engine("vllm@0.10.1").generation, load_engine("vllm").generation
    ('v1', 'async')
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise InputError(f"engine: expected a name or a path, got {shown(name_or_path)}")
    name_or_path = os.fspath(name_or_path)
    if not name_or_path:
        return _KERNELS
    name, wanted = split(name_or_path)
    if _PATH.search(name):
        try:
            status = os.stat(name)
            stamp = (status.st_mtime_ns, status.st_size)
        except (OSError, ValueError):
            stamp = (-1, -1)
        return _load(name, stamp, wanted)
    names = _names()
    if _plain(name) not in names:
        raise unknown("engine", name, list_engines())
    return _load(names[_plain(name)], (0, 0), wanted)


def check_engine(path: str) -> list[str]:
    """Return all problems of an engine file, one line each: ``file:line:column: key: reason, what would be right``."""
    return _read(Path(path))[1].lines


def sparse24_engines(dtype: str = "bf16", weight_dtype: str = "", architecture: str = "") -> tuple[str, ...]:
    """Return the shipped engines that have 2:4 kernels, see :meth:`Engine.sparse24_kernels`; of an engine whose newest
    releases have none, the last generation that has."""

    def has(name: str) -> bool:
        return load_engine(name).sparse24_kernels(dtype, weight_dtype or dtype, architecture) is not None

    releases = (
        (name, *(f"{name}@{g.name}" for g in reversed(load_engine(name).generations))) for name in list_engines()
    )
    return tuple(found for names in releases if (found := next(filter(has, names), "")))


_KERNELS = Engine()


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]+", "", name.strip().lower())


@lru_cache(maxsize=1)
def _names() -> Mapping[str, str]:
    """Return plain names and aliases -> file."""
    found: dict[str, str] = {}
    for name in list_engines():
        path = str(_FOLDER / f"{name}.yaml")
        found |= {_plain(alias): path for alias in (name, *aliases_of(Path(path)))}
    return MappingProxyType(found)


@lru_cache(maxsize=64)
def _load(path: str, stamp: tuple[int, int], wanted: str = "") -> Engine:
    if wanted:
        engine = _load(path, stamp)
        found = selected(engine.name, engine.generations, wanted)
        title = f"{engine.short_title or engine.name} {wanted}"
        return replace(_as_of(engine, found), name=f"{engine.name}@{wanted}", short_title=title)
    read, problems = _read(Path(path))
    if read is None:
        raise problems.error("engines")
    return read


def _as_of(engine: Engine, generation: Generation) -> Engine:
    """Return an engine as it is in one of its generations."""
    return replace(engine, title=generation.title, generation=generation.name, **generation.values)


def _read(path: Path) -> tuple[Engine | None, Problems]:
    problems = Problems(str(path))
    text = read_text(path, problems)
    root = None if text is None else parse_yaml(text, problems)
    if root is None or len(problems):
        if not len(problems):
            start = f"an engine that starts with schema_version: {SCHEMA_VERSION}"
            problems.add(None, "file", f"is empty; expected {start}")
        return None, problems
    top = dict(_engine_field(root).read(root, "", problems))
    if len(problems):
        return None, problems
    del top["schema_version"]
    listed = top.pop("generations", ())
    engine = Engine(**_flat(top), path=path)
    if not listed:
        return engine, problems
    kept = ("name", "since", "title", "source")
    changes = [_flat({name: value for name, value in one.items() if name not in kept}) for one in listed]
    for change in changes:
        if "launches" in change:
            change["launches"] = {**engine.launches, **change["launches"]}
    common = {name: getattr(engine, name) for change in changes for name in change}
    engine = replace(
        engine,
        generations=tuple(
            Generation(**{name: one[name] for name in kept}, values={**common, **change})
            for one, change in zip(listed, changes, strict=True)
        ),
    )
    return _as_of(engine, engine.generations[-1]), problems


_HOST: Mapping[str, str] = MappingProxyType(
    {"pass": "each_pass", "sequence": "each_sequence", "gap": "gap", "correlation": "host_correlation"}
)
"""Key of the host block -> field of :class:`Engine`."""


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file, or of a generation, as fields of :class:`Engine`."""
    out = {name: value for name, value in values.items() if name != "host"}
    return out | {_HOST[key]: value for key, value in values.get("host", {}).items()}


_NAME = TextField((), "[a-z0-9][a-z0-9_.-]{0,63}", "a name of lower-case letters, digits, _ - and ., at most 64")


def _engine_field(root: Node) -> ObjectField:
    """Return the schema of an engine file, whose values name sources of the file."""
    sources = root.entries["sources"][1].entries if "sources" in root.entries else {}

    def listed(short: str) -> str:
        if short not in sources:
            raise ValueError(f"{short!r} is not listed under sources; add it there with a title and an address")
        return short

    def sourced(cls: type) -> FieldType:
        fields = field_of(cls)
        required = {**fields.required, "source": CheckedField(TextField(), listed)}
        return ObjectField(required, fields.optional, cls, f"{{{', '.join(f'{name}: ...' for name in required)}}}")

    def known(what: str, names: Iterable[str]) -> Callable[[str], str]:
        return lambda name: "" if name in names else f"unknown {what}; expected one of {', '.join(names)}"

    time, share = sourced(HostTime), sourced(Share)
    required: dict[str, FieldType] = {
        "schema_version": NumberField(SCHEMA_VERSION, SCHEMA_VERSION, str(SCHEMA_VERSION), whole=True),
        "name": _NAME,
        "title": TextField(),
        "stacks": ListField(TextField(STACKS)),
        "sources": MapField(TextField()),
    }
    optional: dict[str, FieldType] = {
        "short_title": TextField(),
        "aliases": ListField(TextField()),
        "fuse": ListField(TextField(FUSIONS)),
        "logits": TextField(("last", "all")),
        "graph": ListField(TextField(PASSES)),
        "cache": TextField(("paged", "copied")),
        "experts": TextField(("grouped", "touched", "all")),
        "launches": MapField(NumberField(0, 100, "7", whole=True), known("operator", ROLES)),
        "host": ObjectField({}, {"pass": time, "sequence": time, "gap": time, "correlation": sourced(Correlation)}),
        "schedule": sourced(Schedule),
        "quantize": sourced(Quantisation),
        **dict.fromkeys(("one_token", "memory", "prefill_wait", "first_wait_sd", "own_code"), share),
        **dict.fromkeys(("log_sd", "apart_log_sd", "composed_log_sd"), share),
        "weight_only": ListField(TextField(DTYPES)),
        "sparse24": MapField(sourced(Sparse24), known("library", LIBRARIES)),
        "dynamic": MapField(sourced(DynamicKernels)),
        "widths": MapField(sourced(Width), known("format", DTYPES)),
        "loads": MapField(sourced(Loading), known("feature", FEATURES)),
        "notes": ListField(TextField()),
    }
    own = ("short_title", "aliases")  # a generation has none of its own
    generation = ObjectField(
        {
            "name": _NAME,
            "since": TextField((), SINCE, 'a version in quotes, such as "0.14"'),
            "title": TextField(),
            "source": CheckedField(TextField(), listed),
        },
        {name: found for name, found in optional.items() if name not in own},
    )
    return ObjectField(required, {**optional, "generations": GenerationsField(generation)})
