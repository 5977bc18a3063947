"""Profiles by name: :func:`list_hardware`, :func:`load_hardware`, :func:`check_hardware`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from simulator.errors import InputError, unknown
from simulator.files.yaml import Problems, read_text
from simulator.hardware.arrays import Arrays, read_archive, read_arrays
from simulator.hardware.profile import HardwareProfile, lent, preferring
from simulator.hardware.schema import plain_name, profile_from_text, stack_from_text
from simulator.workload import STACKS

_STACK_FILE = re.compile(rf"\.({'|'.join(STACKS)})\.ya?ml$")


def profiles_folder() -> Path:
    """Folder of the shipped profiles, in a checkout and in an installation alike."""
    import hardware_profiles

    return Path(hardware_profiles.__file__).parent


def list_hardware() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted.

    >>> "h100_sxm" in list_hardware()
    True
    """
    return tuple(sorted(path.stem for path in profiles_folder().glob("*.yaml") if not _STACK_FILE.search(path.name)))


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


def load_hardware(
    name_or_path: str | os.PathLike[str] | HardwareProfile, stack: str = "", same_stack: bool = False
) -> HardwareProfile:
    """A profile by shipped name or alias (case, blanks, dashes and underscores do not matter) or the path of its YAML,
    whichever ``name_or_path`` is; a loaded one as it is.

    ``stack``, or "@stack" behind the name, is whose kernels are preferred: one of those that files beside the profile
    were fitted for. ``same_stack`` says that it is the user's own, so that intervals are those of its own table. The
    profile is shared: the same files give the same object until one changes. Raises InputError for an unknown name or
    stack, with the closest ones, or a bad file: its first problem as ``file:line:column: key: reason``.

    >>> load_hardware("RTX 4090").name, load_hardware("a100@trtllm").stack
    ('rtx_4090', 'trtllm')
    """
    if isinstance(name_or_path, HardwareProfile) and not (stack or same_stack):
        return name_or_path
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputError(f"hardware: expected a name or a path, got {type(name_or_path).__name__}")
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, str):
        named, at, asked = text.rpartition("@")
        if at and not re.search(r"[/\\.]", asked):
            if stack not in ("", asked):
                raise InputError(f"hardware {text!r}: another stack than {stack!r} is asked for beside it")
            text, stack = named, asked.strip().lower() or "@"
        shipped = shipped_names().get(plain_name(text))
        if shipped is not None:
            text = str(profiles_folder() / f"{shipped}.yaml")
        elif not re.search(r"[/\\]|\.ya?ml$", text):
            raise unknown("GPU", text, shipped_names(), list_hardware())
    profile = _load(_stamps(text))
    if profile.stacks_of:
        profile = _lent(profile, _load(_stamps(str(_lender(Path(text), profile.stacks_of)))))
    profile = profile.on(stack) if stack else profile
    return _known(profile) if same_stack else profile


def hardware_from_text(text: str, file: str) -> HardwareProfile:
    """A profile from the text of its YAML alone, which ``file`` is the name of; arrays beside it there are none."""
    problems = Problems(file)
    text = text.encode("utf-8", "replace").decode()  # what came as JSON may hold half a character
    profile = profile_from_text(text, Path(file), problems, _no_arrays, shipped_names())
    if profile is None:
        raise problems.error()
    if profile.stacks_of and profile.stacks_of not in list_hardware():
        raise unknown(f"{file}: stacks_of: profile", profile.stacks_of, list_hardware())
    profile = replace(preferring(profile, dict(profile.stacks)), path=None)
    return lent(profile, load_hardware(profile.stacks_of)) if profile.stacks_of else profile


def _no_arrays(file: Path, sha256: str, prefix: str, names: tuple[str, ...]) -> Arrays:
    raise ValueError(f"{file.name} is a file beside it; expected a profile without arrays")


def reference(name: str) -> str:
    """A text that :func:`load_hardware` takes, as short as can be: the label of a shipped device, else the path."""
    found = load_hardware(name).label
    plain = plain_name(found.partition("@")[0])
    return found if plain in shipped_names() and load_hardware(found) is load_hardware(name) else name


def files_of(profile: HardwareProfile) -> list[Path]:
    """Every file that a profile was, or could have been, read from: its own, and those of the sibling that lends."""
    own = [profile.path] if profile.path else []
    paths = [*own, *(_lender(path, profile.stacks_of) for path in own if profile.stacks_of)]
    return [file for path in paths for file in sorted(path.parent.glob(f"{path.stem}.*"))]


_lent = lru_cache(maxsize=64)(lent)


@lru_cache(maxsize=64)
def _known(profile: HardwareProfile) -> HardwareProfile:
    return replace(profile, same_stack=True)


def _lender(path: Path, name: str) -> Path:
    """The profile beside another, or the shipped one, whose stacks it borrows."""
    beside = path.parent / f"{name}.yaml"
    if not beside.is_file() and name not in list_hardware():
        raise unknown(f"{path}: stacks_of: profile", name, list_hardware())
    return beside if beside.is_file() else profiles_folder() / f"{name}.yaml"


def _stack_files(path: str) -> dict[str, str]:
    """Files beside a profile that hold what was fitted for a stack."""
    stem = os.path.splitext(path)[0]
    files = {stack: f"{stem}.{stack}.yaml" for stack in STACKS}
    return {stack: file for stack, file in files.items() if os.path.isfile(file)}


def _stamps(path: str) -> tuple[tuple[str, int, int], ...]:
    """A profile's files, each with its time and size; the reader says what is wrong with one."""
    out = []
    try:
        for file in (path, *_stack_files(path).values()):
            status = os.stat(file)
            out.append((file, status.st_mtime_ns, status.st_size))
    except (OSError, ValueError):
        return ((path, -1, -1),)
    return tuple(out)


@lru_cache(maxsize=64)
def _load(stamps: tuple[tuple[str, int, int], ...]) -> HardwareProfile:
    profile, found = _read(Path(stamps[0][0]))
    for problems in found:
        if len(problems):
            raise problems.error()
    assert profile is not None
    return profile


def _read(path: Path, stacks: Mapping[str, str] | None = None) -> tuple[HardwareProfile | None, list[Problems]]:
    """A profile file and its stack files (by default those beside it) to a profile, None if anything is wrong with the
    first, and the problems of each."""
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
        fitted = None if text is None else stack_from_text(text, Path(file), found[-1], fetch, profile, stack)
        sections[stack] = fitted or {}
    return preferring(profile, sections), found


def forget() -> None:
    """Read files again, after one was written."""
    _load.cache_clear()
    shipped_names.cache_clear()


def taken(path: Path) -> Mapping[str, str]:
    """Names a file's aliases may not be; among the shipped files, clashes are found by :func:`shipped_names`."""
    return {} if path.parent.absolute() == profiles_folder().absolute() else shipped_names()


def check_hardware(path: str | os.PathLike[str]) -> list[str]:
    """All problems of a profile file and the stack files beside it, or of one stack file, one line each:
    ``file:line:column: key: reason, what would be right``."""
    path = Path(path)
    lines = []
    named = _STACK_FILE.search(path.name)
    owner = path.with_name(f"{path.name[: named.start()]}.yaml") if named else path
    if named and owner.is_file():
        found = _read(owner, {named[1]: str(path)})[1]
    else:
        profile, found = _read(path)
        if profile is not None and profile.stacks_of:
            try:
                _lender(path, profile.stacks_of)
            except InputError as error:
                lines.append(str(error).replace(": ", ":1:1: ", 1))
    return [line for problems in found for line in problems.lines] + lines
