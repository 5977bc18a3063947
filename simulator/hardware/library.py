"""Find profiles by name: :func:`list_hardware`, :func:`load_hardware`, :func:`check_hardware`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from string import Template
from types import MappingProxyType

from simulator.codes import STACKS, labels
from simulator.errors import InputError, unknown
from simulator.files.read import stamp
from simulator.files.yaml import Problems, aliases_of, read_text
from simulator.hardware.arrays import Arrays, read_archive, read_arrays
from simulator.hardware.profile import (
    ANY_DTYPE,
    ARCHITECTURES,
    HardwareProfile,
    inherited,
    preferring,
)
from simulator.hardware.schema import (
    NAME,
    SCHEMA_VERSION,
    plain_name,
    profile_from_text,
    stack_from_text,
)

_STACK_FILE = re.compile(rf"\.({'|'.join(STACKS)})\.ya?ml$")

MOST_RELATED = 8  # related profiles that a chain of stacks_of may have
NEARLY = 0.2
"""Largest log of the ratio of SM counts at which fits of a related GPU count as fits of the device.
H100 and H200 predict each other with 92 to 100 % inside, an H100 an H20 with 43 to 84 % (the set
``gpus`` of the evidence)."""


def profiles_folder() -> Path:
    """Return the folder of the shipped profiles, in a checkout or an installation."""
    import hardware_profiles

    return Path(hardware_profiles.__file__).parent


def list_hardware() -> tuple[str, ...]:
    """Return the names of the shipped profiles.

    Returns
    -------
    tuple of str
        Names that :func:`simulator.load_hardware` accepts, sorted.

    Examples
    --------
    >>> "h100_sxm" in list_hardware()
    True
    """
    return tuple(
        sorted(
            path.stem
            for path in profiles_folder().glob("*.yaml")
            if not _STACK_FILE.search(path.name)
        )
    )


@lru_cache(maxsize=1)
def shipped_names() -> Mapping[str, str]:
    """Return the names and aliases of the shipped profiles -> profile name; only one line of each
    file is read."""
    found: dict[str, str] = {}
    for name in list_hardware():
        for alias in (name, *aliases_of(profiles_folder() / f"{name}.yaml")):
            other = found.setdefault(plain_name(alias), name)
            if other != name:
                raise InputError(
                    f"{name}.yaml: aliases: {alias!r} is a name of {other} too; use another"
                )
    return MappingProxyType(found)


def load_hardware(
    name_or_path: str | os.PathLike[str] | HardwareProfile,
    stack: str = "",
    same_stack: bool = False,
) -> HardwareProfile:
    """Load the profile of a device.

    Equal arguments return the same object until one of the profile's files changes.

    Parameters
    ----------
    name_or_path : str, path-like or HardwareProfile
        Name or alias of a shipped profile (case, blanks, dashes and underscores do not matter), or
        path of a YAML file. "NAME@STACK" also selects a software stack. A loaded profile is
        accepted too.
    stack : str, optional
        Software stack whose fitted sections are preferred, whatever engine runs. Default: the
        engine selects it.
    same_stack : bool, optional
        Whether the stack is the user's own, which narrows the intervals.

    Returns
    -------
    HardwareProfile
        The device.

    Raises
    ------
    InputError
        If the name or stack is unknown (the error lists the closest names), or the file is invalid
        (the error is its first problem, ``file:line:column: key: reason``).

    Examples
    --------
    >>> load_hardware("RTX 4090").name, load_hardware("a100@trtllm").stack
    ('rtx_4090', 'trtllm')
    """
    if isinstance(name_or_path, HardwareProfile) and not (stack or same_stack):
        return name_or_path
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputError(f"hardware: expected a name or a path, got {type(name_or_path).__name__}")
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, str):
        named, at, selected = text.rpartition("@")
        if at and not re.search(r"[/\\.]", selected):
            if stack not in ("", selected):
                raise InputError(f"hardware {text!r}: expected one stack, got {stack!r} too")
            text, stack = named, selected.strip().lower() or "@"
        shipped = shipped_names().get(plain_name(text))
        if shipped is not None:
            text = str(profiles_folder() / f"{shipped}.yaml")
        elif not re.search(r"[/\\]|\.ya?ml$", text):
            way = f"prunesim hardware new {plain_name(text)} writes a profile to fill in."
            raise unknown("GPU", text, shipped_names(), list_hardware(), way)
    profile = _with_stacks(Path(text))
    profile = profile.on(stack) if stack else profile
    return _on_same_stack(profile) if same_stack else profile


def reference(name: str) -> str:
    """Return the shortest text that :func:`load_hardware` accepts: a shipped device's label, else
    the path."""
    found = load_hardware(name).label
    plain = plain_name(found.partition("@")[0])
    return (
        found if plain in shipped_names() and load_hardware(found) is load_hardware(name) else name
    )


def files_of(profile: HardwareProfile) -> list[Path]:
    """Return every file that a profile can be read from: its own files and those of its related
    GPU."""
    paths, of = [profile.path] if profile.path else [], profile.stacks_of
    while of and paths:
        paths.append(_related(paths[-1], of))
        of = _load(_stamps(str(paths[-1]))).stacks_of
    return [file for path in paths for file in sorted(path.parent.glob(f"{path.stem}.*"))]


def _with_stacks(path: Path, before: tuple[str, ...] = ()) -> HardwareProfile:
    """Return the profile of a file with the stacks of its related GPU, which may inherit them in
    turn."""
    profile = _load(_stamps(str(path)))
    if not profile.stacks_of:
        return profile
    if profile.name in before or len(before) > MOST_RELATED:
        circle = " -> ".join((*before, profile.name))
        what = f"is a circle or has more than {MOST_RELATED} steps; expected a GPU with tables"
        raise InputError(f"{path}: stacks_of: {circle} {what}")
    return inheriting(
        profile, _with_stacks(_related(path, profile.stacks_of), (*before, profile.name))
    )


@lru_cache(maxsize=64)
def inheriting(profile: HardwareProfile, related: HardwareProfile) -> HardwareProfile:
    """Return a profile that inherits the sections it lacks from a related GPU: those of its own
    number formats, and collectives only over a link of the same kind."""
    alike = profile.architecture == related.architecture
    sibling = alike and abs(math.log(profile.sm_count / related.sm_count)) < NEARLY
    same = [(hw.link.kind, hw.link.connection) for hw in (profile, related) if hw.link]
    linked = len(same) == 2 and same[0] == same[1]
    known = (*labels(profile.rates), "runtime", "power", *(["collective"] if linked else []))
    stacks = {name: dict(own) for name, own in profile.stacks.items()}
    for name, sections in related.stacks.items():
        keys = [key for key in sections if (key[0] if key[0] in ANY_DTYPE else key[1]) in known]
        found = {key: inherited(sections[key], f"{related.name} {name}") for key in keys}
        stacks[name] = {**found, **stacks.get(name, {})}
    return preferring(replace(profile, sibling=sibling), stacks)


@lru_cache(maxsize=64)
def _on_same_stack(profile: HardwareProfile) -> HardwareProfile:
    return replace(profile, same_stack=True)


def _related(path: Path, name: str) -> Path:
    """Return the profile whose stacks another profile inherits: in its folder, else the shipped
    profile."""
    neighbour = path.parent / f"{name}.yaml"
    if not neighbour.is_file() and name not in list_hardware():
        raise unknown(f"{path}: stacks_of: profile", name, list_hardware())
    return neighbour if neighbour.is_file() else profiles_folder() / f"{name}.yaml"


def _stack_files(path: str) -> dict[str, str]:
    stem = os.path.splitext(path)[0]
    files = {stack: f"{stem}.{stack}.yaml" for stack in STACKS}
    return {stack: file for stack, file in files.items() if os.path.isfile(file)}


def _stamps(path: str) -> tuple[tuple[str, int, int], ...]:
    """Return the profile's files, each with its time and size."""
    return tuple((file, *stamp(file)) for file in (path, *_stack_files(path).values()))


@lru_cache(maxsize=64)
def _load(stamps: tuple[tuple[str, int, int], ...]) -> HardwareProfile:
    profile, found = _read(Path(stamps[0][0]))
    for problems in found:
        if len(problems):
            raise problems.error()
    assert profile is not None
    return profile


def _read(
    path: Path, stacks: Mapping[str, str] | None = None
) -> tuple[HardwareProfile | None, list[Problems]]:
    """Return the profile of a file with its stack files, None if it has problems, and the problems
    of each file."""
    found = [Problems(str(path))]
    archive = lru_cache(read_archive)

    def fetch(file: Path, sha256: str, prefix: str, names: tuple[str, ...]) -> Arrays:
        return read_arrays(archive(file, sha256), prefix, names)

    text = read_text(path, found[0])
    profile = None if text is None else profile_from_text(text, path, found[0], fetch, taken(path))
    if profile is None:
        return None, found
    sections = dict(profile.stacks)
    for stack, file in (_stack_files(str(path)) if stacks is None else stacks).items():
        found.append(Problems(file))
        text = read_text(Path(file), found[-1])
        fitted = (
            None
            if text is None
            else stack_from_text(text, Path(file), found[-1], fetch, profile, stack)
        )
        sections[stack] = fitted or {}
    return preferring(profile, sections), found


def forget() -> None:
    """Clear the caches after a file was written."""
    _load.cache_clear()
    shipped_names.cache_clear()


def taken(path: Path) -> Mapping[str, str]:
    """Return names that a file's aliases must not be; :func:`shipped_names` checks the shipped
    files themselves."""
    return {} if path.parent.absolute() == profiles_folder().absolute() else shipped_names()


def check_hardware(path: str | os.PathLike[str]) -> list[str]:
    """Return all problems of a profile file and its stack files, or of one stack file, as
    ``file:line:column: key: reason``."""
    path = Path(path)
    lines = []
    named = _STACK_FILE.search(path.name)
    owner = path.with_name(f"{path.name[: named.start()]}.yaml") if named else path
    if named and owner.is_file():
        found = _read(owner, {named[1]: str(path)})[1]
    else:
        profile, found = _read(path)
        if profile is not None and profile.stacks_of and not any(map(len, found)):
            try:
                _with_stacks(path)
            except InputError as error:
                lines.append(str(error).replace(": stacks_of: ", ":1:1: stacks_of: ", 1))
    return [line for problems in found for line in problems.lines] + lines


def hardware_warnings(path: str | os.PathLike[str]) -> list[str]:
    """Return a warning on each fact of a valid profile file that lies outside the range of its
    architecture; none for a stack file."""
    from simulator.hardware.plausible import implausible  # late: predictions need no ranges

    stack = _STACK_FILE.search(Path(path).name)
    return [] if stack else [f"{path}: {text}" for text in implausible(load_hardware(path))]


def new_hardware(name: str, path: str | os.PathLike[str] = "") -> Path:
    """Write a commented profile to fill in, by default to NAME.yaml in the working folder, and
    return its path. Raises InputError if the name is invalid or a shipped GPU's, or if the file
    exists."""
    from simulator.files.write import write_whole  # late: loading a profile writes nothing

    named = plain_name(name)
    if not re.fullmatch(NAME.pattern, named):
        raise InputError(f"hardware name {name!r}: expected {NAME.right}")
    if named in shipped_names():
        raise InputError(
            f"hardware name {name!r} is a name of the shipped {shipped_names()[named]}; use another"
        )
    path = Path(path or f"{named}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: expected a file name that ends in .yaml")
    if path.exists():
        raise InputError(
            f"{path}: expected a new file, but it exists; choose another name or remove it"
        )
    facts = {
        "file": path,
        "name": named,
        "version": SCHEMA_VERSION,
        "architectures": ", ".join(ARCHITECTURES),
    }
    template = Template(Path(__file__).with_name("template.yaml").read_text(encoding="utf-8"))
    write_whole(path, template.substitute(facts).encode())
    return path
