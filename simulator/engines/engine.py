"""Engines as data: what a serving stack fuses, launches and spends on the host, each value with its
source.

Use :func:`load_engine` with a name, an alias or the path of your own YAML file;
:func:`check_engine` lists all problems of a file. An engine describes no GPU. It names the software
stacks whose kernels it runs, and a hardware profile has the fitted sections of these stacks
(``HardwareProfile.serving``). Releases that differ are generations of one engine
(:class:`Generation`): ``load_engine("vllm@0.19")``.

The annotations of the dataclasses are the schema of the file.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import shown
from simulator.codes import DTYPE_BYTES, DTYPES, ROLES, STACKS, dtype_code
from simulator.display import Displayed
from simulator.errors import InputError, unknown
from simulator.files.fields import (
    Flag,
    Keys,
    Map,
    Number,
    Quantity,
    SourceName,
    String,
    Strings,
    Text,
    read,
)
from simulator.files.read import stamp
from simulator.files.yaml import Node, Problems, aliases_of, parse_yaml, read_text

SCHEMA_VERSION = 1
FUSIONS: tuple[str, ...] = ("qkv", "gate_up")
"""Groups of projections that one GEMM can compute."""
INPUTS: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
"""Products by the kernel that writes their input: norm, attention, norm, activation of the MLP."""
PASSES: tuple[str, ...] = ("prefill", "decode")

_FOLDER = Path(__file__).parent
_PATH = re.compile(r"[/\\]|\.ya?ml$")
_NAME = Text(
    (), "[a-z0-9][a-z0-9_.-]{0,63}", "a name of lower-case letters, digits, _ - and ., at most 64"
)
_COUNT = 2**31 - 1
_Seconds = Annotated[float, Quantity("s", 0.0, 1.0)]
_Ratio = Annotated[float, Number(0, 3, "0.1")]
_Count = Annotated[int, Number(1, _COUNT, "8", whole=True)]
_Rows = Annotated[int, Number(1, 1024, "64", whole=True)]

_VERSION = re.compile(r"(\d{1,6}(?:\.\d{1,6}){0,5})(?:[.+-]?[a-z][a-z0-9.+-]{0,30})?", re.ASCII)
SINCE = r"\d{1,6}(\.\d{1,6}){0,5}"
"""Pattern of the first version of a generation."""


@dataclass(frozen=True)
class Generation:
    """Releases of an engine from one version on."""

    name: str
    since: str  # first version, such as "0.14"
    title: str
    source: str
    # fields of the engine that differ
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)


def split(text: str) -> tuple[str, str]:
    """Return the name or path of an engine, and the version or generation after it ("" without
    one).

    >>> split("vllm@0.19"), split("vllm"), split("engines@home/mine.yaml"), split("mine.yaml@0.2")
    (('vllm', '0.19'), ('vllm', ''), ('engines@home/mine.yaml', ''), ('mine.yaml', '0.2'))
    """
    name, _, wanted = text.rpartition("@")
    if not name or not wanted.strip() or re.search(r"[/\\]|\.ya?ml$", wanted):
        return text, ""
    return name, wanted.strip().lower()


def numbers(version: str) -> tuple[int, ...] | None:
    """Return the numbers of a version, or None for other text. Suffixes are ignored: release
    candidates and post-releases have the features of their release.

    >>> numbers("0.5.6.post2"), numbers("1.0.0rc3"), numbers("0.19.1+cu129"), numbers("next")
    ((0, 5, 6), (1, 0, 0), (0, 19, 1), None)
    """
    found = _VERSION.fullmatch(version)
    return tuple(int(part) for part in found.group(1).split(".")) if found else None


def selected(engine: str, generations: Sequence[Generation], wanted: str) -> Generation:
    """Return the generation with a name, or the newest generation up to a version; InputError for
    other text."""
    if not generations:
        raise InputError(
            f"engine '{engine}@{wanted}': {engine} has no generations; expected {engine}"
        )
    for generation in generations:
        if generation.name == wanted:
            return generation
    version = numbers(wanted) or ()
    since = [one for one in generations if reached(version, one.since)]
    newest = numbers(generations[-1].since) or ()
    # neither an empty version nor one beyond the next major version exists
    if not since or not any(version) or version[0] > newest[0] + 1:
        names = ", ".join(f"{g.name} (from {g.since})" for g in generations)
        example = f"a version such as {generations[-1].since}"
        raise InputError(
            f"engine '{engine}@{wanted[:40]}': expected {example}, or a generation: {names}"
        )
    return since[-1]


def reached(version: tuple[int, ...], since: str) -> bool:
    """Return whether a version is not before another.

    >>> reached((0, 8), "0.8.0"), reached((0, 10), "0.8"), reached((0, 7, 3), "0.8")
    (True, True, False)
    """
    first = numbers(since) or ()
    width = max(len(version), len(first))
    return version + (0,) * (width - len(version)) >= first + (0,) * (width - len(first))


FEATURES: Mapping[str, str] = MappingProxyType(
    {
        "uniform": "layers of equal shapes, fewer or narrower than in the dense model",
        "heads": "query heads that do not add up to the hidden size",
        "odd_heads": "query heads that do not divide the hidden size",
        "groups": "query heads that are not a multiple of the key/value heads",
        "sublayers": "layers without attention or without an MLP",
        "layer_inner": "MLP widths that differ by layer",
        "layer_kv_heads": "key/value heads that differ by layer",
        "layer_heads": "query heads that differ by layer",
        "layer_experts": "experts that differ by layer",
        "expert_choice": "experts that a map, or a number per token, selects after the router",
        "linear": "a linear layer instead of attention or an MLP",
        "low_rank": "low-rank factors of weights",
        "residual_projections": "matrices in the residual stream (SliceGPT)",
        "routers": "routers that skip tokens, heads or channels",
        "custom_code": "modelling code in the repository of the model",
    }
)
"""Feature of a checkpoint -> its description."""

Formats = tuple[Annotated[str, Text(DTYPES)], ...]
_MULTIPLE = Number(1, 65536, "128", whole=True)
_Fraction = Annotated[float, Number(0, 1, "0.7")]


@dataclass(frozen=True)
class Loading:
    """Whether a stock engine loads checkpoints with a feature."""

    value: Flag
    source: SourceName
    how: String  # what config.json must state, or why the engine does not load the feature
    model_types: Strings = ()  # model types that can have the feature; none: all
    missing: Strings = ()  # model types that the engine has no class for
    backend: String = ""  # what may run these types instead
    # MLP widths that the checkpoint can state are multiples of this number
    multiple: Annotated[int, _MULTIPLE] = 1


@dataclass(frozen=True)
class Width:
    """Alignment of the kernels of a weight format: widths must be a multiple of a number of
    elements."""

    multiple: Annotated[int, _MULTIPLE]
    source: SourceName
    required: Flag = False  # whether the engine refuses other widths
    note: String = ""


LIBRARIES: tuple[str, ...] = ("cusparselt", "cutlass", "tensorrt", "marlin")
"""Libraries of 2:4 kernels. Marlin reads weights with fewer bits than activations, the others
compute in the weights' format."""


@dataclass(frozen=True)
class Sparse24:
    """2:4 kernels of one library in an engine."""

    formats: Formats  # number formats of the weights
    source: SourceName
    # the engine takes the fastest plan of the library for each shape; else one plan for all
    searched: Flag = True
    on: Strings = ()  # architectures with these kernels; none: all
    note: String = ""


@dataclass(frozen=True)
class DynamicKernels:
    how: String
    source: SourceName
    on: Strings = ()  # architectures with these kernels; none: all


@dataclass(frozen=True)
class Kernel:
    """A kernel of some architectures."""

    on: Strings
    source: SourceName
    note: String = ""


@dataclass(frozen=True)
class SinkAttention:
    """Attention of prompts with sinks: its time over that of the stack's kernel, which has none."""

    value: Annotated[float, Number(1, 100, "4")]
    on: Strings
    source: SourceName
    note: String = ""


@dataclass(frozen=True)
class TallTiles:
    """Kernels of early releases that compute one token as many rows, which fitted kernels do
    not."""

    on: String  # architecture
    # rows of the smallest tile of a GEMM that was not fitted
    gemm: _Rows
    decode: _Rows  # rows of a tile of decode attention
    decode_rate: Annotated[float, Number(0.01, 1, "0.85")]  # share of the datasheet's rate
    source: SourceName
    note: String = ""


@dataclass(frozen=True)
class HostTime:
    """Time of the host, s, and the standard deviation of its log between hosts."""

    value: _Seconds
    log_sd: _Ratio
    source: SourceName
    note: String = ""
    # factor on the host of a workstation's GPU
    workstation: Annotated[float, Number(0.01, 100, "6")] = 1.0

    def on(self, workstation: bool) -> float:
        return self.value * (self.workstation if workstation else 1.0)


@dataclass(frozen=True)
class Share:
    value: _Ratio
    source: SourceName
    sd: _Ratio = 0.0  # its standard deviation between users
    note: String = ""


@dataclass(frozen=True)
class Quantisation:
    inputs: tuple[Annotated[str, Text(INPUTS)], ...]
    source: SourceName
    note: String = ""


@dataclass(frozen=True)
class Correlation:
    """Correlation, over hosts, of the speeds of two kinds of host time."""

    value: Annotated[float, Number(0, 1, "0.5")]
    source: SourceName
    note: String = ""


@dataclass(frozen=True)
class HostBlock:
    """Block ``host`` of a file; its attributes are those of :class:`Behaviour`."""

    each_pass: HostTime | None = field(default=None, metadata={"key": "pass"})
    each_sequence: HostTime | None = field(default=None, metadata={"key": "sequence"})
    each_request: HostTime | None = field(default=None, metadata={"key": "request"})
    gap: HostTime | None = None
    host_correlation: Correlation | None = field(default=None, metadata={"key": "correlation"})


@dataclass(frozen=True)
class Captured:
    """Batch sizes of an engine's CUDA graphs; other batches are padded to the next of them."""

    sizes: tuple[_Count, ...]  # below ``multiple``
    multiple: _Count  # larger sizes are its multiples
    most: _Count  # the largest size
    source: SourceName

    def pads(self, batch: int) -> bool:
        return batch <= self.most and batch not in self.sizes and batch % self.multiple > 0


@dataclass(frozen=True)
class StepLimit:
    """Most tokens and sequences of one step on GPUs of at least some memory."""

    memory: Annotated[float, Quantity("B", 0.0, 1e15)]  # the limit applies from this memory on
    tokens: _Count
    sequences: _Count
    not_on: Strings = ()  # GPUs whose names contain one of these


@dataclass(frozen=True)
class Reserve:
    """Output tokens for which admission keeps room in the cache: all of the new request, and a
    share of those that running requests still lack. The share falls from ``first`` to ``least`` in
    ``steps`` decode steps, and starts again after a preemption."""

    first: _Fraction
    least: _Fraction
    steps: _Count
    most: _Count  # tokens that count per request
    source: SourceName


@dataclass(frozen=True)
class FrontEnd:
    """Work of an API server before the engine gets a request: HTTP and tokenising."""

    request: _Seconds  # per request
    token: _Seconds  # per prompt token
    log_sd: _Ratio  # between hosts
    source: SourceName
    note: String = ""


@dataclass(frozen=True)
class Sampler:
    """Time of a sampler that sorts the vocabulary for requests with top-p or top-k, s per output
    token and entry of the vocabulary."""

    value: Annotated[float, Quantity("s", 0.0, 1e-6)]
    log_sd: _Ratio
    source: SourceName
    note: String = ""


@dataclass(frozen=True)
class MixedDecodes:
    """Decode attention in steps that also compute prompts: its time over that of a decode step, per
    query head of a key/value head."""

    value: Annotated[float, Number(0, 1, "0.7")]
    on: String  # architecture
    source: SourceName
    note: String = ""


SERVER_FLAGS: tuple[str, ...] = ("chunked", "mixes", "prefix_cache", "asynchronous")
SERVER_NUMBERS: tuple[str, ...] = (
    *("tokens", "sequences", "block", "memory", "api_servers", "conservative"),
)
_SETS = Text((*SERVER_FLAGS, *(f"no {name}" for name in SERVER_FLAGS), *SERVER_NUMBERS))


@dataclass(frozen=True)
class Schedule:
    """How a server fills its steps: prompts that arrive while others decode are computed in the
    next step, up to a budget of tokens."""

    source: SourceName
    limits: tuple[StepLimit, ...]  # by rising memory; the last that applies counts
    chunked: Flag = False  # a prompt longer than the budget is computed in chunks
    decodes_count: Flag = False  # each decoding sequence takes one token of the budget
    mixes: Flag = False  # a step computes prompts and decodes; else waiting prompts run first
    prefix_cache: Flag = False  # prompts that begin alike are computed once
    # tokens of a block of the cache
    block: Annotated[int, Number(1, 65536, "16", whole=True)] = 16
    reserve: Reserve | None = None  # None: a request needs room for the prompt of its step alone
    front: FrontEnd | None = None
    sampler: Sampler | None = None  # None: sampling takes no time
    mixed_decodes: MixedDecodes | None = None  # None: as in a step of decodes alone
    # what the share ``memory`` of a server holds: weights, activations and cache, as a part of the
    # "device"; the cache alone, as a part of what is left "free"; or weights and cache ("static")
    share_of: Annotated[str, Text(("device", "free", "static"))] = "device"
    # option of the server -> the field of :class:`simulator.serving.server.Server` that it sets
    options: Map[Annotated[str, _SETS]] = field(default_factory=dict)
    # prompts that arrive in neighbouring steps are computed in one step while they have at most
    # this many tokens
    clustered: Annotated[int, Number(0, _COUNT, "1024", whole=True)] = 0
    note: String = ""  # on ``clustered``


NOTHING = HostTime(0.0, 0.0, "")


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Behaviour:
    """What a file states for all releases of an engine, or for one generation of them."""

    fuse: tuple[Annotated[str, Text(FUSIONS)], ...] = ()
    # positions of a prefill that the head computes
    logits: Annotated[str, Text(("last", "all"))] = "last"
    # passes that run as a CUDA graph, so no launch waits for the host
    graph: tuple[Annotated[str, Text(PASSES)], ...] = PASSES
    captured: Captured | None = None  # None: no batch is padded
    # "paged": a decode step writes only its own keys and values; "joined": it copies the cache;
    # "copied": it also repeats the cache for every query head
    cache: Annotated[str, Text(("paged", "joined", "copied"))] = "paged"
    # routed experts run together ("grouped"), or one by one: only the experts that tokens use, or
    # all
    experts: Annotated[str, Text(("grouped", "touched", "all"))] = "grouped"
    # kernels per operator, by role; 0: fused into another
    launches: Annotated[
        Mapping[str, Annotated[int, Number(0, 100, "7", whole=True)]], Keys("operator", ROLES)
    ] = field(default_factory=dict)
    # how a server fills its steps; None: a pass computes all prompts together
    schedule: Schedule | None = None
    # whether a server plans the next step while one runs
    asynchronous: Flag = False
    # how activations are converted by further kernels
    quantize: Quantisation = Quantisation(INPUTS, "")
    # time of a GEMM of one token over the time of its stack's kernel
    one_token: Share = Share(1.0, "")
    # share of the device's memory that a server takes for weights, cache, activations
    memory: Share = Share(1.0, "")
    # share of the other prompts' prefills that delays a request's first token
    prefill_wait: Share = Share(0.0, "")
    first_wait: Share = Share(0.0, "")  # the same in measured times to the first token, with queues
    # largest published slowdown from custom modelling code of a pruned model
    own_code: Share = Share(1.0, "")
    log_sd: Share = Share(0.0, "")  # unexplained error of a pass, the same for all models
    apart_log_sd: Share = Share(0.0, "")  # unexplained error of a pass, independent for each model
    # further error of unmeasured operators that consist of several kernels
    composed_log_sd: Share = Share(0.0, "")
    weight_only: Formats = ()  # formats of weights that its kernels read with 16-bit activations
    sparse24: Annotated[Mapping[str, Sparse24], Keys("library", LIBRARIES)] = field(
        default_factory=dict
    )
    tall_tiles: TallTiles | None = None  # None: as fitted
    # where experts in MXFP4 run in Marlin, the kernel of experts in int4
    marlin_mxfp4: Kernel = Kernel((), "")
    sink_attention: SinkAttention | None = None  # None: sinks take no time
    # dynamic pruning families with kernels
    dynamic: Map[DynamicKernels] = field(default_factory=dict)
    # by format; others: multiples of 16 bytes
    widths: Annotated[Mapping[str, Width], Keys("format", DTYPES)] = field(default_factory=dict)
    # by feature of a checkpoint; empty: not stated
    loads: Annotated[Mapping[str, Loading], Keys("feature", tuple(FEATURES))] = field(
        default_factory=dict
    )
    notes: Strings = ()


@dataclass(frozen=True, init=False, repr=False, eq=False, kw_only=True)
class _Release(Behaviour):
    name: Annotated[str, _NAME]
    since: Annotated[str, Text((), SINCE, 'a version in quotes, such as "0.14"')]
    title: String
    source: SourceName
    host: HostBlock = HostBlock()


@dataclass(frozen=True, init=False, repr=False, eq=False, kw_only=True)
class _File(Behaviour):
    schema_version: Annotated[
        int, Number(SCHEMA_VERSION, SCHEMA_VERSION, str(SCHEMA_VERSION), whole=True)
    ]
    name: Annotated[str, _NAME]
    title: String
    short_title: String = ""
    aliases: Strings = ()
    stacks: tuple[Annotated[str, Text(STACKS)], ...]
    sources: Map[String]
    host: HostBlock = HostBlock()
    generations: tuple[_Release, ...] = ()


@dataclass(frozen=True, repr=False, kw_only=True)
class Engine(Behaviour, Displayed):
    """How an engine runs a decoder; the default is bare kernels in a CUDA graph."""

    name: str = "kernels"
    title: str = "bare kernels in a CUDA graph"
    short_title: str = ""  # name in figures; the name if empty
    aliases: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()  # software stacks whose kernels it runs, the most similar first
    gap: HostTime = NOTHING  # idle time between two kernels of a graph
    each_pass: HostTime = NOTHING  # host time before the next pass can start
    # further host time per layer, where it was measured on the device
    each_layer: HostTime = NOTHING
    each_sequence: HostTime = NOTHING  # further host time per sequence of a decode step
    each_request: HostTime = NOTHING  # time of a server around the passes of a request
    # between the host time per pass and the other host time
    host_correlation: Correlation = Correlation(1.0, "")
    sources: Mapping[str, str] = field(default_factory=dict)
    generations: tuple[Generation, ...] = ()  # oldest first
    generation: str = ""  # name of the selected generation; "" without generations
    path: Path | None = None

    def __hash__(self) -> int:  # its mappings cannot be hashed
        return hash((self.name, self.path))

    def _title(self) -> str:
        return f"{self.name}: {self.title}"

    @cached_property
    def kernels(self) -> NDArray[np.float64]:
        """Kernels launched for one operator, by role code."""
        return np.array([self.launches.get(role, 1) for role in ROLES], dtype=np.float64)

    def serving(self, hw: Any, measured: bool = False) -> Any:
        """Return a device (``HardwareProfile``) with the kernels of the engine; ``measured``: on
        this machine."""
        tall = self.tall_tiles
        rows = (
            (tall.gemm, tall.decode, tall.decode_rate)
            if tall and tall.on == hw.architecture
            else ()
        )
        marlin = hw.architecture in self.marlin_mxfp4.on
        return hw.serving(self.stacks, measured, rows, marlin)

    def sparse24_kernels(
        self, dtype: str, weight_dtype: str, architecture: str = ""
    ) -> Sparse24 | None:
        """Return the 2:4 kernels for a format of activations and one of weights, on an architecture
        or ("") on any; None without such kernels.

        >>> compiled = load_engine("compile")
        >>> compiled.sparse24_kernels("bf16", "int4") is compiled.sparse24["marlin"]
        True
        """
        alone = DTYPE_BYTES[dtype_code(weight_dtype)] < DTYPE_BYTES[dtype_code(dtype)]
        for library, kernels in self.sparse24.items():
            runs = (weight_dtype if alone else dtype) in kernels.formats
            if (
                runs
                and alone == (library == "marlin")
                and (architecture in ("", *kernels.on) or not kernels.on)
            ):
                return kernels
        return None

    def limit(self, memory_bytes: float, device: str) -> StepLimit | None:
        """Return the most tokens and sequences of a step on a device; None without a limit.

        >>> vllm = load_engine("vllm")
        >>> [vllm.limit(8e10, device).tokens for device in ("a100_sxm_80gb", "h100_sxm")]
        [2048, 8192]
        """
        every = self.schedule.limits if self.schedule else ()
        on = [
            x
            for x in every
            if memory_bytes >= x.memory and not any(part in device for part in x.not_on)
        ]
        return on[-1] if on else None

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
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load_engine(name_or_path: str) -> Engine:
    """Load an engine.

    Parameters
    ----------
    name_or_path : str
        Name or alias of a shipped engine (case, blanks, dashes, dots and underscores do not
        matter), path of a YAML file, or "" for bare kernels in a CUDA graph. ``@`` and a version,
        or the name of a generation, select a generation: ``vllm@0.6``, ``vllm@v1``. Without it the
        engine is its newest generation, and its host times are more uncertain.

    Returns
    -------
    Engine
        How the engine runs a decoder. Its name includes the version, if one was given.

    Raises
    ------
    InputError
        If the name is unknown (the error lists the closest names), the engine has no such
        generation, or the file is invalid (the error is its first problem, ``file:line:column: key:
        reason``).

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
    path, wanted, shipped = _place(name_or_path)
    return _load(path, (0, 0) if shipped else stamp(path), wanted)


def check_engine(path: str) -> list[str]:
    """Return all problems of an engine file, one line each: ``file:line:column: key: reason, what
    would be right``."""
    return _read(Path(path))[1].lines


def sparse24_engines(
    dtype: str = "bf16", weight_dtype: str = "", architecture: str = ""
) -> tuple[str, ...]:
    """Return the shipped engines that have 2:4 kernels, see :meth:`Engine.sparse24_kernels`. An
    engine whose newest releases have no such kernels is replaced by its last generation with
    them."""

    def has(name: str) -> bool:
        return (
            load_engine(name).sparse24_kernels(dtype, weight_dtype or dtype, architecture)
            is not None
        )

    releases = (
        (name, *(f"{name}@{g.name}" for g in reversed(load_engine(name).generations)))
        for name in list_engines()
    )
    return tuple(found for names in releases if (found := next(filter(has, names), "")))


def sparsity_note(declared: str) -> str:
    """Return the pruning family of declared sparsity, and how weights with it are timed."""
    if declared == "unstructured":
        return (
            "unstructured: the declared zeros have no pattern that kernels use: timed as dense,"
            " without a speedup"
        )
    own = (
        f"timed as 2:4 in engines with such kernels ({', '.join(sparse24_engines())}), as dense in"
        " others"
    )
    return f"semi_structured: 2:4 is declared for plain weights: {own}"


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
def _place(name_or_path: str) -> tuple[str, str, bool]:
    """Return the file of an engine, the wanted generation, and whether the engine is shipped."""
    name, wanted = split(name_or_path)
    if _PATH.search(name):
        return name, wanted, False
    if _plain(name) not in _names():
        raise unknown("engine", name, list_engines())
    return _names()[_plain(name)], wanted, True


@lru_cache(maxsize=64)
def _load(path: str, stamped: tuple[int, int], wanted: str = "") -> Engine:
    if wanted:
        engine = _load(path, stamped)
        found = selected(engine.name, engine.generations, wanted)
        title = f"{engine.short_title or engine.name} {wanted}"
        return replace(_as_of(engine, found), name=f"{engine.name}@{wanted}", short_title=title)
    read, problems = _read(Path(path))
    if read is None:
        raise problems.error("engines")
    return read


def _as_of(engine: Engine, generation: Generation) -> Engine:
    return replace(engine, title=generation.title, generation=generation.name, **generation.values)


def _of_some_release(engine: Engine) -> Engine:
    """Return an engine whose release is not named: its newest generation, with host times that may
    also be those of the generation before. Two equally probable values have a standard deviation
    of half their distance."""
    newest, *before = (_as_of(engine, g) for g in engine.generations[:-3:-1])
    wider = {}
    for name in ("each_pass", "each_sequence") if before else ():
        value, earlier = (getattr(one, name).value for one in (newest, before[0]))
        if min(value, earlier) > 0.0:
            host = getattr(newest, name)
            log_sd = math.hypot(host.log_sd, 0.5 * math.log(earlier / value))
            wider[name] = replace(host, log_sd=log_sd)
    return replace(newest, **wider)


def _read(path: Path) -> tuple[Engine | None, Problems]:
    problems = Problems(str(path))
    text = read_text(path, problems)
    root = None if text is None else parse_yaml(text, problems)
    if root is None or len(problems):
        if not len(problems):
            start = f"an engine that starts with schema_version: {SCHEMA_VERSION}"
            problems.add(None, "file", f"is empty; expected {start}")
        return None, problems
    file = read(_File, root, problems)
    if file is None:
        return None, problems
    named = ("name", "title", "short_title", "aliases", "stacks", "sources")
    stated = {name: getattr(file, name) for name in named} | _stated(file, root)
    engine = Engine(**stated, path=path)
    if not file.generations:
        return engine, problems
    _check_generations(file.generations, root.at("generations"), problems)
    if len(problems):
        return None, problems
    generations = _generations(file.generations, root.at("generations").items, engine)
    return _of_some_release(replace(engine, generations=generations)), problems


def _check_generations(releases: Sequence[_Release], node: Node, problems: Problems) -> None:
    since = [numbers(release.since) or () for release in releases]
    for i in range(1, len(since)):
        if since[i] <= since[i - 1]:
            reason = "expected a later version than the one before"
            problems.add(node.items[i], f"generations.{i}", reason)
    if len({release.name for release in releases}) < len(since):
        problems.add(node, "generations", "expected generations with different names")


def _generations(
    releases: Sequence[_Release], nodes: Sequence[Node], engine: Engine
) -> tuple[Generation, ...]:
    """Return generations that each state all values in which they differ."""
    changes = [_stated(release, node) for release, node in zip(releases, nodes, strict=True)]
    for change in changes:
        if "launches" in change:
            change["launches"] = {**engine.launches, **change["launches"]}
    common = {name: getattr(engine, name) for change in changes for name in change}
    return tuple(
        Generation(r.name, r.since, r.title, r.source, {**common, **change})
        for r, change in zip(releases, changes, strict=True)
    )


def _stated(file: _File | _Release, node: Node) -> dict[str, Any]:
    """Return the fields of :class:`Engine` that a file, or a generation in it, states."""
    host = {name: value for name, value in vars(file.host).items() if value is not None}
    return {
        f.name: getattr(file, f.name) for f in fields(Behaviour) if f.name in node.entries
    } | host
