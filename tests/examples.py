"""Examples of pages: their blocks of code, and the packages that they change and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("simulator", "calibration", "hardware_profiles")


class Block(NamedTuple):
    """A fenced block of a page: its language, text and first line, and the file that the page
    writes it to."""

    language: str
    text: str
    line: int
    file: str = ""


def blocks(path: Path) -> Iterator[Block]:
    """Fenced blocks in the order of the page, and commands that are set off by four blanks."""
    text = path.read_text(encoding="utf-8")
    fenced = r"(?:^<!-- file: (\S+) -->\n)?^```(\w*)\n(.*?)^```$"
    for found in re.finditer(rf"{fenced}|^    (prunesim [^\n]*)$", text, re.MULTILINE | re.DOTALL):
        if found[4]:
            yield Block("bash", found[4], text[: found.start(4)].count("\n") + 1)
        else:
            yield Block(found[2], found[3], text[: found.start(3)].count("\n") + 1, found[1] or "")


def edit(shown: str, folder: Path) -> None:
    """Change a file as a page shows: its name after +++, then parts that begin with @@."""
    first, *parts = re.split(r"^@@.*\n", shown, flags=re.MULTILINE)
    target = folder / first.split()[-1]
    text = target.read_text(encoding="utf-8")
    for part in parts:
        lines = part.splitlines(keepends=True)
        before, after = (
            "".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +")
        )
        assert text.count(before) == 1, part
        text = text.replace(before, after)
    target.unlink()  # a link to the file of the checkout
    target.write_text(text, encoding="utf-8")


def linked_packages(folder: Path) -> Path:
    """Copy the packages into a folder; the files of the copy are links, and new ones can be
    added."""
    caches = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, copy_function=os.symlink, ignore=caches)
    return folder


def python(arguments: list[str], folder: Path) -> str:
    """Standard output of this interpreter, run in a folder with the packages of the tree it belongs
    to."""
    home = folder if (folder / "simulator").is_dir() else ROOT
    environment = {**os.environ, "PYTHONPATH": str(home), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    said = (
        f"{' '.join(arguments)[:300]}: status"
        f" {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )
    assert done.returncode == 0, said
    return done.stdout
