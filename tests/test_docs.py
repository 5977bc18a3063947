"""The documentation is correct: equations and examples run, printed text and generated pages are
current."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from examples import ROOT, blocks, edit, linked_packages, python

from calibration.evidence import commands_page as pages
from calibration.evidence.build_profiles import RECIPES
from calibration.evidence.pages import sections_table
from simulator.cli import run
from simulator.engines.engine import Engine, list_engines
from simulator.hardware.library import list_hardware
from simulator.operators import CONSTANTS
from simulator.operators.collective import COLLECTIVE_CONSTANTS as LINK
from simulator.operators.elementwise import CLASSES
from simulator.pruning import FAMILIES
from simulator.pruning._methods import METHODS
from simulator.pruning._titles import method_title

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SETS_UP = re.compile(r"\bpip\b|\bvenv\b|\bpytest\b|\bpre-commit\b")
"""Commands that make an environment or run tests: `.ci/run` runs those, in a fresh clone."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages that new files may be added to."""
    return linked_packages(tmp_path_factory.mktemp("tree"))


def prunesim(words: list[str], folder: Path) -> str:
    """Run the program in this process in a folder without packages, and return its standard
    output."""
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(words)
    finally:
        os.chdir(before)
    assert status == 0, (
        f"{' '.join(words)[:300]}: status {status}\n{out.getvalue()[-2000:]}{err.getvalue()[-2000:]}"
    )
    return out.getvalue()


def commands_of(shell: str) -> Iterator[list[str]]:
    """Yield the ``prunesim`` and ``python -m calibration...`` commands of a shell block; `.ci/run`
    runs commands that set up an environment."""
    for line in shell.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words[1:2] == ["explore"]:
                continue  # a server, which has tests of its own
            program = Path(words[0]).name if words else ""
            if program == "prunesim":
                yield ["-m", "simulator.cli", *words[1:]]
            elif (
                program.startswith("python")
                and words[1:2] == ["-m"]
                and words[2].startswith("calibration")
            ):
                yield words[1:]
            else:
                assert not words or SETS_UP.search(part), (
                    f"neither a command of prunesim nor one that sets up: {part}"
                )


def run_shell(shell: str, folder: Path) -> str:
    out = []
    for words in commands_of(shell):
        if words[:2] == ["-m", "simulator.cli"] and not (folder / "simulator").is_dir():
            out.append(prunesim(words[2:], folder))
        else:
            out.append(python(words, folder))
    return "".join(out)


PRINTED: dict[tuple[Path, str], str] = {}
"""Output of the commands shown on pages; two tests read the output of the guide's commands."""


def printed_by(path: Path, command: str, folder: Path) -> str:
    """Return the output of a command shown on a page; it runs once, in the folder of the first test
    that needs it."""
    if (path, command) not in PRINTED:
        PRINTED[path, command] = run_shell(command, folder)
    return PRINTED[path, command]


def assert_printed(shown: str, printed: str, where: str) -> None:
    """Assert that the lines of a page were printed in this order; a line ``...`` stands for omitted
    lines."""
    have, *parts = (
        [line.rstrip() for line in text.strip("\n").splitlines()]
        for text in (printed, *re.split(r"^\.\.\.\n", shown.strip("\n") + "\n", flags=re.MULTILINE))
    )
    at = 0
    for want in parts:
        places = [
            i for i in range(at, len(have) - len(want) + 1) if have[i : i + len(want)] == want
        ]
        if not places:
            missing = next((line for line in want if line not in have), "")
            shown_only = f"shows a line that is not printed:\n{missing}"
            what = shown_only if missing else "leaves lines out without a line of three dots"
            raise AssertionError(f"{where}: {what}\nprinted:\n" + "\n".join(have[:120]))
        at = places[0] + len(want)


def follow(path: Path, folder: Path) -> Counter[str]:
    """Follow a page: write its files, run its commands and its Python, compare the shown output,
    and count the blocks.

    A block of text shows the output of the previous command or, if it begins with ``$``, of its own
    command. A block that begins with ``prunesim`` is a command for another machine.
    """
    done: Counter[str] = Counter()
    printed = ""
    for block in blocks(path):
        where = f"{name_of(path)}:{block.line}"
        what = "file" if block.file else block.language
        if block.file:
            target = folder / block.file
            assert target.resolve().is_relative_to(folder.resolve()), where
            assert not target.exists(), where
            target.write_text(block.text, encoding="utf-8")
        elif what == "diff":
            edit(block.text, folder)
        elif what == "bash":
            printed = run_shell(block.text, folder) or printed
        elif what == "python":
            python(["-c", "\n" * (block.line - 1) + block.text], folder)
        elif what == "text" and block.text.startswith("$ "):
            command, _, shown = block.text[2:].partition("\n")
            assert_printed(shown, printed_by(path, command, folder), where)
        elif what == "text" and not block.text.startswith("prunesim "):
            assert_printed(block.text, printed, where)
        else:
            continue
        done[what] += 1
    return done


@pytest.mark.quick
def test_the_equations_of_the_model_are_those_of_the_code() -> None:
    found = [block for block in blocks(ROOT / "docs" / "model.md") if block.language == "python"]
    assert len(found) >= 10
    names: dict[str, object] = {"__name__": "model"}
    for block in found:  # one after the other, as the page is read
        exec(compile("\n" * (block.line - 1) + block.text, "docs/model.md", "exec"), names)


@pytest.mark.quick
def test_every_constant_of_the_cost_models_is_explained() -> None:
    text = (ROOT / "docs" / "model.md").read_text(encoding="utf-8").replace("\\_", "_")
    names = {name for constants in CONSTANTS.values() for name in constants} | set(LINK)
    classes = re.compile(rf"(t0|e|l2)_({'|'.join(CLASSES)})(_s)?")
    assert all(f"`{name}`" in text for name in CLASSES)
    missing = [
        name
        for name in sorted(names)
        if not classes.fullmatch(name) and not re.search(rf"\b{name}\b", text)
    ]
    assert not missing


@pytest.mark.quick
def test_every_value_of_an_engine_is_explained() -> None:
    text = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    shown = {"each_pass": "host.pass", "each_sequence": "host.sequence", "gap": "host.gap"}
    shown |= {"each_request": "host.request"}
    shown |= {"host_correlation": "host.correlation"}
    of_file = ("name", "title", "aliases", "notes", "sources", "path", "generation")
    names = [f.name for f in fields(Engine) if f.name not in of_file]
    assert not [name for name in names if f"`{shown.get(name, name)}`" not in text]


@pytest.mark.slow
def test_the_examples_of_how_to_add_things_work(tree: Path) -> None:
    done = follow(ROOT / "docs" / "adding.md", tree)
    assert done >= Counter(file=6, diff=2, bash=5, python=2, text=5)


OTHERS = [p for p in PAGES if p.name not in ("adding.md", "model.md")]
SHOWN = [p for p in OTHERS if any(block.language in ("bash", "text") for block in blocks(p))]


@pytest.mark.slow
@pytest.mark.parametrize("path", SHOWN, ids=name_of)
def test_a_newcomer_sees_what_the_page_shows(path: Path, tmp_path: Path) -> None:
    done = follow(path, tmp_path)
    least = {
        "README.md": Counter(text=3, bash=2, python=1),
        "docs/guide.md": Counter(text=12, file=3, bash=1, python=1),
    }
    assert done >= least.get(name_of(path), Counter(text=1))


GUIDE = ROOT / "docs" / "guide.md"
_QUESTION = r"^## (\d+)\. [^\n]+\?\n.*?^```text\n\$ (prunesim [^\n]+)\n([^\n]+)"
QUESTIONS: list[tuple[str, str, str]] = re.findall(
    _QUESTION, GUIDE.read_text(encoding="utf-8"), re.M | re.S
)
"""Number of each question of the guide, its command, and the first line shown of the answer."""

ANSWERS = ("On ", "No ", "Of ", "The least ", "The fastest ")
"""Beginnings of answers, besides the model, pruning, method or device that a command names."""

ENDS = (
    r"x(, \d\.\d+-\d\.\d+| \(\d\.\d+-\d\.\d+\)| faster \(\d\.\d+-\d\.\d+\))|\d+ % in their 90 %"
    r" interval"
)
"""A speedup with its interval, or the coverage of intervals."""


@pytest.mark.quick
def test_the_guide_answers_its_questions() -> None:
    assert [int(number) for number, _, _ in QUESTIONS] == list(range(1, 16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "command", "shown"), QUESTIONS, ids=[number for number, _, _ in QUESTIONS]
)
def test_the_first_sentence_printed_is_the_answer(
    number: str, command: str, shown: str, tmp_path: Path
) -> None:
    for block in blocks(GUIDE):
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    printed = printed_by(GUIDE, command, tmp_path)
    assert printed.startswith(shown + "\n"), (
        f"{number}: the guide shows the beginning of the answer"
    )
    sentence = " ".join(printed.partition("\n\n")[0].split()).partition(". ")[0]
    named = [
        method_title(word.removesuffix(".json"))
        for word in re.split(r"[\s,@]", " ".join(shlex.split(command)[2:]))
        if word
    ]
    assert sentence.startswith((*ANSWERS, *named)), sentence
    assert re.search(ENDS, sentence), sentence


@pytest.mark.quick
def test_what_is_not_printed_is_noticed() -> None:
    printed = "a\nb  \nc\nd\n"
    for shown in ("b\nc\n", "b\n...\nd\n"):
        assert_printed(shown, printed, "here")
    for shown in ("b\nd", "c\n...\nb"):
        with pytest.raises(AssertionError, match="here: leaves lines out"):
            assert_printed(shown, printed, "here")
    with pytest.raises(AssertionError, match="here: shows a line that is not printed:\ne"):
        assert_printed("b\ne", printed, "here")
    with pytest.raises(AssertionError, match="neither a command"):
        list(commands_of("rm -rf x"))
    assert list(
        commands_of(".venv/bin/pip install -e . && .venv/bin/prunesim gemm 1 2 3 --hardware 'a b'")
    ) == [["-m", "simulator.cli", "gemm", "1", "2", "3", "--hardware", "a b"]]


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(
        r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def anchors(path: Path) -> set[str]:
    """Anchors GitHub gives a page's headings."""
    heads = re.findall(r"^#+ +(.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(path: Path) -> Iterator[str]:
    """Targets of the links and images of a page, those in code left out."""
    yield from re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(path)))


@pytest.mark.quick
@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere_and_tables_have_as_many_cells_in_every_line(path: Path) -> None:
    for target in links(path):
        if re.match(r"[a-z]+:", target):
            assert target.startswith(("https://", "http://", "mailto:")), target
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{name_of(path)}: {target}"
        assert not anchor or anchor in anchors(other), f"{name_of(path)}: {target}: no such heading"
    for found in re.finditer(r"(?:^\|.*\n?)+", prose(path), re.MULTILINE):
        lines = found[0].splitlines()
        cells = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in lines}
        whole = (
            len(lines) >= 3 and len(cells) == 1 and set(re.sub(r"[\s|]", "", lines[1])) <= set(":-")
        )
        assert whole, f"{name_of(path)}: {lines[0]}"


@pytest.mark.quick
def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    named = {
        (index.parent / target.partition("#")[0]).resolve()
        for target in links(index)
        if "://" not in target
    }
    assert not [
        name_of(p)
        for p in sorted((ROOT / "docs").rglob("*.md"))
        if p != index and p.resolve() not in named
    ]


@pytest.mark.quick
def test_the_page_of_commands_is_current_and_shows_every_option() -> None:
    page = pages.commands_page()
    made_by = "python -m calibration.evidence pages commands"
    assert (ROOT / "docs" / "generated" / "commands.md").read_text(encoding="utf-8") == page, (
        made_by
    )
    for path, command in pages.commands():
        section = page.partition(f"\n## prunesim {path}\n")[2].partition("\n## ")[0]
        options = [
            n
            for p in command.params
            if p.name != "help" and not p.hidden
            for n in p.opts
            if n.startswith("--")
        ]
        assert path == "explore" or "--json" in options
        assert [name for name in options if name not in section] == [], path


@pytest.mark.quick
def test_lists_of_what_is_known_are_complete() -> None:
    """The README counts families, methods, engines and devices; the help and the guide list
    families."""
    words = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ]
    known = {"pruning families": FAMILIES, "published methods": METHODS, "engines": list_engines()}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for what, found in (known | {"devices": list_hardware()}).items():
        many = words[len(found)] if len(found) < len(words) else str(len(found))
        assert re.search(rf"\b{many} {what}\b", text), f"README.md: expected {many} {what}"
    help_, guide = pages.commands_page(), (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    families = re.findall(r"[\w]+", help_.partition("Families: ")[2].partition(". |")[0])
    assert set(FAMILIES) <= set(families), "simulator/cli/options.py: --prune"
    assert [name for name in FAMILIES if f"\n| `{name}` |" not in guide] == []


@pytest.mark.quick
def test_the_accuracy_page_has_the_errors_of_the_shipped_fits() -> None:
    page = (ROOT / "docs" / "generated" / "accuracy.md").read_text(encoding="utf-8")
    assert f"## Shipped fits\n\n{sections_table()}\n\n" in page


@pytest.mark.quick
def test_every_gpu_with_a_table_has_its_accuracy_report() -> None:
    text = {
        p: p.read_text(encoding="utf-8")
        for p in (ROOT / "docs" / "generated" / "validation").glob("*.md")
    }
    for name in {recipe.hardware for recipe in RECIPES.values() if recipe.tables}:
        assert any(t.startswith(f"# Accuracy of {name}\n") for t in text.values()), name
    index = text[ROOT / "docs" / "generated" / "validation" / "README.md"]
    for command in re.findall(r"`prunesim validate (.+?)`", index):
        assert (ROOT / command.split("--markdown ")[1]).is_file(), command


# -- names and files that pages refer to -----------------------------------------------------------

OPTIONAL = {"torch", "triton", "pynvml", "streamlit", "pandas", "pyarrow"}
"""Packages without which some modules cannot be imported; references in and to those are then not
checked."""

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
    """Return whether a name is a module or an attribute of one; ``home`` and its classes are
    searched first."""
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
    if any(
        (home / path).exists()
        for home in (ROOT, ROOT / "simulator", ROOT / "calibration", page.parent)
    ):
        return True
    return "/" not in path and any(next((ROOT / top).rglob(path), None) for top in TOPS)


@pytest.mark.quick
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name_of)
def test_names_and_files_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = {
        path.removesuffix(".py").replace("/", ".")
        for path in re.findall(r"^<!-- file: (\S+) -->", text, re.M)
    }
    names = {target for target in DOTTED.findall(text) if not resolves(target)} - shown
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    paths = (path for path in QUOTED.findall(prose) if not PLACEHOLDER.search(path))
    ours = {
        path
        for path in paths
        if path.endswith(".py") or path.startswith(tuple(f"{top}/" for top in TOPS))
    }
    assert names | {path for path in ours if not exists(path, page)} == set()
