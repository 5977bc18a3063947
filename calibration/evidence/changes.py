"""The evidence before and after: every scored set of the generated pages, beside the same set at
another commit. A set is a row of a table with a column of errors."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence

from calibration.evidence.pages import DOCS
from calibration.validation.scoring import table
from simulator.errors import InputError

PAGES = ("accuracy", "engines", "serving", "energy")
COUNTS = ("rows", "runs", "cases")  # columns that say how many rows a set has
# "tokens/s: error" and "error" are both errors
ERROR = re.compile(r"(.+: )?(MAPE|error|median error)")
SHIPPED = re.compile(r"([\d.]+) \([\d,]+\)")  # error and rows of a shipped fit
TENTH = 1.1  # ratio of errors above which a set is worse, and below whose inverse it is better


def page_errors(text: str) -> dict[str, float]:
    """Return the errors of a page, %, by section, set and what is predicted."""
    errors: dict[str, float] = {}
    section, titles = "", list[str]()
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            titles = []
        elif not titles:
            titles = cells
        else:
            errors |= {f"{section}: {name}": e for name, e in _row_errors(titles, cells)}
    return errors


def _row_errors(titles: Sequence[str], cells: Sequence[str]) -> Iterator[tuple[str, float]]:
    errors = [i for i, title in enumerate(titles) if ERROR.fullmatch(title)]
    shipped = [i for i, cell in enumerate(cells) if SHIPPED.fullmatch(cell)]
    first = min(errors or shipped or [0])
    # the number of rows that a fit has seen is a part of the name of a set with a "MAPE"
    named = "MAPE" in titles or shipped
    name = " ".join(
        cell
        for title, cell in zip(titles[:first], cells, strict=False)
        if cell and (named or title not in COUNTS or not _count(cell))
    )
    for i in shipped:
        yield f"{name}, {titles[i]}", float(cells[i].split()[0])
    for i in errors if set(titles) & set(COUNTS) else ():
        if (error := cells[i].removesuffix(" %")).replace(".", "").isdigit():
            what = titles[i].rpartition(":")[0]
            yield f"{name}, {what}" if what else name, float(error)


def _count(cell: str) -> bool:
    return cell.replace(",", "").isdigit()


def evidence_changes(commit: str) -> tuple[str, int]:
    """Return the table of all sets whose error moved by more than a tenth since ``commit``, with a
    sentence, and the number of sets that are worse."""
    rows, counts = [], {"worse": 0, "better": 0, "the same within a tenth": 0, "new": 0}
    for page in PAGES:
        path = DOCS / f"{page}.md"
        before = page_errors(_at(commit, path.relative_to(DOCS.parents[1]).as_posix()))
        for name, now in page_errors(path.read_text("utf-8")).items():
            old = before.get(name)
            verdict = "new" if old is None else _verdict(old, now)
            counts[verdict] += 1
            if verdict in ("worse", "better"):
                rows.append([page, name, verdict, f"{old}", f"{now}"])
    rows.sort(key=lambda row: (row[2] == "better", PAGES.index(row[0])))
    changes = table(["page", "set", "error is", "error before", "error now"], rows, left=(0, 1, 2))
    sentence = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    sets = f"{sum(counts.values())} sets since {commit}: {sentence}."
    return f"{changes}\n\n{sets}", counts["worse"]


def _verdict(before: float, now: float) -> str:
    if now > TENTH * before:
        return "worse"
    return "better" if now * TENTH < before else "the same within a tenth"


def _at(commit: str, path: str) -> str:
    """Return a file at a commit, or no text if the commit lacks it."""
    if not _git("ls-tree", "--name-only", "--full-tree", commit, path):
        return ""
    return _git("show", f"{commit}:{path}")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=DOCS, check=False)
    if done.returncode:
        raise InputError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
