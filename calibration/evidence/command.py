"""Evaluate on data that no fit saw: ``python -m calibration.evidence SET ...``, and make generated
pages again: ``python -m calibration.evidence pages [PAGE ...]``.

Prints the tables of sets (*list* prints their names), or the fitted host times of engines
(*hosts*). *pages* writes generated pages of docs (default: all) in their folders; the accuracy page
takes ten minutes on two cores. *models* compares what prunesim reads of model types, released
models and files (default: all) with what the installed Transformers builds.
*changes* compares the scores on generated pages with those at another commit; its status is 1 if a
set is worse by more than a tenth.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from calibration.evidence import models
from calibration.evidence.changes import evidence_changes
from calibration.evidence.claims import claim_tables
from calibration.evidence.commands_page import commands_page
from calibration.evidence.pages import (
    DOCS,
    accuracy_page,
    accuracy_text,
    engine_tables,
    filled,
)
from calibration.evidence.power import power_tables
from calibration.evidence.published import host_lines
from calibration.evidence.schedules import schedule_tables
from calibration.evidence.sets import SETS, Row, evaluate_sets
from calibration.validation.scoring import table
from simulator.cli import parsing
from simulator.errors import InputError, unknown
from simulator.figures.style import save_figure
from simulator.files.write import write_whole

VALIDATION = DOCS / "validation" / "README.md"


def printed(options: argparse.Namespace) -> str:
    if options.names == ["list"]:
        sets = [[name, one.held_out] for name, one in SETS.items()]
        return table(["set", "held out"], sets, left=(0, 1))
    if options.names == ["hosts"]:
        return "\n".join(host_lines())
    rows = scored(options, options.names)
    return accuracy_text(rows).rstrip()


def scored(options: argparse.Namespace, names: Sequence[str]) -> list[Row]:
    seeds = parsing.integers("--seeds", options.seeds)
    report = partial(print, file=sys.stderr, flush=True)
    return evaluate_sets(names, seeds, options.wheel, max(options.jobs, 1), report)


def write_pages(options: argparse.Namespace, names: Sequence[str]) -> None:
    from calibration.evidence import recorded  # it needs torch

    tables: Mapping[str, Callable[[], Sequence[str]]] = {
        "claims": claim_tables,
        "engines": engine_tables,
        "energy": power_tables,
        "serving": schedule_tables,
        **{page: partial(recorded.page_tables, page) for page in recorded.FOLDERS},
        "models": models.record_tables,
    }
    texts: Mapping[str, Callable[[], str]] = {
        "commands": commands_page,
        "accuracy": lambda: accuracy_page(scored(options, ())),
    }
    others: Mapping[str, Callable[[], None]] = {
        "measured": lambda: save_figure(recorded.overview(), DOCS.parent / "measured.png"),
        "validation": run_validation_commands,
    }
    known = [*tables, *others, *texts]
    for name in names:
        if name not in known:
            raise unknown("page", name, known)
    for name in names or known:
        if name in others:
            others[name]()
        else:
            text = filled(name, tables[name]()) if name in tables else texts[name]()
            write_whole(DOCS / f"{name}.md", text.encode())


def run_validation_commands() -> None:
    """Run the commands that the index of the reports states, one per GPU."""
    for line in re.findall(r"`prunesim (validate [^`]+)`", VALIDATION.read_text("utf-8")):
        words = [sys.executable, "-m", "simulator.cli", *shlex.split(line)]
        subprocess.run(words, check=True, cwd=DOCS.parents[1], stdout=subprocess.DEVNULL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m calibration.evidence", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument(
        "names",
        nargs="*",
        help="sets (default: all), list, hosts, pages PAGE, models NAME or changes COMMIT",
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the splits; means are printed")
    parser.add_argument("--wheel", type=Path, help="the wheel of the tables, for mla and experts")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    options = parser.parse_args(arguments)
    try:
        if options.names[:1] == ["pages"]:
            write_pages(options, options.names[1:])
        elif options.names[:1] == ["models"]:
            text, exact = models.report(options.names[1:])
            print(text)
            return int(not exact)
        elif options.names[:1] == ["changes"]:
            text, worse = evidence_changes(*options.names[1:])
            print(text)
            return int(worse > 0)
        else:
            print(printed(options))
    except InputError as error:
        print(f"calibration.evidence: {error}", file=sys.stderr)
        return 2
    return 0
