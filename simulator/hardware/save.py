"""A profile to text in a fixed order and layout: equal profiles give equal bytes, a change shows as a small diff."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

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
    arrays = {}
    for (operator, dtype), section in profile.sections.items():
        try:
            check_arrays(operator, section.arrays)
        except ValueError as error:
            raise InputError(f"{path}: calibrated.{operator}.{dtype}.arrays: {error}") from None
        arrays.update({f"{operator}.{dtype}.{name}": array for name, array in section.arrays.items()})
    packed = pack_arrays(arrays) if arrays else b""
    digest = hashlib.sha256(packed).hexdigest()
    # the digest is part of the name: the old pair stays readable until the new YAML is in place, whatever happens
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)[:80]
    stem = stem if FILE_NAME.fullmatch(f"{stem}.npz") else f"profile_{stem}"
    file = f"{stem}.{digest[:12]}.npz"
    text = profile_text(profile, file, digest)
    problems = Problems(str(path))
    if len(text.encode()) > MAX_BYTES:
        problems.add(None, "file", f"would be larger than {MAX_BYTES / 1e6:g} MB")
    else:
        profile_from_text(text, path, problems, lambda _path, _sha256, _section, names: dict.fromkeys(names))
    if len(problems):
        raise problems.error()
    with one_writer(path.parent):  # else another's clean-up could take the arrays written here before they are named
        if packed:
            write_whole(path.parent / file, packed)
        write_whole(path, text.encode())
        for old in path.parent.glob(f"{stem}.*.npz"):
            mine = re.fullmatch(r"[0-9a-f]{12}", old.name[len(stem) + 1 : -4])
            if mine and not (packed and old.name == file):
                old.unlink(missing_ok=True)


def profile_text(profile: HardwareProfile, arrays_file: str = "", arrays_sha256: str = "") -> str:
    """YAML text of a profile; the arrays, if any, are named but not written.

    >>> from simulator.hardware.library import load_hardware
    >>> profile_text(load_hardware("h100")).splitlines()[2]
    'name: h100_sxm'
    """
    return "\n".join(_lines(profile, arrays_file, arrays_sha256)) + "\n"


def _lines(profile: HardwareProfile, arrays_file: str, arrays_sha256: str) -> Iterator[str]:
    references = dict(profile.references)
    short = {text: key for key, text in reversed(references.items())}
    for text in profile.sources.values():
        if text not in short:
            key = next(f"source_{i}" for i in range(1, len(references) + 2) if f"source_{i}" not in references)
            references[key], short[text] = text, key

    def fact(key: str, value: str, **more: str) -> str:
        pairs = {"value": value, **more}
        if key in profile.sources:
            pairs["source"] = _text(short[profile.sources[key]])
        if key in profile.notes:
            pairs["note"] = _quoted(profile.notes[key])
        return f"{key.rpartition('.')[2]}: {_flow(pairs)}"

    title = " ".join(profile.title.split())
    yield f"# {title}: facts with their sources under datasheet, fitted values under calibrated."
    yield f"schema_version: {SCHEMA_VERSION}"
    yield f"name: {_text(profile.name)}"
    yield f"title: {_quoted(profile.title)}"
    yield f"vendor: {_text(profile.vendor)}"
    yield f"architecture: {_text(profile.architecture)}"
    yield f"aliases: [{', '.join(map(_quoted, profile.aliases))}]"
    yield "sources:"
    for key, text in references.items():
        yield f"  {_text(key)}: {_quoted(text)}"
    yield "datasheet:"
    yield f"  {fact('sm_count', str(profile.sm_count))}"
    for key, (attribute, quantity) in QUANTITIES.items():
        value = getattr(profile, attribute)
        if key != "max_clock" or key in profile.sources or value != profile.boost_clock_hz:
            yield f"  {fact(key, format_quantity(value, quantity.unit))}"
    yield "  rates:"
    for dtype, rate in profile.rates.items():
        more = {"accumulate": _text(rate.accumulate), "sparse_factor": _number(rate.sparse_factor)}
        yield f"    {fact(f'rates.{dtype}', format_quantity(rate.flop_per_s, 'FLOP/s'), **more)}"
    if link := profile.link:
        yield "  link:"
        yield f"    kind: {_text(link.kind)}"
        yield f"    max_devices: {link.max_devices}"
        yield f"    {fact('link.bandwidth', format_quantity(link.bandwidth_bytes_per_s, 'B/s'))}"
        yield f"    {fact('link.latency', format_quantity(link.latency_s, 's'))}"
    if profile.sections:
        yield "calibrated:"
    for operator in OPERATORS:
        dtypes = sorted(dtype for other, dtype in profile.sections if other == operator)
        if dtypes:
            yield f"  {operator}:"
        for dtype in dtypes:
            yield f"    {_text(dtype)}:"
            for line in _section_lines(profile.sections[operator, dtype], arrays_file, arrays_sha256):
                yield f"      {line}"


def _section_lines(section: Section, arrays_file: str, arrays_sha256: str) -> Iterator[str]:
    yield f"status: {section.status}"
    yield "provenance:"
    if section.provenance is not None:
        for name, value in asdict(section.provenance).items():
            if value != "":
                yield f"  {name}: {_value(value)}"
    yield "constants:" if section.constants else "constants: {}"
    for name, fitted in section.constants.items():
        error = {} if fitted.std_error is None else {"std_error": _number(fitted.std_error)}
        yield f"  {name}: {_flow({'value': _number(fitted.value), **error, 'status': fitted.status})}"
    if section.arrays:
        yield "arrays:"
        yield f"  file: {_text(arrays_file)}"
        yield f"  sha256: {_quoted(arrays_sha256)}"
        yield f"  names: [{', '.join(map(_text, sorted(section.arrays)))}]"
    if section.intervals:
        yield "intervals:"
    for interval in section.intervals:
        yield f"  - {_flow({name: _value(value) for name, value in asdict(interval).items()})}"
    if section.accuracy:
        yield "accuracy:"
    for name, value in section.accuracy.items():
        yield f"  {_text(name)}: {_number(value)}"


def _flow(pairs: dict[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in pairs.items()) + "}"


def _value(value: str | float) -> str:
    return _quoted(value) if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    """Shortest text that reads back to the same number, whole numbers without a point."""
    whole = isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15)
    return str(int(value)) if whole else repr(float(value))


def _text(value: str) -> str:
    return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else _quoted(value)


def _quoted(value: str) -> str:
    """Double-quoted YAML; JSON's escapes are a subset of YAML's."""
    return json.dumps(value, ensure_ascii=False)
