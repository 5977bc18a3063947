"""Profiles by name: :func:`list_hardware`, :func:`load_hardware`, :func:`check_hardware`, :func:`save_hardware`.

A profile is written in a fixed order and layout: equal profiles give equal bytes, a change shows as a small diff.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simulator.errors import InputError, unknown
from simulator.files.write import check_target, one_writer, write_whole
from simulator.files.yaml import MAX_BYTES, Problems, read_text
from simulator.hardware.arrays import FILE_NAME, check_arrays, pack_arrays, read_arrays
from simulator.hardware.profile import OPERATORS, HardwareProfile, Interval, Provenance, Section
from simulator.hardware.schema import QUANTITIES, SCHEMA_VERSION, plain_name, profile_from_text
from simulator.units import format_quantity

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:[.-][A-Za-z0-9_]+)*")
_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")


def profiles_folder() -> Path:
    """Folder of the shipped profiles, in a checkout and in an installation alike."""
    import hardware_profiles

    return Path(hardware_profiles.__file__).parent


def list_hardware() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
    return tuple(sorted(path.stem for path in profiles_folder().glob("*.yaml")))


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
    """A profile by shipped name or alias (case, blanks, dashes and underscores do not matter) or the path of its YAML.

    It is shared: the same file gives the same object until it changes. Raises InputError for an unknown name, with the
    closest ones, or a bad file: its first problem as ``file:line:column: key: reason``.

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
    profile, problems = _read(Path(path))
    if profile is None:
        raise problems.error()
    return profile


def _read(path: Path) -> tuple[HardwareProfile | None, Problems]:
    """A profile file to a profile, None if anything is wrong, and its problems."""
    problems = Problems(str(path))
    text = read_text(path, problems)
    return None if text is None else profile_from_text(text, path, problems, read_arrays, _taken(path)), problems


def _taken(path: Path) -> Mapping[str, str]:
    """Names a file's aliases may not be; among the shipped files, clashes are found by :func:`shipped_names`."""
    return {} if path.parent.absolute() == profiles_folder().absolute() else shipped_names()


def check_hardware(path: str | os.PathLike[str]) -> list[str]:
    """All problems of a profile file, one line each: ``file:line:column: key: reason, what would be right``."""
    return _read(Path(path))[1].lines


def save_hardware(profile: HardwareProfile, path: str | os.PathLike[str]) -> None:
    """Write a profile whole: its arrays to an ``.npz`` named with their digest, then the YAML beside it.

    The same profile gives the same bytes. Comments of an older file are not kept; facts, sources and notes are. Raises
    InputError when the path is no YAML file's name, or the loader would refuse what was to be written.
    """
    path = Path(path)
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
        profile_from_text(text, path, problems, lambda *said: dict.fromkeys(said[-1]), _taken(path))
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
    _load.cache_clear()
    shipped_names.cache_clear()


def profile_text(profile: HardwareProfile, arrays_file: str = "", arrays_sha256: str = "") -> str:
    """YAML text of a profile; the arrays, if any, are named but not written."""
    title = " ".join(profile.title.split())
    head = f"# {title}: facts with their sources under datasheet, fitted values under calibrated."
    tree = _facts(profile)
    if profile.sections:
        tree["calibrated"] = {operator: {} for operator in OPERATORS if any(o == operator for o, _ in profile.sections)}
    for (operator, dtype), section in sorted(profile.sections.items()):
        if operator in OPERATORS:
            tree["calibrated"][operator][_text(dtype)] = _section(section, arrays_file, arrays_sha256)
    return "\n".join([head, *_lines(tree)]) + "\n"


def _facts(profile: HardwareProfile) -> dict[str, Any]:
    """What comes before the fitted sections: mappings, and leaves as their text."""
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
        return _flow(pairs)

    datasheet: dict[str, Any] = {"sm_count": fact("sm_count", str(profile.sm_count))}
    for key, (attribute, quantity) in QUANTITIES.items():
        value = getattr(profile, attribute)
        if key != "max_clock" or key in profile.sources or value != profile.boost_clock_hz:
            datasheet[key] = fact(key, format_quantity(value, quantity.unit))
    datasheet["rates"] = rates = {}
    for dtype, rate in profile.rates.items():
        more = {"accumulate": _text(rate.accumulate), "sparse_factor": _number(rate.sparse_factor)}
        rates[dtype] = fact(f"rates.{dtype}", format_quantity(rate.flop_per_s, "FLOP/s"), **more)
    if link := profile.link:
        datasheet["link"] = {
            "kind": _text(link.kind),
            "max_devices": link.max_devices,
            "bandwidth": fact("link.bandwidth", format_quantity(link.bandwidth_bytes_per_s, "B/s")),
            "latency": fact("link.latency", format_quantity(link.latency_s, "s")),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "name": _text(profile.name),
        "title": _quoted(profile.title),
        "vendor": _text(profile.vendor),
        "architecture": _text(profile.architecture),
        "aliases": f"[{', '.join(map(_quoted, profile.aliases))}]",
        "sources": {_text(key): _quoted(text) for key, text in references.items()},
        "datasheet": datasheet,
    }


def _section(section: Section, arrays_file: str, arrays_sha256: str) -> dict[str, Any]:
    provenance = _values(section.provenance) if section.provenance else {}
    constants = {}
    for name, fitted in section.constants.items():
        error = {} if fitted.std_error is None else {"std_error": _number(fitted.std_error)}
        constants[name] = _flow({"value": _number(fitted.value), **error, "status": fitted.status})
    names = f"[{', '.join(map(_text, sorted(section.arrays)))}]"
    arrays = {"file": _text(arrays_file), "sha256": _quoted(arrays_sha256), "names": names}
    optional = {
        "arrays": arrays if section.arrays else {},
        "intervals": [_flow(_values(interval)) for interval in section.intervals],
        "accuracy": {_text(name): _number(value) for name, value in section.accuracy.items()},
    }
    return {
        "status": section.status,
        "provenance": {name: value for name, value in provenance.items() if value != '""'},
        "constants": constants or "{}",
        **{name: value for name, value in optional.items() if value},
    }


def _lines(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{indent}{key}:" if isinstance(value, (dict, list)) else f"{indent}{key}: {value}"
        if isinstance(value, dict):
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list):
            yield from (f"{indent}  - {item}" for item in value)


def _values(part: Interval | Provenance) -> dict[str, str]:
    return {name: _quoted(value) if isinstance(value, str) else _number(value) for name, value in vars(part).items()}


def _flow(pairs: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in pairs.items()) + "}"


def _number(value: float) -> str:
    """Shortest text that reads back to the same number, whole numbers without a point."""
    whole = isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15)
    return str(int(value)) if whole else repr(float(value))


def _text(value: str) -> str:
    return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else _quoted(value)


def _quoted(value: str) -> str:
    """Double-quoted YAML; JSON's escapes are a subset of YAML's."""
    return json.dumps(value, ensure_ascii=False)
