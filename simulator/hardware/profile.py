"""Describe a device as data: datasheet facts with their sources, fitted sections, and links to
other devices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from simulator.arguments import COUNT, Range, number
from simulator.arrays import FloatArray
from simulator.codes import DTYPES, STACKS
from simulator.display import Displayed, as_plain, by_column
from simulator.errors import InputError, unknown
from simulator.files.fields import (
    BAD,
    Keyed,
    Keys,
    Number,
    Object,
    Quantity,
    Quoted,
    Text,
    TreeReader,
)
from simulator.files.yaml import Node
from simulator.hardware.arrays import ARRAY_NAME, FILE_NAME
from simulator.names import CONNECTIONS, PCIE
from simulator.operators import CONSTANTS, OPERATORS
from simulator.operators.attention import DECODE_KERNELS
from simulator.operators.base import ENGINE_STACK, OTHER_STACK, SAME_STACK, FittedValues, Link, Rate
from simulator.units import rate, size

ANY_DTYPE: tuple[str, ...] = ("runtime", "power", "collective")
"""Operators whose section is the same for all number formats; its dtype is "*"."""

SECTION_OF: Mapping[tuple[str, str], str] = MappingProxyType(
    {("gemm", "vllm"): "sglang", ("experts", "vllm"): "trtllm", ("experts", "sglang"): "trtllm"}
)
"""Operator and stack whose section runs of engines contradict -> stack whose section is used
instead.

vLLM's GEMMs were timed on inputs that are not random, which take less power, so large products are
5 to 16 % too fast; SGLang calls the same libraries. Servers do not use the settings with which
experts of vLLM and SGLang were timed: Qwen3-235B in SGLang is predicted 20 % too fast with SGLang's
experts, 7 % with TensorRT-LLM's (calibration/evidence/measurements/serving.csv, H200). Experts on
other architectures than :data:`EXPERTS_ON` stay."""
EXPERTS_ON = ("ampere", "hopper")
_INT4_EXPERTS = ("experts", "int4_wo")

MARLIN = ("vllm", "sglang")
"""Stacks whose weight-only GEMMs are Marlin's (marlin_utils.py of vLLM and SGLang). TensorRT-LLM's
take up to twice the time with 8 to 64 tokens on an A100."""

_ATTENTION = ("attention_prefill", "attention_decode", "mla_prefill", "mla_decode")
HELD_OUT: Mapping[str, str] = MappingProxyType(
    {"gemm": "(n, k) of GEMMs", **dict.fromkeys(_ATTENTION, "heads or lengths of attention")}
    | {
        "elementwise": "sizes of tensors",
        "collective": "sizes of messages",
        "experts": "models with experts",
        "power": "models",
    }
)
"""Sizes that no held-out row has in common with the rows of its fit, by operator."""

# lowest, highest value
LIMITS = {"section_scale": (0.01, 10.0), "accuracy": (-1e9, 1e9), "std_error": (0.0, 1e30)}


class _InRange(Number):
    """The value of a constant of an operator; the path names constant and operator."""

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        found, known = super().read(node, path, reader), CONSTANTS[path[1]][path[-2]]
        if found is BAD or known.low <= found <= known.high:
            return found
        return reader.wrong(
            node, path, f"expected a number from {known.low:g} to {known.high:g}, got {node}"
        )


@dataclass(frozen=True)
class Fitted:
    """Value of a constant; its status is "fitted", "fixed", "inherited" or "default"."""

    value: Annotated[float, _InRange(-1e300, 1e300, "0.81")]
    std_error: Annotated[float | None, Number(*LIMITS["std_error"], "0.01")] = None
    status: Annotated[str, Text(("fitted", "fixed", "inherited", "default"))] = "fitted"


class _Date(Text):
    def value(self, node: Node) -> str:
        found = super().value(node)
        try:
            if found != "unknown":
                datetime.fromisoformat(found)
        except ValueError:
            raise ValueError(f'expected a date such as "2026-01-31", got {node}') from None
        return found


SHA256 = Text((), "[0-9a-f]{64}", "64 lower-case hexadecimal digits", quote=True)


@dataclass(frozen=True)
class Provenance:
    """Data that a section was fitted on."""

    source: Quoted
    digest: Annotated[str, SHA256]
    date: Annotated[str, _Date(quote=True)]
    software: Quoted
    device: Quoted
    protocol: Quoted
    rows: Annotated[int, Number(0, 1e12, "400", whole=True)]
    inherited_from: Quoted = ""


@dataclass(frozen=True, eq=False, repr=False)
class Section(Displayed):
    """Fitted values of one operator and number format; ``section["name"]`` is the value of a
    constant."""

    constants: Mapping[str, Fitted]
    # read-only, such as a residual grid
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    # factor on correlated and independent errors with which intervals cover 90 % of the held-out
    # rows of its table
    section_scale: float = 1.0
    accuracy: Mapping[str, float] = field(default_factory=dict)  # errors on held-out shapes
    provenance: Provenance | None = None
    status: str = "default"  # or "calibrated" or "inherited"
    stack: str = ""  # software stack of its file; "" for the user's own calibration

    def __getitem__(self, name: str) -> float:
        return self.constants[name].value

    def _title(self) -> str:
        return (
            f"{len(self.constants)} constants,"
            f" {self.status}{f' for {self.stack}' if self.stack else ''}"
        )

    def _columns(self) -> Mapping[str, Any]:
        return by_column(
            [{"name": name, **as_plain(constant)} for name, constant in self.constants.items()]
        )


@dataclass(eq=False, repr=False)
class ArraysEntry:
    file: Annotated[
        str,
        Text(
            (), FILE_NAME.pattern, "the name of an .npz file next to the profile, without folders"
        ),
    ]
    sha256: Annotated[str, SHA256]
    names: tuple[
        Annotated[str, Text((), ARRAY_NAME.pattern, "an array name of letters, digits and _")], ...
    ]


class StoredArrays(Object):
    """Arrays of a section, which are fetched from their file."""

    def read(self, node: Node, path: Keyed, reader: TreeReader) -> Any:
        entry = super().read(node, path, reader)
        if entry is BAD:
            return BAD
        folder, fetch = reader.context["folder"], reader.context["fetch"]
        prefix = ".".join(path[:-1]).removeprefix("calibrated.")
        try:
            return fetch(folder / entry.file, entry.sha256, prefix, entry.names)
        except ValueError as error:
            return reader.wrong(node.at("file"), (*path, "file"), str(error))


_LogSd = Annotated[float, Number(0.0, 3.0, "0.2")]
_Added = Annotated[float, Quantity("s", 0.0, 1.0)]


@dataclass(frozen=True)
class Correction:
    """Measured time of an operator in an engine over its predicted time."""

    # for each of the numbers of tokens
    factors: tuple[Annotated[float, Number(0.01, 100.0, "0.8")], ...]
    log_sd: _LogSd  # scatter of the log over shapes


@dataclass(frozen=True)
class EngineTimes:
    """An engine as it ran dense models on this machine (``prunesim calibrate engine``)."""

    version: Quoted  # release of the engine
    source: Quoted
    each_pass: Annotated[float, Quantity("s", 0.0, 10.0)]  # host time per pass
    each_layer: _Added  # further host time per layer
    each_sequence: _Added  # further host time per sequence of a decode step
    host_log_sd: _LogSd
    # rising: tokens of a pass
    tokens: tuple[Annotated[int, Number(1, 2**31, "8", whole=True)], ...]
    operators: Annotated[
        Mapping[str, Correction], Keys("operator", tuple(one.name for one in OPERATORS))
    ]

    def __post_init__(self) -> None:
        if not self.tokens or list(self.tokens) != sorted(set(self.tokens)):
            raise InputError(f"tokens: expected rising numbers, got {self.tokens}")
        for name, one in self.operators.items():
            if len(one.factors) != len(self.tokens):
                raise InputError(
                    f"operators.{name}.factors: expected {len(self.tokens)} numbers, one per number"
                    " of tokens"
                )

    def factor(self, operator: str, tokens: FloatArray) -> FloatArray:
        """Return the factor on the time of an operator, between the measured numbers of tokens on a
        log scale."""
        at, known = np.log2(np.maximum(tokens, 1.0)), np.log2(self.tokens)
        return np.exp(np.interp(at, known, np.log(self.operators[operator].factors)))


Sections = Mapping[tuple[str, str], Section]  # by operator and number format


def section_row(name: str, operator: str, dtype: str, section: Section) -> dict[str, Any]:
    """Return a section as plain values, with its origin in a few words."""
    about, origin = section.provenance, ""
    if about:
        other = about.inherited_from.removeprefix(f"{name} {section.stack}")
        origin = f"as {other}" if other else about.software
    return {
        "operator": operator,
        "dtype": dtype,
        "stack": section.stack,
        "status": section.status,
        "constants": section.constants,
        "accuracy": section.accuracy,
        "section_scale": section.section_scale,
        "rows": about.rows if about else 0,
        "origin": origin,
    }


@lru_cache(maxsize=64)
def default_section(operator: str, kind: str) -> Section:
    if operator not in CONSTANTS:
        raise unknown("operator", operator, CONSTANTS)
    values = {name: constant.default(kind) for name, constant in CONSTANTS[operator].items()}
    return Section(
        MappingProxyType({name: Fitted(value, None, "default") for name, value in values.items()})
    )


@lru_cache(maxsize=64)
def unfitted_section(operator: str, kind: str, tall_tiles: tuple[float, ...] = ()) -> Section:
    """Return the default section, with the known constants of a decode kernel."""
    section = default_section(operator, kind)
    tall = (
        {"tile_rows": tall_tiles[1], "e_tc": tall_tiles[2]}
        if tall_tiles
        else DECODE_KERNELS.get(kind, {})
    )
    known = tall if operator == "attention_decode" else {}
    constants = {name: Fitted(value, None, "default") for name, value in known.items()}
    return replace(section, constants=MappingProxyType({**section.constants, **constants}))


@lru_cache(maxsize=64)
def inherited(section: Section, origin: str) -> Section:
    provenance = section.provenance
    if provenance is not None:
        provenance = replace(provenance, inherited_from=provenance.inherited_from or origin)
    return replace(section, status="inherited", provenance=provenance)


ARCHITECTURES = (
    "volta",
    "turing",
    "ampere",
    "ada",
    "hopper",
    "blackwell",
    "blackwell_sm100",
    "cdna3",
    "cdna4",
    "cpu",
)
_TWINS = {"bf16": "fp16", "fp16": "bf16"}
_LIKE = {"mxfp4": "fp8", "mxfp6": "fp8"}
"""Format without measured GEMMs -> format of the same matrix cores whose constants it takes."""
_POSITIVE = Range(1e-30, 1e30, "a finite number above 0")
_QUANTITIES = (
    "boost_clock_hz",
    "max_clock_hz",
    "memory_bytes",
    "bandwidth_bytes_per_s",
    "l2_bytes",
    "power_w",
)


@dataclass(frozen=True, eq=False, repr=False)
class HardwareProfile(Displayed):
    """A device: datasheet facts in SI units with their sources, and fitted sections.

    Make one with :func:`simulator.load_hardware`. ``dataclasses.replace`` returns a copy with other
    facts.

    Parameters
    ----------
    name, title, vendor : str
        Name of the profile, name as the vendor writes it, and vendor.
    architecture : str
        One of :data:`ARCHITECTURES`; its defaults are used where no section was fitted.
    aliases : tuple of str
        Further names that :func:`simulator.load_hardware` accepts.
    rates : mapping of str to Rate
        Datasheet rate, FLOP/s, of each number format.
    sm_count : int
        Streaming multiprocessors, compute units, or cores.
    boost_clock_hz, max_clock_hz : float
        Clock of the datasheet rates, and highest clock that the driver allows, Hz.
    memory_bytes, bandwidth_bytes_per_s, l2_bytes, power_w : float
        Memory, its bandwidth, last shared cache (bytes, B/s, bytes) and power limit (W); above 0.
    link : Link, optional
        Connection to other devices of the same kind: the usual one, or of :meth:`over`.
    bridge : Link, optional
        NVLink bridge between two devices, if the GPU has connectors for one.
    sources, notes : mapping of str to str
        Source of each fact, and remarks, by datasheet key ("sm_count", "rates.bf16",
        "link.latency").
    references : mapping of str to str
        Short names that the profile's file uses for its sources.
    sections : mapping of (str, str) to Section
        Fitted sections by operator and number format. :meth:`section` also uses fallbacks.
    stacks : mapping of str to mapping
        Sections of each software stack, the default stack first.
    stack : str
        Preferred stack, whose sections come first; "" for the user's own calibration, or if nothing
        was fitted.
    pinned : bool
        Whether the stack was selected by name, so engines do not change it.
    own_stack : str
        Stack that the user's own calibration measured; "" if it is unknown.
    engine_stack : str
        Stack whose kernels the engine runs, see :meth:`serving`.
    tall_tiles : tuple of float
        Rows of GEMMs, rows and rate of decode attention, if the engine's release computes more rows
        than fitted kernels.
    stacks_of : str
        Profile of a related GPU from which this profile inherits stacks.
    sibling : bool
        Whether that GPU has the same architecture and nearly as many SMs, so its fits count as fits
        of the device.
    same_stack : bool
        Whether the preferred stack is the user's own, which narrows the intervals.
    engines : mapping of str to EngineTimes
        Engines measured on the user's machine.
    verdict : str
        Reasons for which its calibration advised against it; "" for none.
    path : Path, optional
        File that the profile was read from.

    Raises
    ------
    InputError
        If a fact is not positive and finite.

    Examples
    --------
    >>> import simulator
    >>> hw = simulator.load_hardware("h100")
    >>> hw.sm_count, hw.rate("bf16").accumulate, round(hw.ridge_point("bf16"))
    (132, 'fp32', 295)
    """

    name: str
    title: str
    vendor: str
    architecture: str
    aliases: tuple[str, ...]
    rates: Mapping[str, Rate]
    sm_count: int
    boost_clock_hz: float
    max_clock_hz: float
    memory_bytes: float
    bandwidth_bytes_per_s: float
    l2_bytes: float
    power_w: float
    link: Link | None = None
    bridge: Link | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    sections: Sections = field(default_factory=dict)
    stacks: Mapping[str, Sections] = field(default_factory=dict)
    stack: str = ""
    pinned: bool = False
    own_stack: str = ""
    engine_stack: str = ""
    tall_tiles: tuple[float, ...] = ()
    stacks_of: str = ""
    sibling: bool = False
    same_stack: bool = False
    engines: Mapping[str, EngineTimes] = field(default_factory=dict)
    verdict: str = ""
    path: Path | None = None

    def __post_init__(self) -> None:
        number("sm_count", self.sm_count, COUNT)
        for name in _QUANTITIES:
            number(name, getattr(self, name), _POSITIVE)
        for dtype, facts in self.rates.items():
            number(f"rates[{dtype!r}]", facts.flop_per_s, _POSITIVE)

    @property
    def label(self) -> str:
        """Name, with "@stack" if the stack was selected by name; :func:`simulator.load_hardware`
        accepts that."""
        return f"{self.name}@{self.stack}" if self.pinned else self.name

    def _title(self) -> str:
        rates = (
            f"{name} {rate(r.flop_per_s, 'FLOP/s')}"
            for name, r in self.rates.items()
            if name in ("fp16", "bf16")
        )
        memory = f"{size(self.memory_bytes)} at {rate(self.bandwidth_bytes_per_s, 'B/s')}"
        stacks = ", ".join(stack or "itself" for stack in self.stacks) or "no stack"
        return (
            f"{self.label}: {self.title}, {self.architecture}, {memory}, {', '.join(rates)}; fitted"
            f" for {stacks}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return facts in SI units, their sources, and each fitted section without its arrays."""
        fitted = {
            key: None
            for stack in self.stacks.values()
            for key, s in stack.items()
            if s.status == "calibrated"
        }
        found = {
            **{
                name: getattr(self, name)
                for name in ("name", "title", "vendor", "architecture", "aliases")
            },
            "peak_flop_per_s": {dtype: r.flop_per_s for dtype, r in self.rates.items()},
            **{name: getattr(self, name) for name in ("sm_count", *_QUANTITIES, "link", "bridge")},
            "calibrated": [f"{operator} {dtype}".replace(" *", "") for operator, dtype in fitted],
            "stack": self.stack,
            "stacks": [stack for stack in self.stacks if stack],
            "stacks_of": self.stacks_of,
            "verdict": self.verdict,
            "engines": self.engines,
            "sources": self.sources,
            "sections": [
                section_row(self.name, *key, section) for key, section in self.sections.items()
            ],
        }
        return {name: as_plain(value) for name, value in found.items()}

    def on(self, stack: str) -> HardwareProfile:
        """Return the device with one stack selected for all engines; InputError for a stack that it
        does not have."""
        return self if self.pinned and stack == self.stack else _on(self, stack)

    def serving(
        self,
        stacks: tuple[str, ...],
        measured: bool = False,
        tall: tuple[float, ...] = (),
        marlin: bool = False,
    ) -> HardwareProfile:
        """Return the device with the sections of the first of an engine's ``stacks`` that the
        profile has.

        A stack that was selected by name, or the user's own calibration, stays. ``measured``: the
        engine was measured on this machine. ``tall``: see ``tall_tiles``. ``marlin``: experts in
        MXFP4 run in the kernel of experts in int4.
        """
        if not stacks or self.engine_stack:
            return self
        return _serving(self, stacks, measured, tall, marlin)

    def over(self, link: str) -> HardwareProfile:
        """Return the device joined to others by a ``link``, one of
        :data:`simulator.names.CONNECTIONS`.

        Fitted collectives of the usual connection are not used over another one. "" returns the
        profile itself.
        """
        return _over(self, link) if link else self

    def calibrated(self, sections: Sections, own_stack: str = "") -> HardwareProfile:
        """Return the device with the sections of the user's own calibration of ``own_stack``, or
        ("") of any."""
        sections = MappingProxyType(dict(sections))
        stacks = MappingProxyType({"": sections})
        same = not own_stack
        return replace(
            self, sections=sections, stacks=stacks, stack="", own_stack=own_stack, same_stack=same
        )

    def error_scales(self, section: FittedValues) -> tuple[float, float]:
        """Return two scales of a section's prior: of systematic errors, and of correlated and
        independent errors."""
        fitted = section.status == "calibrated" and section.stack == (self.stack or self.own_stack)
        # the user's own calibration of a stack is valid for engines that run the kernels of this
        # stack
        own = bool(self.own_stack) and not self.stack and self.engine_stack in ("", self.own_stack)
        if fitted and (self.same_stack or own):
            return SAME_STACK, section.section_scale
        # without an engine, every section counts as one of the engine's stack
        known = ("calibrated", "inherited") if self.sibling else ("calibrated",)
        engines = (
            section.status in known and section.stack == (self.engine_stack or section.stack) != ""
        )
        return ENGINE_STACK if engines else OTHER_STACK, max(section.section_scale, 1.0)

    def fitted_on(self, section: FittedValues) -> str:
        """Return the related GPU on which a section was fitted; "" for the device itself."""
        about = section.provenance if section.status == "inherited" else None
        origin = about.inherited_from.partition(" ")[0] if about else ""
        return "" if origin == self.name else origin

    @property
    def is_workstation(self) -> bool:
        """Whether the GPU is one of workstations and personal computers, whose hosts are other than
        a server's."""
        return "RTX" in self.title

    @property
    def own_link(self) -> bool:
        """Whether collectives over the device's link are the user's own measurements."""
        found = self.sections.get(("collective", "*"))
        return found is not None and found.status == "calibrated" and not found.stack

    @property
    def clock_headroom(self) -> float:
        """Highest clock over boost clock, at least 1: the largest ratio of a rate to its datasheet
        rate."""
        return self.max_clock_hz / self.boost_clock_hz

    def rate(self, dtype: str) -> Rate:
        """Return the datasheet rate of the number format ``dtype``; InputError if the device has no
        such arithmetic."""
        if dtype not in self.rates:
            wide = next((name for name in ("bf16", "fp16") if name in self.rates), "")
            # formats of weights alone that engines have kernels for
            alone = (
                f"; for {dtype} weights alone: --dtype {wide} (and --weight-dtype {dtype} if the"
                " checkpoint does not state it)"
            )
            raise InputError(
                f"{self.name} has no {dtype} arithmetic; it has {', '.join(self.rates)}"
                + (alone if dtype in ("fp8", "int8") and wide else "")
            )
        return self.rates[dtype]

    def peak_flop_per_s(self, dtype: str, sparse: bool = False) -> float:
        """Return the datasheet rate of ``dtype`` at boost clock, FLOP/s; ``sparse``: with 2:4
        operands.

        This rate times ``clock_headroom`` is a physical limit.
        """
        rate = self.rate(dtype)
        return rate.flop_per_s * (rate.sparse_factor if sparse else 1.0)

    @cached_property
    def flop_s(self) -> FloatArray:
        """Time of a FLOP at the datasheet rate by code of the number format, s; 0 for formats
        without arithmetic."""
        return np.array(
            [1.0 / self.rates[name].flop_per_s if name in self.rates else 0.0 for name in DTYPES]
        )

    def ridge_point(self, dtype: str) -> float:
        """Return the intensity, FLOP/byte, above which a datasheet roofline of ``dtype`` is
        compute-bound."""
        return self.peak_flop_per_s(dtype) / self.bandwidth_bytes_per_s

    def section(self, operator: str, dtype: str) -> Section:
        """Return the fitted values of one ``operator`` in the number format ``dtype``, else
        defaults.

        Without a fitted section, bf16 and fp16 are used for each other; GEMMs in mxfp4 and mxfp6
        have the constants of fp8 with the errors of defaults. A fit of a decode kernel
        with visible tiles (``tile_rows``) is not used for a release of an engine whose kernel is
        known to differ (``tall_tiles``), nor a fit of weight-only GEMMs of TensorRT-LLM for
        :data:`MARLIN`.
        """
        kind = self.link.defaults if operator == "collective" and self.link else self.architecture
        default = default_section(operator, kind)
        found = self.sections.get((operator, "*" if operator in ANY_DTYPE else dtype))
        twin = _TWINS.get(dtype, "")
        if (
            found is None
            and (operator, twin) in self.sections
            and self.rates.get(dtype) == self.rates.get(twin)
        ):
            found = inherited(self.sections[operator, twin], f"{self.name} {operator} {twin}")
        if found is None and operator == "gemm" and ("gemm", _LIKE.get(dtype, "")) in self.sections:
            like = self.sections["gemm", _LIKE[dtype]]
            # e_tc of an 8-bit fit includes narrow_step
            own = {**default.constants, **like.constants, "narrow_step": Fitted(1.0)}
            return Section(MappingProxyType(own))
        if found is None or self._runs_another(found, operator, dtype):
            return unfitted_section(operator, kind, self.tall_tiles)
        if found.constants.keys() >= default.constants.keys():
            return found
        return replace(found, constants=MappingProxyType({**default.constants, **found.constants}))

    @cached_property
    def beyond(self) -> HardwareProfile:
        """The device with the link that joins the pairs of its bridges."""
        return replace(self, link=self.link.beyond if self.link else None)

    def _runs_another(self, section: Section, operator: str, dtype: str) -> bool:
        """Return whether the engine's kernel is known to differ from the kernel of a fit."""
        if operator == "gemm" and dtype.endswith("_wo"):
            stack = self.stack if self.pinned else self.engine_stack or self.stack
            return stack in MARLIN and section.stack not in ("", *MARLIN)
        tiles = section.constants.get("tile_rows") if operator == "attention_decode" else None
        other = (
            not self.pinned and self.engine_stack and section.stack not in ("", self.engine_stack)
        )
        return bool(other and self.tall_tiles and tiles is not None and tiles.value > 0.0)


def preferring(
    profile: HardwareProfile, stacks: Mapping[str, Sections], *first: str
) -> HardwareProfile:
    """Return a profile with ``stacks``, one of which is preferred. The preferred stack is the first
    of ``first`` that exists, else the user's own calibration, else the first of :data:`STACKS`.
    Sections that it lacks are inherited from the other stacks, in that order. :data:`SECTION_OF`
    replaces some sections, unless the user selected the stack."""
    stacks = {name: stacks[name] for name in ("", *STACKS) if stacks.get(name)}
    if not stacks:
        return profile
    order = list(dict.fromkeys((*(name for name in first if name in stacks), *stacks)))
    sections = dict[tuple[str, str], Section]()
    for key in dict.fromkeys(key for name in order for key in stacks[name]):
        having = [name for name in order if key in stacks[name]]
        used, other = having[0], SECTION_OF.get((key[0], having[0]))
        kept = profile.pinned or (key[0] == "experts" and profile.architecture not in EXPERTS_ON)
        used = other if other in having and not kept else used
        origin = f"{profile.name} {used or 'own calibration'}"
        sections[key] = (
            stacks[used][key] if used == order[0] else inherited(stacks[used][key], origin)
        )
    return replace(
        profile,
        sections=MappingProxyType(sections),
        stacks=MappingProxyType(stacks),
        stack=order[0],
    )


@lru_cache(maxsize=64)
def _on(profile: HardwareProfile, stack: str) -> HardwareProfile:
    if stack not in profile.stacks:
        if not any(profile.stacks):
            raise InputError(
                f"{profile.name}: expected no stack, as nothing was fitted for one, got {stack!r}"
            )
        raise unknown(f"{profile.name}: stack", stack, filter(None, profile.stacks))
    return preferring(replace(profile, pinned=True), profile.stacks, stack)


@lru_cache(maxsize=64)
def _over(profile: HardwareProfile, name: str) -> HardwareProfile:
    link = named_link(name, profile.link, profile.bridge, profile.architecture, profile.name)
    if profile.link is not None and replace(profile.link, stated=True) == link:
        return replace(profile, link=link)

    def without(sections: Sections) -> Sections:
        return MappingProxyType(
            {key: section for key, section in sections.items() if key[0] != "collective"}
        )

    stacks = {stack: without(sections) for stack, sections in profile.stacks.items()}
    return replace(
        profile, link=link, sections=without(profile.sections), stacks=MappingProxyType(stacks)
    )


def with_section(profile: HardwareProfile, dtype: str, section: Section) -> HardwareProfile:
    return replace(profile, sections={**profile.sections, ("gemm", dtype): section})


@lru_cache(maxsize=64)
def _serving(
    profile: HardwareProfile,
    stacks: tuple[str, ...],
    measured: bool,
    tall: tuple[float, ...],
    marlin: bool,
) -> HardwareProfile:
    if not (profile.pinned or "" in profile.stacks):
        profile = preferring(profile, profile.stacks, *stacks)
        having = [name for name in stacks if _INT4_EXPERTS in profile.stacks.get(name, {})]
        if marlin and having:
            # engines share the code of this kernel, so the fit counts as one of the engine's stack
            kernel = replace(profile.stacks[having[0]][_INT4_EXPERTS], stack=stacks[0])
            sections = {**profile.sections, ("experts", "mxfp4_wo"): kernel}
            profile = replace(profile, sections=MappingProxyType(sections))
    # on a CPU, calibrations time the kernels of torch
    torch = profile.architecture != "cpu" or stacks[0] == "torch"
    same = measured or (profile.same_stack and torch)
    return replace(profile, engine_stack=stacks[0], tall_tiles=tall, same_stack=same)


LANE_BYTES_PER_S: Mapping[int, float] = MappingProxyType({3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9})
"""Rate of a PCIe lane in one direction by generation, B/s, as datasheets round it."""

GENERATIONS: Mapping[str, int] = MappingProxyType({"volta": 3, "turing": 3, "ampere": 4, "ada": 4})
"""PCIe generation of GPUs by architecture; 5 for all others."""

PEER_LATENCY_S, HOST_LATENCY_S = 1.6e-6, 3e-6
"""Time of a message step over PCIe, s. With peer access: an L40S (NCCL table of aiconfigurator-core
0.12.0). Without: a small all-reduce of 42 us and 14 ring steps on eight RTX 4090
(https://github.com/NVIDIA/nccl/issues/1530)."""


def named_link(
    name: str, link: Link | None, bridge: Link | None, architecture: str, device: str
) -> Link:
    """Return the connection of a GPU that ``--link`` names (see docs/model.md, Collectives);
    InputError for NVLink that the GPU does not have. A PCIe name without a generation means the
    GPU's own, without lanes 16."""
    if link is not None and name in (link.connection, link.name):
        return replace(link, stated=True)
    if bridge is not None and name == "bridge":
        return replace(_joined(bridge, link, architecture), stated=True)
    if found := PCIE.fullmatch(name):
        return replace(_pcie(found, link, architecture), stated=True)
    if name not in CONNECTIONS:
        raise unknown("link", name, CONNECTIONS)
    known = ", ".join(link_choices(link, bridge))
    raise InputError(f"link {name}: {device} has no such connection; expected one of {known}")


def link_choices(link: Link | None, bridge: Link | None) -> tuple[str, ...]:
    """Return the names of connections that :func:`named_link` accepts for a GPU, the usual one
    first."""
    found = [
        *([link.connection] if link else []),
        *(["bridge"] if bridge else []),
        "pcie",
        "pcie-host",
    ]
    return tuple(dict.fromkeys(found))


def _joined(bridge: Link, link: Link | None, architecture: str) -> Link:
    """Return bridges between pairs, which communicate over the PCIe link of the GPU."""
    pcie = (
        link
        if link and link.family == "pcie"
        else _pcie(PCIE.fullmatch("pcie"), link, architecture)
    )
    return replace(bridge, connection="bridge", max_devices=2, beyond=replace(pcie, group=2))


def _pcie(name: re.Match[str] | None, link: Link | None, architecture: str) -> Link:
    parts = name.groupdict() if name else {}
    own = link.kind[-1] if link and link.family == "pcie" else ""
    usual = own if own.isdigit() else GENERATIONS.get(architecture, 5)
    generation, lanes = int(parts.get("generation") or usual), int(parts.get("lanes") or 16)
    host = parts.get("host")
    return Link(
        f"pcie{generation}",
        lanes * LANE_BYTES_PER_S[generation],
        HOST_LATENCY_S if host else PEER_LATENCY_S,
        link.most_devices if link else 8,
        "pcie-host" if host else "pcie",
    )
