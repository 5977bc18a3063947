"""No retired word comes back, and no name has two meanings: ``docs/glossary.md`` has the table of retired words, and
below are those that are gone.

To retire a word, add it to the lists of the places it has left. A name is searched by its parts, so ``settled`` also
finds ``is_settled`` and ``SettledPass``; a page and a text by whole words.
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("simulator", "calibration")

MODULES = {
    *("simulator/kernels/__init__.py", "simulator/stack.py", "simulator/cost/stream.py", "simulator/cost/lattice.py"),
    *("simulator/uncertainty/settled.py", "simulator/uncertainty/spread.py", "calibration/execute/__init__.py"),
    *(
        "calibration/judge/__init__.py",
        "calibration/asked.py",
        "calibration/shipped.py",
        "calibration/validation/bars.py",
    ),
}
"""Files of packages and modules."""

NAMES = {
    *("doubt", "doubts", "settle", "settled", "granted", "contest", "contests", "believed", "implied", "rooms", "odds"),
    *("rung", "rungs", "ladder", "lent", "borrowed", "misfit", "misfits", "stiffness", "lattice", "lattices"),
}
"""Parts of names in the code, in small letters."""

WHOLE_NAMES = {"OpTime", "PassDoubt", "MULTIPLIER", "REACH_OCTAVES"}
"""Names, exactly."""

PAGES = {
    *("doubt", "unsure", "settle", "settled", "contest", "contests", "rung", "rungs", "ladder", "lent", "believed"),
    *("granted", "wall", "walls", "implied", "house", "room", "rooms", "misfit", "misfits", "stiffness", "borrows"),
    *("dearer", "lattice", "lattices"),
}
"""Words of pages, ``docs/generated/commands.md`` with every help text among them."""

TEXTS = {
    *("doubt", "doubts", "unsure", "settle", "settled", "odds", "contest", "contests", "rival", "rivals", "believed"),
    *(
        "rung",
        "rungs",
        "ladder",
        "lent",
        "borrowed",
        "borrows",
        "misfit",
        "misfits",
        "stiffness",
        "granted",
        "promised",
    ),
    *("wall", "walls", "implied", "lattice", "lattices", "rooms", "house", "riddle"),
}
"""Words of docstrings, comments and messages."""

ANYWHERE = re.compile("|".join(NAMES | WHOLE_NAMES | TEXTS), re.IGNORECASE)


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def pages() -> list[Path]:
    """Pages as they are read today: the changelog is history, the glossary lists the retired words."""
    docs = (path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "glossary.md")
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *docs]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def parts(name: str) -> set[str]:
    """Parts of a name, in small letters.

    >>> sorted(parts("is_settledPass2"))
    ['is', 'pass', 'settled']
    """
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def retired_of(path: Path) -> Iterator[str]:
    """Retired words of a module, each with its line."""
    if not ANYWHERE.search(path.read_text(encoding="utf-8")):
        return  # taking a file apart takes time
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            found: set[str] = set()
            if token.type == tokenize.NAME:
                found = (parts(token.string) & NAMES) | ({token.string} & WHOLE_NAMES)
            elif token.type in (tokenize.STRING, tokenize.COMMENT):
                found = words(token.string) & TEXTS
            yield from (f"{path.relative_to(ROOT)}:{token.start[0]}: {word}" for word in sorted(found))


def test_no_module_is_named_by_a_retired_word() -> None:
    assert not [path for path in sorted(MODULES) if (ROOT / path).exists()]


def test_no_name_and_no_text_in_the_code_has_a_retired_word() -> None:
    assert [found for path in modules() for found in retired_of(path)] == []


def test_no_page_has_a_retired_word() -> None:
    found = {str(path.relative_to(ROOT)): PAGES & words(path.read_text(encoding="utf-8")) for path in pages()}
    assert {page: retired for page, retired in found.items() if retired} == {}


CLASS = re.compile(r"^class ([A-Z]\w*)", re.MULTILINE)
"""A public class of a module, not of another class."""


def test_no_two_modules_have_a_class_of_the_same_name() -> None:
    homes: dict[str, list[str]] = {}
    for path in modules():
        for name in CLASS.findall(path.read_text(encoding="utf-8")):
            homes.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_a_retired_word_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_words.ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text('"""Is it settled?"""\nclass SettledPass:\n    MULTIPLIER = 1  # of the house\n')
    assert list(retired_of(path)) == ["a.py:1: settled", "a.py:2: settled", "a.py:3: MULTIPLIER", "a.py:3: house"]
