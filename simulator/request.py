"""Declare the request of a prediction: each setting once, with its type, default, check, unit, help
and option.

The command line, functions with ``**settings``, grids, the page, records and workloads derive their
settings from :class:`Request`. Its constructor checks all settings except the names of models,
engines and links, which their loaders check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_args, get_type_hints

from simulator.arguments import LEVEL, SECONDS, Range, flag, number, shown, text, whole
from simulator.errors import InputError, one_line, unknown
from simulator.files.fields import Number, Scalar, Text, Truth
from simulator.files.yaml import Node
from simulator.names import CONNECTIONS, DTYPES, PARALLEL, PCIE, PHASES
from simulator.units import parse_count, parse_fraction, parse_number, parse_quantity

DEFAULT_ENGINE = "vllm"
"""The engine that most users deploy."""

DEFAULT_DTYPE = "bf16"
"""Format of the arithmetic that counts if neither the request nor the checkpoint states one."""

MAX_TOKENS = 2**31 - 1
"""Largest batch x sequence of a pass: row indices of kernels have 32 bits."""

# at 2 the busiest expert has 40,000 times the load of the least busy
SKEW = Range(0.0, 2.0, "a number from 0 (equal use of experts) to 2")
WATTS = Range(1.0, 1e5, "a power in watts from 1 to 1e5")
PREFIX = Range(0.0, float(MAX_TOKENS), "tokens, or a share of the prompt below 1")


class Value(Scalar):
    """Type of a setting: ``check`` accepts a value of Python, ``parse`` reads a text, ``value`` a
    node of YAML."""

    def check(self, name: str, value: Any) -> Any:
        raise NotImplementedError

    def parse(self, given: str) -> Any:
        return given


@dataclass(frozen=True)
class Name(Value):
    """A name: one of ``choices``, if there are any, or a text of the pattern ``other``."""

    choices: tuple[str, ...] = ()
    other: re.Pattern[str] | None = None

    def check(self, name: str, value: Any) -> str:
        known = isinstance(value, str) and (
            value in self.choices or (self.other and self.other.fullmatch(value))
        )
        if self.choices and not known:
            raise unknown(name, value, self.choices)
        return text(name, value)

    def value(self, node: Node) -> str:
        given = Text().value(node)
        return (
            given if self.other and self.other.fullmatch(given) else Text(self.choices).value(node)
        )


@dataclass(frozen=True)
class Whole(Value):
    """A whole number from ``low`` to ``high``; its text may end in k or M."""

    high: int
    example: str
    low: int = 1

    @property
    def number(self) -> Number:
        return Number(self.low, self.high, self.example, whole=True)

    def check(self, name: str, value: Any) -> int:
        found = whole(value)
        if found is None or not self.low <= found <= self.high:
            raise InputError(
                f"{name}: expected a whole number from {self.low} to {self.high}, got"
                f" {shown(value)}"
            )
        return found

    def parse(self, given: str) -> int:
        return parse_count(given)

    def value(self, node: Node) -> int:
        return int(self.number.value(node))


@dataclass(frozen=True)
class Real(Value):
    """A number in a range; ``parser`` reads its text."""

    right: Range
    example: str
    parser: Callable[[str], float]

    def check(self, name: str, value: Any) -> float:
        return number(name, value, self.right)

    def parse(self, given: str) -> float:
        return self.parser(given)

    def value(self, node: Node) -> float:
        return Number(self.right.low, self.right.high, self.example).value(node)


class Flag(Value):
    def check(self, name: str, value: Any) -> bool:
        return flag(name, value)

    def value(self, node: Node) -> bool:
        return Truth().value(node)


@dataclass(frozen=True)
class Setting(Scalar):
    """A field of the request: the values that it accepts, and its description."""

    accepts: Value
    metavar: str | None
    help: str
    option: str = ""  # names on the command line, separated by blanks; "": --name
    label: str = ""  # on the page; "": the name
    several: bool = False  # whether the command line takes several values
    default: Any = None
    name: str = ""

    def value(self, node: Node) -> Any:
        return self.accepts.value(node)

    def check(self, value: Any, name: str = "") -> Any:
        """Return a value, or None if it is the default; InputError names the setting, or
        ``name``."""
        return (
            None
            if value is None and self.default is None
            else self.accepts.check(name or self.name, value)
        )

    @property
    def flags(self) -> list[str]:
        return self.option.split() or [f"--{self.name.replace('_', '-')}"]

    @property
    def title(self) -> str:
        return self.label or self.name.replace("_", " ").capitalize()


def _prefix(given: str) -> float:
    """Parse tokens, or a share of a prompt below 1."""
    if "%" not in given and not given.strip().startswith(("0.", ".")):
        return float(parse_count(given))
    if (share := parse_fraction(given)) >= 1.0:  # as a number it would be tokens
        raise InputError(f"expected a share of the prompt below 100 %, got {one_line(given, 40)}")
    return share


def _seconds(given: str) -> float:
    return parse_quantity(given, "s")


def _watts(given: str) -> float:
    return parse_number(given.strip().removesuffix("W"))


_TOKENS, _FORMAT = Whole(MAX_TOKENS, "64"), Name(DTYPES)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Settings of a prediction: model, engine, phase, batch, length, number formats and devices.

    Functions such as :func:`simulator.predict` and :func:`simulator.table` take its fields as
    keywords; those with axes take one value or a list for each.

    Parameters
    ----------
    model : str or Model
        Name, path or shapes of the model.
    engine : str
        Name or path of the engine, with a version or generation if needed (``vllm@0.19``,
        ``vllm@v1``).
    phase : {"prefill", "decode", "generate", "serve"}
        Phase of inference. ``generate`` is a prefill and ``new_tokens`` decode steps; ``serve`` is
        the work during one request if ``batch`` requests are in flight.
    batch : int
        Sequences, or requests in flight; at least 1.
    seq : int
        Prompt tokens of each sequence, or cached positions in ``decode``; at least 1. It may exceed
        the length that the model was trained for.
    new_tokens : int
        Tokens that ``generate`` and ``serve`` decode, 1 to 1,000,000; no effect in other phases.
    cached_prefix : float
        Tokens of each prompt that the prefix cache holds, below ``seq``, or a share of the prompt
        in [0, 1); no effect in ``decode``.
    token_budget : int, optional
        Most prompt and decode tokens of one step. Default: the engine's on the GPU.
    dtype : str, optional
        Number format of activations and arithmetic, of :data:`simulator.codes.DTYPES`. Default:
        that of the checkpoint, else bf16.
    weight_dtype, kv_dtype : str, optional
        Number formats of weights (default: that of the checkpoint, else ``dtype``) and of the K/V
        cache (default: that of the checkpoint, else ``dtype``, or bf16 if ``dtype`` has fewer than
        16 bits).
    devices : int
        Number of devices, 1 to 100,000.
    link : str, optional
        Connection of the devices: nvswitch, xgmi, bridge, pcie or pcie-host, also with a generation
        and lanes (pcie4x8). Default: the usual connection of the hardware.
    parallel : {"tensor", "expert", "pipeline"}
        How devices share the model.
    skew : float, optional
        Load of routed experts, 0 to 2: 0 is uniform; 1 gives the busiest expert 200 times the load
        of the least busy. Default: that of measured routers
        (:data:`simulator.operators.experts.EXPERT_SKEW`).
    ideal : bool
        Exclude the work that pruning adds.
    level : float
        Level of the intervals, in (0, 1).
    dense_s : float, optional
        Measured time of the dense model's pass, s.
    power_limit : float, optional
        Power limit of each device, W, at most that of the datasheet, the default. Clocks fall, and
        memory keeps its speed.
    positions : int
        Tokens of each sequence that a decode step computes together; more than 1 when it checks
        drafted tokens.

    Raises
    ------
    InputError
        For a value out of range.

    Examples
    --------
    >>> Request(model="llama-3.1-8b", batch=8).phase
    'decode'
    """

    model: Annotated[Any, None] = ""
    engine: Annotated[
        str,
        Setting(
            Name(),
            "LIST",
            "Engines (see prunesim engines list), with @VERSION for older ones (vllm@0.10), or YAML"
            " files; a comma list.",
            several=True,
        ),
    ] = DEFAULT_ENGINE
    phase: Annotated[
        str,
        Setting(
            Name(PHASES),
            "LIST",
            "prefill, decode, generate, serve; a comma list for several.",
            several=True,
        ),
    ] = "decode"
    batch: Annotated[
        int,
        Setting(
            _TOKENS,
            "LIST",
            "Sequences in a batch: a list, or a range such as 1:64 (powers of two).",
            several=True,
        ),
    ] = 1
    seq: Annotated[
        int,
        Setting(
            _TOKENS,
            "LIST",
            "Prompt tokens (prefill) or cached positions (decode): a list, or a range (512:32k).",
            several=True,
            label="Sequence",
        ),
    ] = 2048
    new_tokens: Annotated[
        int,
        Setting(
            Whole(1_000_000, "128", low=0),
            "N",
            "Tokens decoded after the prompt, in generate and serve.",
        ),
    ] = 128
    cached_prefix: Annotated[
        float,
        Setting(
            Real(PREFIX, "512", _prefix),
            "N",
            "Tokens of each prompt in the prefix cache, or a share of the prompt (25%).",
        ),
    ] = 0.0
    token_budget: Annotated[
        int | None,
        Setting(
            Whole(MAX_TOKENS, "8192"),
            "N",
            "Most tokens of a step. Default: the engine's on the GPU (8192 in vLLM).",
        ),
    ] = None
    dtype: Annotated[
        str | None,
        Setting(
            _FORMAT,
            "LIST",
            "Formats of weights, activations and arithmetic: bf16,fp8 (W8A8); of a list, the first"
            " is the dense model's. Default: the checkpoint's, else bf16.",
            several=True,
            label="Arithmetic",
        ),
    ] = None
    weight_dtype: Annotated[
        str | None,
        Setting(
            _FORMAT,
            "LIST",
            "Formats of stored weights alone, with arithmetic in --dtype: bf16,int8,int4 (W8A16,"
            " W4A16). Default: the checkpoint's, else --dtype.",
            several=True,
            label="Weights",
        ),
    ] = None
    kv_dtype: Annotated[
        str | None,
        Setting(
            _FORMAT,
            "LIST",
            "Formats of the K/V cache. Default: the checkpoint's, else --dtype, or bf16 below 16"
            " bits.",
            several=True,
            label="K/V cache",
        ),
    ] = None
    devices: Annotated[
        int,
        Setting(
            Whole(100_000, "2"),
            "LIST",
            "Numbers of devices that share the model: 2,4,8.",
            "--devices --tp",
            several=True,
        ),
    ] = 1
    link: Annotated[
        str | None,
        Setting(
            Name(CONNECTIONS, PCIE),
            "NAME",
            "What joins the devices: nvswitch, xgmi, bridge, pcie, pcie-host; pcie4x8 and so on."
            " Default: the hardware's.",
        ),
    ] = None
    parallel: Annotated[
        str,
        Setting(Name(PARALLEL), "NAME", "How devices share the model: tensor, expert or pipeline."),
    ] = "tensor"
    skew: Annotated[
        float | None,
        Setting(
            Real(SKEW, "0.8", parse_number),
            "X",
            "Load of routed experts. 0: uniform; 1: busiest expert has 200 times the load of the"
            " least busy.",
        ),
    ] = None
    ideal: Annotated[
        bool,
        Setting(
            Flag(), None, "Exclude the work that pruning adds (routers, gathers): an upper bound."
        ),
    ] = False
    level: Annotated[
        float, Setting(Real(LEVEL, "0.9", parse_fraction), "P", "Level of the intervals.")
    ] = 0.9
    dense_s: Annotated[
        float | None,
        Setting(
            Real(SECONDS, "0.02", _seconds),
            "TIME",
            "Measured time of the dense model in this request, such as 18.6ms.",
            "--dense-time",
            "Measured dense time",
        ),
    ] = None
    power_limit: Annotated[
        float | None,
        Setting(
            Real(WATTS, "450", _watts),
            "WATTS",
            "Power limit of each device, such as 450. Default: the datasheet's.",
        ),
    ] = None
    positions: Annotated[int, None] = 1

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, setting.check(getattr(self, name)))
        if not self.new_tokens and self.phase in ("generate", "serve"):
            raise InputError(f"new_tokens: expected at least 1 for phase {self.phase}, got 0")
        if self.batch * self.seq > MAX_TOKENS and self.phase != "decode":
            raise InputError(
                f"batch {self.batch} x seq {self.seq}: expected at most {MAX_TOKENS} tokens in a"
                " pass"
            )

    def with_model(self, model: Any, ideal: bool) -> Request:
        """Return the request of another loaded model, with or without ``ideal`` sizes; the other
        settings were checked before."""
        request = object.__new__(Request)
        vars(request).update(vars(self), model=model, ideal=ideal)
        return request

    @property
    def given(self) -> dict[str, Any]:
        """Settings other than defaults, without the model, as keywords of functions with
        ``**settings``."""
        return {
            name: value
            for name, s in SETTINGS.items()
            if (value := getattr(self, name)) != s.default
        }


def known(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return keywords of :class:`Request`; InputError for a name that is not one."""
    for name in settings.keys() - Request.__dataclass_fields__.keys():
        raise unknown("setting", name, SETTINGS)
    return settings


def _settings() -> dict[str, Setting]:
    hints, out = get_type_hints(Request, include_extras=True), {}
    for one in fields(Request):
        if setting := get_args(hints[one.name])[-1]:
            out[one.name] = Setting(**{**vars(setting), "default": one.default, "name": one.name})
    return out


SETTINGS: Mapping[str, Setting] = _settings()
"""Settings of a request by name, without the model."""


@dataclass(frozen=True)
class Applied:
    family: str
    sparsity: float  # requested: a scalar, or the mean over projections or layers
    realised: float  # after rounding
    # arguments of a dynamic family, to apply it again after static pruning
    step: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What a workload was made from: the values that follow from request, model and engine, and the
    pruning steps.

    Prefix and token budget are numbers of tokens (0: none, or no limit), ``parallel`` is "none" on
    one device, and ``new_tokens`` is 0 where none are decoded.
    """

    model: str = ""  # its name
    engine: str = ""  # "": bare kernels
    phase: str = "decode"
    batch: int = 1
    seq: int = 1
    new_tokens: int = 0
    cached_prefix: float = 0
    token_budget: int = 0
    # number formats; weights and cache of a workload of rows: "", see its columns
    dtype: str = DEFAULT_DTYPE
    weight_dtype: str = ""
    kv_dtype: str = ""
    devices: int = 1
    link: str = ""
    parallel: str = "none"
    skew: float = 0.0
    positions: int = 1
    applied: tuple[Applied, ...] = ()
    # Model, with the changes of static pruning; None for a workload of rows
    config: Any = field(default=None, compare=False, repr=False)
    # Request that the workload answers; its model is the dense one
    request: Any = field(default=None, compare=False, repr=False)

    @property
    def asked(self) -> Request:
        """The request, or one without a model for a workload of rows."""
        if isinstance(self.request, Request):
            return self.request
        return Request(phase=self.phase, batch=self.batch, seq=self.seq)


NO_REQUEST = Lowered()
"""The request of a workload that was made from rows or columns."""
