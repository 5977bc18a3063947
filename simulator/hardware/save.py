"""Write profiles to files, by the declarations in :mod:`simulator.hardware.schema`. Equal profiles
give equal bytes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simulator.codes import STACKS
from simulator.errors import InputError, unknown
from simulator.files.fields import lines_of
from simulator.files.write import check_target, one_writer, remove_left, write_whole
from simulator.files.yaml import MAX_BYTES, Problems
from simulator.hardware import library, schema
from simulator.hardware.arrays import FILE_NAME, Arrays, check_arrays, pack_arrays
from simulator.hardware.profile import ArraysEntry, HardwareProfile, Sections
from simulator.operators import CONSTANTS
from simulator.operators.base import Link


def save_hardware(profile: HardwareProfile, path: str | os.PathLike[str]) -> None:
    """Write a profile with its facts, sources, notes and sections.

    Arrays are written to an ``.npz`` whose name has their digest, then the YAML next to it. The
    same profile gives the same bytes. Comments of an older file are lost.

    Parameters
    ----------
    profile : HardwareProfile
        Profile to write, such as a copy that ``dataclasses.replace`` made.
    path : str or path-like
        YAML file to write; its name ends in .yaml or .yml. An existing file is replaced.

    Raises
    ------
    InputError
        If the name does not end in .yaml or .yml, the folder does not exist, or the profile would
        not load again.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from dataclasses import dataclass, replace
    >>> import simulator
    >>> half = replace(simulator.load_hardware("cpu"), name="half", aliases=(), power_w=50.0)
    >>> with TemporaryDirectory() as folder:
    ...     save_hardware(half, f"{folder}/half.yaml")
    ...     print(simulator.load_hardware(f"{folder}/half.yaml").power_w)
    50.0
    """
    path = _target(path)
    file, packed, calibrated = _calibrated(path, profile.sections)
    more = " under datasheet, fitted values under calibrated" if profile.sections else ""
    head = f"# {' '.join(profile.title.split())}: facts with their sources{more}."
    whole = replace(facts_of(profile), calibrated=calibrated, engines=profile.engines)
    text, problems = _text(head, whole), Problems(str(path))
    schema.profile_from_text(text, path, problems, _no_arrays, library.taken(path))
    _write(path, text, problems, file, packed)


def save_stack(profile: HardwareProfile, stack: str, path: str | os.PathLike[str]) -> None:
    """Write the sections that a profile has for one stack, or the user's own calibration, to
    NAME.STACK.yaml."""
    path = _target(path)
    if stack not in STACKS:
        raise unknown("stack", stack, STACKS)
    if not path.name.endswith((f".{stack}.yaml", f".{stack}.yml")):
        raise InputError(f"{path}: expected a file name that ends in .{stack}.yaml")
    found = profile.stacks.get(stack) or profile.stacks.get("", profile.sections)
    # inherited sections are read from the related profile's files again
    own = {
        key: s for key, s in found.items() if not (profile.stacks_of and s.status == "inherited")
    }
    if not own:
        raise InputError(f"{path}: {profile.name} has no section that was fitted for {stack}")
    file, packed, calibrated = _calibrated(
        path, {key: replace(section, stack="") for key, section in own.items()}
    )
    facts = path.name.removesuffix(f".{stack}{path.suffix}")
    head = (
        f"# {' '.join(profile.title.split())}: what was fitted for {stack}; facts are in"
        f" {facts}.yaml."
    )
    whole = schema.StackFile(schema.SCHEMA_VERSION, profile.name, stack, calibrated)
    text, problems = _text(head, whole), Problems(str(path))
    schema.stack_from_text(text, path, problems, _no_arrays, profile, stack)
    _write(path, text, problems, file, packed)


def _text(head: str, whole: Any) -> str:
    return "\n".join([head, *lines_of(whole)]) + "\n"


def _no_arrays(file: Path, sha256: str, prefix: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    """Replace the reader of arrays while a text is checked: :func:`_calibrated` has checked the
    arrays."""
    return dict.fromkeys(names)


def _target(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: expected a file name that ends in .yaml")
    return check_target(path).resolve()


def _calibrated(
    path: Path, sections: Sections
) -> tuple[str, bytes, dict[str, dict[str, schema.SectionEntry]]]:
    """Return the name and the bytes of the array file, and the sections as the YAML names them. The
    name contains the digest, so the old pair of files stays readable until the new YAML is in
    place."""
    arrays = {}
    for (operator, dtype), section in sections.items():
        try:
            check_arrays(operator, section.arrays)
        except ValueError as error:
            key = f"calibrated.{operator}.{dtype}"
            raise InputError(f"{path}: {key}.arrays: {error}") from None
        own = section.arrays.items()
        arrays.update({f"{operator}.{dtype}.{name}": array for name, array in own})
    packed = pack_arrays(arrays) if arrays else b""
    file = f"{_stem(path)}.{hashlib.sha256(packed).hexdigest()[:12]}.npz"
    tree: dict[str, dict[str, schema.SectionEntry]] = {operator: {} for operator in CONSTANTS}
    for (operator, dtype), section in sorted(sections.items()):
        tree.get(operator, {})[dtype] = schema.SectionEntry(
            status=section.status,
            stack=section.stack,
            provenance=section.provenance,  # type: ignore[arg-type] # the check of the text names a missing one
            constants=section.constants,
            arrays=_entry(section.arrays, file, packed) if section.arrays else None,
            section_scale=section.section_scale if section.section_scale != 1.0 else None,
            accuracy=section.accuracy,
        )
    return file, packed, {operator: by_dtype for operator, by_dtype in tree.items() if by_dtype}


def _entry(arrays: Arrays, file: str, packed: bytes) -> ArraysEntry:
    return ArraysEntry(file, hashlib.sha256(packed).hexdigest(), tuple(sorted(arrays)))


def _stem(path: Path) -> str:
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)[:80]
    return stem if FILE_NAME.fullmatch(f"{stem}.npz") else f"profile_{stem}"


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
        # arrays of another stack have its name before the digest
        for old in path.parent.glob(f"{stem}.*.npz"):
            if re.fullmatch(r"[0-9a-f]{12}", old.name[len(stem) + 1 : -4]) and not (
                packed and old.name == file
            ):
                old.unlink(missing_ok=True)
    library.forget()


@dataclass
class _Cited:
    """Facts of a profile with the short names of their sources."""

    profile: HardwareProfile
    references: dict[str, str]  # short name -> source

    @classmethod
    def of(cls, profile: HardwareProfile) -> _Cited:
        """Give each source without a short name a new one."""
        references = dict(profile.references)
        for text in dict.fromkeys(profile.sources.values()):
            if text not in references.values():
                names = (f"source_{i}" for i in range(1, len(references) + 2))
                references[next(name for name in names if name not in references)] = text
        return cls(profile, references)

    def about(self, key: str) -> dict[str, str]:
        source = self.profile.sources.get(key, "")
        short = next((name for name, text in self.references.items() if text == source), "")
        return {"source": short, "note": self.profile.notes.get(key, "")}

    def fact(self, key: str, value: Any) -> schema.Fact[Any]:
        return schema.Fact(value, **self.about(key))

    def speed(self, key: str, link: Link) -> dict[str, schema.Fact[float]]:
        bandwidth = self.fact(f"{key}.bandwidth", link.bandwidth_bytes_per_s)
        return {"bandwidth": bandwidth, "latency": self.fact(f"{key}.latency", link.latency_s)}


def facts_of(profile: HardwareProfile) -> schema.ProfileFile:
    """Return the file of a profile without its fitted sections."""
    cited = _Cited.of(profile)
    facts = {
        key: cited.fact(key, getattr(profile, attribute))
        for key, (attribute, _) in schema.QUANTITIES.items()
    }
    if "max_clock" not in profile.sources and profile.max_clock_hz == profile.boost_clock_hz:
        del facts["max_clock"]
    rates = {
        dtype: schema.RateFact(
            rate.flop_per_s, rate.accumulate, rate.sparse_factor, **cited.about(f"rates.{dtype}")
        )
        for dtype, rate in profile.rates.items()
    }
    sheet = schema.Datasheet(
        sm_count=cited.fact("sm_count", profile.sm_count),
        **facts,
        rates=rates,
        link=_link(cited, profile.link) if profile.link else None,
        bridge=schema.BridgeFacts(profile.bridge.kind, **cited.speed("bridge", profile.bridge))
        if profile.bridge
        else None,
    )
    return schema.ProfileFile(
        schema_version=schema.SCHEMA_VERSION,
        sources=cited.references,
        datasheet=sheet,
        aliases=profile.aliases,
        own_stack=profile.own_stack,
        **{name: getattr(profile, name) for name in schema.SAME},
    )


def _link(cited: _Cited, link: Link) -> schema.LinkFacts:
    key = "link.connection"
    return schema.LinkFacts(
        kind=link.kind,
        connection=cited.fact(key, link.connection) if key in cited.profile.sources else None,
        max_devices=link.max_devices,
        **cited.speed("link", link),
    )
