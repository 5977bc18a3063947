"""Profiles by name: :func:`load_hardware`, :func:`check_hardware`, :func:`save_hardware`; names are in
``hardware.names``."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from simulator.errors import InputError, unknown
from simulator.hardware.names import plain_name, profiles_folder, shipped_names
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.save import save_profile
from simulator.hardware.schema import read_profile


def load_hardware(name_or_path: str | os.PathLike[str]) -> HardwareProfile:
    """A profile by shipped name or alias (case, blanks, dashes and underscores do not matter) or the path of its YAML.

    It is shared: the same file gives the same object until it changes.

    Raises
    ------
    InputError
        For an unknown name, with the closest ones, or a bad file: its first problem as
        ``file:line:column: key: reason``.

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
    profile, problems = read_profile(Path(path))
    if profile is None:
        raise problems.error()
    return profile


def forget() -> None:
    """Drop what was cached of files, after one was written."""
    _load.cache_clear()
    shipped_names.cache_clear()


def check_hardware(path: str | os.PathLike[str]) -> list[str]:
    """All problems of a profile file, one line each: ``file:line:column: key: reason, what would be right``."""
    return read_profile(Path(path))[1].lines


def save_hardware(profile: HardwareProfile, path: str | os.PathLike[str]) -> None:
    """Write a profile whole: its arrays to an ``.npz`` named with their digest, then the YAML beside it.

    The same profile gives the same bytes. Comments of an older file are not kept; facts, sources and notes are.

    Raises
    ------
    InputError
        When the path is no YAML file's name, or the loader would refuse what was to be written (its first problem).
    """
    save_profile(profile, Path(path))
    forget()
