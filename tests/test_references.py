"""Pages refer only to names of the packages and to files that exist.

Links between pages are checked in ``test_docs.py``.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = {"torch", "triton", "pynvml", "streamlit", "pandas", "pyarrow"}
"""Packages without which some modules cannot be imported; references in and to those are then not checked."""

DOTTED = re.compile(r"\b((?:simulator|calibration)(?:\.\w+)+)")
QUOTED = re.compile(r"(?<!`)`([\w./-]+)`(?!`)")
PLACEHOLDER = re.compile("NAME|STACK|FAMILY|FOLDER")
TOPS = ("simulator", "calibration", "tests", "docs", "hardware_profiles", "notebooks", ".ci")


@cache
def imported(name: str) -> ModuleType | None:
    """A module; None where there is none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OPTIONAL:
            pytest.skip(f"no module {missing}")
        return None


def follows(held: Any, names: list[str]) -> bool:
    """Whether a chain of attributes, or of fields without a default, leads somewhere."""
    for name in names:
        fields = getattr(held, "__annotations__", {})
        if not hasattr(held, name) and name not in fields:
            return False
        held = getattr(held, name) if hasattr(held, name) else fields[name]
    return True


def resolves(target: str, home: ModuleType | None = None) -> bool:
    """Return whether a name is a module or an attribute of one; ``home`` and its classes are searched first."""
    names = target.split(".")
    if home is not None:
        classes = [held for held in vars(home).values() if isinstance(held, type)]
        if any(follows(held, names) for held in (home, *classes)):
            return True
    for cut in range(len(names), 0, -1):
        if (module := imported(".".join(names[:cut]))) is not None:
            return follows(module, names[cut:])
    return False


def exists(path: str, page: Path) -> bool:
    """Whether there is such a file: from the root, a package or the page; a bare name anywhere."""
    if any((home / path).exists() for home in (ROOT, ROOT / "simulator", ROOT / "calibration", page.parent)):
        return True
    return "/" not in path and any(next((ROOT / top).rglob(path), None) for top in TOPS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_and_files_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = {path.removesuffix(".py").replace("/", ".") for path in re.findall(r"^<!-- file: (\S+) -->", text, re.M)}
    names = {target for target in DOTTED.findall(text) if not resolves(target)} - shown
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    paths = (path for path in QUOTED.findall(prose) if not PLACEHOLDER.search(path))
    ours = {path for path in paths if path.endswith(".py") or path.startswith(tuple(f"{top}/" for top in TOPS))}
    assert names | {path for path in ours if not exists(path, page)} == set()
