"""Write profiles to files.

:func:`save_hardware` writes a whole profile, :func:`save_stack` the sections of one software stack. Order and layout
are fixed, so equal profiles give equal bytes and a changed value gives a small diff.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulator.errors import InputError, unknown
from simulator.files.write import check_target, one_writer, remove_left, write_whole
from simulator.files.yaml import MAX_BYTES, Problems
from simulator.hardware import library
from simulator.hardware.arrays import FILE_NAME, Arrays, check_arrays, pack_arrays
from simulator.hardware.constants import CONSTANTS
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.schema import QUANTITIES, SCHEMA_VERSION, profile_from_text, stack_from_text
from simulator.hardware.sections import Provenance, Section, Sections
from simulator.units import format_quantity
from simulator.workload import STACKS

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:[.-][A-Za-z0-9_]+)*")
_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")


def save_hardware(profile: HardwareProfile, path: str | os.PathLike[str]) -> None:
    """Write a profile with its facts, sources, notes and sections.

    Arrays are written to an ``.npz`` whose name has their digest, then the YAML next to it. The same profile gives the
    same bytes. Comments of an older file are lost.

    Parameters
    ----------
    profile : HardwareProfile
        Profile to write, such as a copy that ``dataclasses.replace`` made.
    path : str or path-like
        YAML file to write; its name ends in .yaml or .yml. An existing file is replaced.

    Raises
    ------
    InputError
        If the name does not end in .yaml or .yml, the folder does not exist, or the profile would not load again.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from dataclasses import replace
    >>> import simulator
    >>> half = replace(simulator.load_hardware("cpu"), name="half", aliases=(), power_w=50.0)
    >>> with TemporaryDirectory() as folder:
    ...     save_hardware(half, f"{folder}/half.yaml")
    ...     print(simulator.load_hardware(f"{folder}/half.yaml").power_w)
    50.0
    """
    path = _target(path)
    held = {f"{operator}.{dtype}": section.arrays for (operator, dtype), section in profile.sections.items()}
    keys = {prefix: f"calibrated.{prefix}" for prefix in held}
    if profile.local_update is not None:
        held["local_update"], keys["local_update"] = profile.local_update.arrays, "local_update"
    packed = _packed(path, held, keys)
    file, digest = _arrays_file(path, packed)
    text = profile_text(profile, file, digest)
    problems = Problems(str(path))
    profile_from_text(text, path, problems, _no_arrays, library.taken(path))
    _write(path, text, problems, file, packed)


def save_stack(profile: HardwareProfile, stack: str, path: str | os.PathLike[str]) -> None:
    """Write the sections that a profile has for one stack, or the user's own calibration, to NAME.STACK.yaml."""
    path = _target(path)
    if stack not in STACKS:
        raise unknown("stack", stack, STACKS)
    if not path.name.endswith((f".{stack}.yaml", f".{stack}.yml")):
        raise InputError(f"{path}: expected a file name that ends in .{stack}.yaml")
    found = profile.stacks.get(stack) or profile.stacks.get("", profile.sections)
    # inherited sections are read from the related profile's files again
    own = {key: s for key, s in found.items() if not (profile.stacks_of and s.status == "inherited")}
    if not own:
        raise InputError(f"{path}: {profile.name} has no section that was fitted for {stack}")
    sections = {key: replace(section, stack="") for key, section in own.items()}
    held = {f"{operator}.{dtype}": section.arrays for (operator, dtype), section in sections.items()}
    packed = _packed(path, held, {prefix: f"calibrated.{prefix}" for prefix in held})
    file, digest = _arrays_file(path, packed)
    tree = {"schema_version": SCHEMA_VERSION, "hardware": _text(profile.name), "stack": stack}
    title = " ".join(profile.title.split())
    facts = path.name.removesuffix(f".{stack}{path.suffix}")
    head = f"# {title}: what was fitted for {stack}; facts are in {facts}.yaml."
    text = "\n".join([head, *_lines(tree | {"calibrated": _calibrated(sections, file, digest)})]) + "\n"
    problems = Problems(str(path))
    stack_from_text(text, path, problems, _no_arrays, profile, stack)
    _write(path, text, problems, file, packed)


def _no_arrays(file: Path, sha256: str, prefix: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    """Stand for arrays while a text is checked: :func:`_packed` has checked them."""
    return dict.fromkeys(names)


def _target(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: expected a file name that ends in .yaml")
    return check_target(path).resolve()


def _packed(path: Path, held: Mapping[str, Arrays], keys: Mapping[str, str]) -> bytes:
    """Return the bytes of an ``.npz`` of checked arrays by prefix; b"" without arrays."""
    arrays = {}
    for prefix, own in held.items():
        try:
            check_arrays(prefix.split(".")[0], own)
        except ValueError as error:
            raise InputError(f"{path}: {keys[prefix]}.arrays: {error}") from None
        arrays.update({f"{prefix}.{name}": array for name, array in own.items()})
    return pack_arrays(arrays) if arrays else b""


def _stem(path: Path) -> str:
    """Return the start of the names of a profile's array files."""
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)[:80]
    return stem if FILE_NAME.fullmatch(f"{stem}.npz") else f"profile_{stem}"


def _arrays_file(path: Path, packed: bytes) -> tuple[str, str]:
    """Return name and digest of a profile's array file.

    The name contains the digest, so the old pair of files stays readable until the new YAML is in place.
    """
    digest = hashlib.sha256(packed).hexdigest()
    return f"{_stem(path)}.{digest[:12]}.npz", digest


def _write(path: Path, text: str, problems: Problems, file: str, packed: bytes) -> None:
    """Write arrays, then the YAML that names them; then remove the arrays of the previous YAML."""
    if len(text.encode()) > MAX_BYTES:
        problems.add(None, "file", f"would be larger than {MAX_BYTES / 1e6:g} MB")
    if len(problems):
        raise problems.error()
    with one_writer(path.parent):  # else another process could remove arrays that no YAML names yet
        if packed:
            write_whole(path.parent / file, packed)
        write_whole(path, text.encode())
        stem = _stem(path)
        remove_left(path.parent, f"{stem}.*.npz")
        for old in path.parent.glob(f"{stem}.*.npz"):
            mine = re.fullmatch(
                r"[0-9a-f]{12}", old.name[len(stem) + 1 : -4]
            )  # arrays of another stack have its name there
            if mine and not (packed and old.name == file):
                old.unlink(missing_ok=True)
    library.forget()


def profile_text(profile: HardwareProfile, arrays_file: str = "", arrays_sha256: str = "") -> str:
    """Return the YAML text of a profile; its arrays are named but not written."""
    title = " ".join(profile.title.split())
    more = " under datasheet, fitted values under calibrated" if profile.sections else ""
    head = f"# {title}: facts with their sources{more}."
    tree = _facts(profile)
    if profile.sections:
        tree["calibrated"] = _calibrated(profile.sections, arrays_file, arrays_sha256)
    if update := profile.local_update:
        tree["local_update"] = {
            "provenance": _provenance(update.provenance),
            "factors": f"[{', '.join(map(_quoted, update.factors))}]",
            "arrays": _named(update.arrays, arrays_file, arrays_sha256),
        }
    return "\n".join([head, *_lines(tree)]) + "\n"


def _calibrated(sections: Sections, arrays_file: str, arrays_sha256: str) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {operator: {} for operator in CONSTANTS}
    for (operator, dtype), section in sorted(sections.items()):
        if operator in CONSTANTS:
            tree[operator][_text(dtype)] = _section(section, arrays_file, arrays_sha256)
    return {operator: formats for operator, formats in tree.items() if formats}


def _facts(profile: HardwareProfile) -> dict[str, Any]:
    """Return what precedes the fitted sections, as mappings whose leaves are text."""
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
            **(
                {"connection": fact("link.connection", link.connection)} if "link.connection" in profile.sources else {}
            ),
            "max_devices": link.max_devices,
            "bandwidth": fact("link.bandwidth", format_quantity(link.bandwidth_bytes_per_s, "B/s")),
            "latency": fact("link.latency", format_quantity(link.latency_s, "s")),
        }
    if bridge := profile.bridge:
        datasheet["bridge"] = {
            "kind": _text(bridge.kind),
            "bandwidth": fact("bridge.bandwidth", format_quantity(bridge.bandwidth_bytes_per_s, "B/s")),
            "latency": fact("bridge.latency", format_quantity(bridge.latency_s, "s")),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "name": _text(profile.name),
        "title": _quoted(profile.title),
        "vendor": _text(profile.vendor),
        "architecture": _text(profile.architecture),
        "aliases": f"[{', '.join(map(_quoted, profile.aliases))}]",
        **({"stacks_of": _text(profile.stacks_of)} if profile.stacks_of else {}),
        **({"own_stack": _text(profile.own_stack)} if profile.own_stack else {}),
        "sources": {_text(key): _quoted(text) for key, text in references.items()},
        "datasheet": datasheet,
    }


def _section(section: Section, arrays_file: str, arrays_sha256: str) -> dict[str, Any]:
    constants = {}
    for name, fitted in section.constants.items():
        error = {} if fitted.std_error is None else {"std_error": _number(fitted.std_error)}
        constants[name] = _flow({"value": _number(fitted.value), **error, "status": fitted.status})
    optional = {
        "arrays": _named(section.arrays, arrays_file, arrays_sha256) if section.arrays else {},
        "section_scale": _number(section.section_scale) if section.section_scale != 1.0 else "",
        "accuracy": {_text(name): _number(value) for name, value in section.accuracy.items()},
    }
    return {
        "status": section.status,
        **({"stack": section.stack} if section.stack else {}),
        "provenance": _provenance(section.provenance) if section.provenance else {},
        "constants": constants or "{}",
        **{name: value for name, value in optional.items() if value},
    }


def _named(arrays: Arrays, file: str, sha256: str) -> dict[str, str]:
    return {"file": _text(file), "sha256": _quoted(sha256), "names": f"[{', '.join(map(_text, sorted(arrays)))}]"}


def _provenance(provenance: Provenance) -> dict[str, str]:
    values = {n: _quoted(v) if isinstance(v, str) else _number(v) for n, v in vars(provenance).items()}
    return {name: value for name, value in values.items() if value != '""'}


def _lines(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{indent}{key}:" if isinstance(value, dict) else f"{indent}{key}: {value}"
        if isinstance(value, dict):
            yield from _lines(value, indent + "  ")


def _flow(pairs: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in pairs.items()) + "}"


def _number(value: float) -> str:
    """Return the shortest text that reads back to the same number; whole numbers have no point."""
    whole = isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15)
    return str(int(value)) if whole else repr(float(value))


def _text(value: str) -> str:
    return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else _quoted(value)


def _quoted(value: str) -> str:
    """Return double-quoted YAML: JSON's escapes are a subset of YAML's."""
    return json.dumps(value, ensure_ascii=False)
