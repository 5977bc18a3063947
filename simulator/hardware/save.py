"""A profile to text: fixed order, fixed layout, so that the same profile gives the same bytes and a change shows as a small diff."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simulator.errors import InputError
from simulator.files.write import check_target, one_writer, write_whole
from simulator.files.yaml import MAX_BYTES, Problems
from simulator.hardware.arrays import FILE_NAME, pack_arrays
from simulator.hardware.checks import check_arrays
from simulator.hardware.parts import Section
from simulator.hardware.profile import OPERATORS, HardwareProfile
from simulator.hardware.schema import QUANTITIES, SCHEMA_VERSION, profile_from_text
from simulator.units import format_quantity

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:[.-][A-Za-z0-9_]+)*")
_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")


def save_profile(profile: HardwareProfile, path: Path) -> None:
    """See :func:`simulator.hardware.library.save_hardware`."""
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: expected a file name that ends in .yaml")
    path = check_target(path).resolve()
    arrays = {
        f"{operator}.{dtype}.{name}": a
        for (operator, dtype), s in profile.sections.items()
        for name, a in s.arrays.items()
    }
    for (operator, dtype), section in profile.sections.items():
        try:
            check_arrays(operator, section.arrays)
        except ValueError as error:
            raise InputError(f"{path}: calibrated.{operator}.{dtype}.arrays: {error}") from None
    packed = pack_arrays(arrays) if arrays else b""
    digest = hashlib.sha256(packed).hexdigest()
    # the digest is part of the name, so the old pair stays readable until the new YAML is in place, whatever happens in between
    file = f"{_file_stem(path.stem)}.{digest[:12]}.npz"
    text = profile_text(profile, file, digest)
    problems = Problems(str(path))
    if len(text.encode()) > MAX_BYTES:
        problems.add(None, "file", f"would be larger than {MAX_BYTES / 1e6:g} MB")
    elif len(packed):
        profile_from_text(text, path, problems, lambda _path, _sha256, _prefix, names: dict.fromkeys(names))
    else:
        profile_from_text(text, path, problems, lambda *_: {})
    if len(problems):
        raise problems.error()
    with one_writer(path.parent):  # else another's clean-up could take the arrays written here before they are named
        if packed:
            write_whole(path.parent / file, packed)
        write_whole(path, text.encode())
        for old in path.parent.glob(f"{_file_stem(path.stem)}.*.npz"):
            if re.fullmatch(r"[0-9a-f]{12}", old.name[len(_file_stem(path.stem)) + 1 : -4]) and (
                not packed or old.name != file
            ):
                old.unlink(missing_ok=True)


def profile_text(profile: HardwareProfile, arrays_file: str = "", arrays_sha256: str = "") -> str:
    """YAML text of a profile; the arrays, if any, are named but not written.

    Examples
    --------
    >>> from simulator.hardware.library import load_hardware
    >>> profile_text(load_hardware("h100")).splitlines()[2]
    'name: h100_sxm'
    """
    references = dict(profile.references)
    short = {text: key for key, text in reversed(references.items())}
    for text in profile.sources.values():
        if text not in short:
            key = next(f"source_{i}" for i in range(1, len(references) + 2) if f"source_{i}" not in references)
            references[key] = text
            short[text] = key

    def fact(key: str, **values: str) -> str:
        pairs = [f"{name}: {value}" for name, value in values.items()]
        if key in profile.sources:
            pairs.append(f"source: {_text(short[profile.sources[key]])}")
        if key in profile.notes:
            pairs.append(f"note: {_quoted(profile.notes[key])}")
        return "{" + ", ".join(pairs) + "}"

    lines = [
        f"# {' '.join(profile.title.split())}: facts with their sources under datasheet, fitted values under calibrated.",
        f"schema_version: {SCHEMA_VERSION}",
        f"name: {_text(profile.name)}",
        f"title: {_quoted(profile.title)}",
        f"vendor: {_text(profile.vendor)}",
        f"architecture: {_text(profile.architecture)}",
        f"aliases: [{', '.join(_quoted(alias) for alias in profile.aliases)}]",
        "sources:",
        *(f"  {_text(key)}: {_quoted(text)}" for key, text in references.items()),
        "datasheet:",
        f"  sm_count: {fact('sm_count', value=str(profile.sm_count))}",
    ]
    for key, (attribute, unit, _, _) in QUANTITIES.items():
        if key != "max_clock" or "max_clock" in profile.sources or profile.max_clock_hz != profile.boost_clock_hz:
            lines.append(f"  {key}: {fact(key, value=format_quantity(getattr(profile, attribute), unit))}")
    lines.append("  rates:")
    for dtype, rate in profile.rates.items():
        value = format_quantity(rate.flop_per_s, "FLOP/s")
        entry = fact(
            f"rates.{dtype}", value=value, accumulate=_text(rate.accumulate), sparse_factor=_number(rate.sparse_factor)
        )
        lines.append(f"    {dtype}: {entry}")
    if profile.link is not None:
        link = profile.link
        lines += [
            "  link:",
            f"    kind: {_text(link.kind)}",
            f"    max_devices: {link.max_devices}",
            f"    bandwidth: {fact('link.bandwidth', value=format_quantity(link.bandwidth_bytes_per_s, 'B/s'))}",
            f"    latency: {fact('link.latency', value=format_quantity(link.latency_s, 's'))}",
        ]
    if profile.sections:
        lines.append("calibrated:")
        for operator in [o for o in OPERATORS if any(key[0] == o for key in profile.sections)]:
            lines.append(f"  {operator}:")
            for dtype in sorted(key[1] for key in profile.sections if key[0] == operator):
                lines.append(f"    {_text(dtype)}:")
                lines += [
                    f"      {line}" for line in _section(profile.sections[operator, dtype], arrays_file, arrays_sha256)
                ]
    return "\n".join(lines) + "\n"


def _section(section: Section, file: str, digest: str) -> list[str]:
    lines = [f"status: {section.status}", "provenance:"]
    if section.provenance is not None:
        lines += [f"  {name}: {_value(value)}" for name, value in asdict(section.provenance).items() if value != ""]
    lines.append("constants:" if section.constants else "constants: {}")
    for name, fitted in section.constants.items():
        error = "" if fitted.std_error is None else f", std_error: {_number(fitted.std_error)}"
        lines.append(f"  {name}: {{value: {_number(fitted.value)}{error}, status: {fitted.status}}}")
    if section.arrays:
        lines += [
            "arrays:",
            f"  file: {_text(file)}",
            f"  sha256: {_quoted(digest)}",
            f"  names: [{', '.join(map(_text, sorted(section.arrays)))}]",
        ]
    if section.intervals:
        lines.append("intervals:")
        lines += [
            "  - {" + ", ".join(f"{k}: {_value(v)}" for k, v in asdict(interval).items()) + "}"
            for interval in section.intervals
        ]
    if section.accuracy:
        lines += ["accuracy:", *_pairs(section.accuracy)]
    return lines


def _pairs(values: Mapping[str, float]) -> list[str]:
    return [f"  {_text(name)}: {_number(value)}" for name, value in values.items()]


def _value(value: Any) -> str:
    return _quoted(value) if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    """Shortest text that reads back to the same number, whole numbers without a point."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return str(int(value))
    return repr(float(value))


def _text(value: str) -> str:
    return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else _quoted(value)


def _quoted(value: str) -> str:
    """Double-quoted YAML; JSON's escapes are a subset of YAML's."""
    return json.dumps(value, ensure_ascii=False)


def _file_stem(stem: str) -> str:
    """A stem that the loader allows in the name of the arrays' file."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", stem)[:80]
    return plain if FILE_NAME.fullmatch(f"{plain}.npz") else f"profile_{plain}"
