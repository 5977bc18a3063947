"""Names of the shipped profiles: :func:`list_hardware`, :func:`shipped_names`, :func:`plain_name`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from simulator.errors import InputError


def profiles_folder() -> Path:
    """Folder of the shipped profiles, in a checkout and in an installation alike."""
    import hardware_profiles

    return Path(hardware_profiles.__file__).parent


def list_hardware() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted."""
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
