"""A device as data: datasheet facts with their sources, and beside them what was fitted on it.

Use :func:`load_hardware` to get a profile by name, alias or path, :func:`list_hardware` for the shipped names, :func:`check_hardware` for
everything that is wrong with a file, :func:`save_hardware` to write one. Facts and fitted values never mix: the first are attributes, the
second come from :meth:`HardwareProfile.section`, which says whether they were calibrated, borrowed or are defaults of the architecture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from simulator.constants import Constant
from simulator.errors import InputError, unknown
from simulator.profile_parts import Fitted, Interval, Link, Provenance, Rate, Section
from simulator.units import format_quantity

__all__ = [
    "ARCHITECTURES", "OPERATORS", "Fitted", "HardwareProfile", "Interval", "Link", "Provenance", "Rate", "Section", "check_hardware",
    "constants_of", "forget", "list_hardware", "load_hardware", "plain_name", "profiles_folder", "save_hardware", "shipped_names",
]  # fmt: skip

ARCHITECTURES: tuple[str, ...] = ("ampere", "ada", "hopper", "blackwell", "cpu")
OPERATORS: tuple[str, ...] = ("gemm", "attention_prefill", "attention_decode", "elementwise", "runtime")
"""Parts of a profile that are fitted; "runtime" holds for every dtype and has dtype "*"."""


@dataclass(frozen=True, eq=False)
class HardwareProfile:
    """A device; quantities in SI.

    Attributes
    ----------
    sources : mapping of str to str
        Datasheet key ("sm_count", "rates.bf16", "link.latency") -> where the value comes from.
    notes : mapping of str to str
        Datasheet key -> a remark, where a value needs one.
    references : mapping of str to str
        Short names the file uses for its sources.
    sections : mapping of (operator, dtype) to Section
        Fitted parts; ask :meth:`section`, which also borrows and falls back.

    Examples
    --------
    >>> hw = load_hardware("h100")
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
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[tuple[str, str], Section] = field(default_factory=dict)
    path: Path | None = None

    @property
    def clock_headroom(self) -> float:
        """Highest clock over boost clock, at least 1: how far a device may exceed its datasheet rate."""
        return self.max_clock_hz / self.boost_clock_hz

    def rate(self, dtype: str) -> Rate:
        """Datasheet rate of a dtype.

        Raises
        ------
        InputError
            When the device has no such arithmetic; names what it has.
        """
        try:
            return self.rates[dtype]
        except KeyError:
            raise InputError(f"{self.name} has no {dtype} arithmetic; it has {', '.join(self.rates)}") from None

    def peak_flop_per_s(self, dtype: str, sparse: bool = False) -> float:
        """Datasheet rate at boost clock, FLOP/s; with ``sparse`` that of 2:4 operands. Times ``clock_headroom`` it is a hard ceiling."""
        rate = self.rate(dtype)
        return rate.flop_per_s * (rate.sparse_factor if sparse else 1.0)

    def ridge_point(self, dtype: str) -> float:
        """Arithmetic intensity, FLOP/byte, above which a datasheet roofline is compute-bound."""
        return self.peak_flop_per_s(dtype) / self.bandwidth_bytes_per_s

    def section(self, operator: str, dtype: str) -> Section:
        """Fitted values of an operator: the calibrated ones, else those of bf16 / fp16 for one another, else the architecture's defaults.

        Parameters
        ----------
        operator : str
            One of :data:`OPERATORS`.
        dtype : str
            A dtype of the device; ignored for "runtime".

        Returns
        -------
        Section
            With every constant of the operator; one that was not fitted has its default and status "default".

        Raises
        ------
        InputError
            For an operator that does not exist.
        """
        if operator not in OPERATORS:
            raise unknown("operator", operator, OPERATORS)
        key = (operator, "*" if operator == "runtime" else dtype)
        twin = {"bf16": "fp16", "fp16": "bf16"}.get(dtype)
        found = self.sections.get(key)
        if found is None and twin is not None and (operator, twin) in self.sections and self.rates.get(dtype) == self.rates.get(twin):
            found = _borrowed(self.sections[(operator, twin)], f"{self.name} {operator} {twin}")
        default = _default_section(operator, self.architecture)
        if found is None:
            return default
        if found.constants.keys() >= default.constants.keys():
            return found
        return replace(found, constants=MappingProxyType({**default.constants, **found.constants}))

    def describe(self) -> list[tuple[str, str, str]]:
        """Facts as rows of (key, value for people, source); prints nothing."""
        rows: list[tuple[str, str]] = [
            ("sm_count", str(self.sm_count)),
            ("boost_clock", format_quantity(self.boost_clock_hz, "Hz")),
            ("max_clock", format_quantity(self.max_clock_hz, "Hz")),
            ("memory", format_quantity(self.memory_bytes, "B")),
            ("bandwidth", format_quantity(self.bandwidth_bytes_per_s, "B/s")),
            ("l2_cache", format_quantity(self.l2_bytes, "B")),
            ("power", format_quantity(self.power_w, "W")),
        ]
        for dtype, rate in self.rates.items():
            sparse = f", 2:4 sparse x{rate.sparse_factor:g}" if rate.sparse_factor != 1 else ""
            rows.append((f"rates.{dtype}", f"{format_quantity(rate.flop_per_s, 'FLOP/s')}, {rate.accumulate} accumulate{sparse}"))
        if self.link:
            rows.append(("link.bandwidth", f"{self.link.kind}, {format_quantity(self.link.bandwidth_bytes_per_s, 'B/s')} each direction"))
            rows.append(("link.latency", format_quantity(self.link.latency_s, "s")))
        return [(key, value, self.sources.get(key, "")) for key, value in rows]


def constants_of(operator: str) -> Mapping[str, Constant]:
    """Registry of the constants of an operator's cost model."""
    # late: the cost modules are upper layers; they import this module for its types only
    if operator == "gemm":
        from simulator.gemm import CONSTANTS
    elif operator == "attention_prefill":
        from simulator.attention import PREFILL_CONSTANTS as CONSTANTS
    elif operator == "attention_decode":
        from simulator.attention import DECODE_CONSTANTS as CONSTANTS
    elif operator == "elementwise":
        from simulator.elementwise import CONSTANTS
    elif operator == "runtime":
        from simulator.execution import CONSTANTS
    else:
        raise unknown("operator", operator, OPERATORS)
    return CONSTANTS


@lru_cache(maxsize=64)
def _default_section(operator: str, architecture: str) -> Section:
    values = {name: Fitted(constant.default(architecture), None, "default") for name, constant in constants_of(operator).items()}
    return Section(MappingProxyType(values))


@lru_cache(maxsize=64)
def _borrowed(section: Section, origin: str) -> Section:
    provenance = section.provenance
    if provenance is not None:
        provenance = replace(provenance, borrowed_from=provenance.borrowed_from or origin)
    return replace(section, status="borrowed", provenance=provenance)


def profiles_folder() -> Path:
    """Folder of the shipped profiles, in a checkout and in an installation alike."""
    import hardware_profiles

    return Path(hardware_profiles.__file__).parent


def list_hardware() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted.

    >>> "h100_sxm" in list_hardware()
    True
    """
    return tuple(sorted(path.stem for path in profiles_folder().glob("*.yaml")))


def plain_name(name: str) -> str:
    """A name as it is compared: lower case, with blanks and dashes as underscores.

    >>> plain_name("RTX 4090")
    'rtx_4090'
    """
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


@lru_cache(maxsize=1)
def shipped_names() -> Mapping[str, str]:
    """Every name and alias of the shipped profiles -> profile name. Reads one line of each file: that is quick."""
    found: dict[str, str] = {}
    for name in list_hardware():
        text = (profiles_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        line = re.search(r"^aliases: *\[(.*)\] *$", text, re.MULTILINE)
        aliases = [alias.strip().strip("\"'") for alias in line.group(1).split(",")] if line else []
        for alias in [name, *filter(None, aliases)]:
            other = found.setdefault(plain_name(alias), name)
            if other != name:
                raise InputError(f"{name}.yaml: aliases: {alias!r} is a name of {other} too; use another")
    return MappingProxyType(found)


def load_hardware(name_or_path: str | os.PathLike[str]) -> HardwareProfile:
    """A profile by name, alias or path.

    Parameters
    ----------
    name_or_path : str or path
        A shipped name or alias (case, blanks, dashes and underscores do not matter), or the path of a YAML file.

    Returns
    -------
    HardwareProfile
        Shared: the same file gives the same object until it changes.

    Raises
    ------
    InputError
        For an unknown name (with the closest ones) or a bad file: its first problem as ``file:line:column: key: reason``.

    Examples
    --------
    >>> load_hardware("RTX 4090").name
    'rtx_4090'
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputError(f"hardware: expected a name or a path, got {type(name_or_path).__name__}")
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, str):
        shipped = shipped_names().get(plain_name(text))
        if shipped is not None:
            text = str(profiles_folder() / f"{shipped}.yaml")
        elif not re.search(r"[/\\]|\.ya?ml$", text):
            raise unknown("GPU", text, shipped_names())
    try:
        status = os.stat(text)
        stamp = (status.st_mtime_ns, status.st_size)
    except (OSError, ValueError):
        stamp = (-1, -1)  # the reader says what is wrong
    return _load(text, *stamp)


@lru_cache(maxsize=64)
def _load(path: str, _modified: int, _size: int) -> HardwareProfile:
    from simulator.profile_io import read_profile

    profile, problems = read_profile(Path(path))
    if profile is None:
        raise problems.error()
    return profile


def forget() -> None:
    """Drop what was cached of files, after one was written."""
    _load.cache_clear()
    shipped_names.cache_clear()


def check_hardware(path: str | os.PathLike[str]) -> list[str]:
    """All problems of a profile file, one line each: ``file:line:column: key: reason, what would be right``.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    list of str
        Empty for a good file.
    """
    from simulator.profile_io import read_profile

    return read_profile(Path(path))[1].lines


def save_hardware(profile: HardwareProfile, path: str | os.PathLike[str]) -> None:
    """Write a profile whole: arrays to an ``.npz`` beside the YAML that carries its digest in its name, then the YAML.

    The same profile gives the same bytes. Comments of an older file are not kept; facts, sources and notes are.

    Parameters
    ----------
    profile : HardwareProfile
    path : str or path
        Ends in ``.yaml``.

    Raises
    ------
    InputError
        When the path is no YAML file's name, or the loader would refuse what was to be written (its first problem).
    """
    from simulator.profile_save import save_profile

    save_profile(profile, Path(path))
