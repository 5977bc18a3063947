"""Evaluate on data that no fit saw: ``python -m calibration.evidence [SET ...]``, or make a generated page of it.

Prints the tables of sets (default: all) and their targets; *accuracy* and *engines* print a page of ``docs/generated``,
or write it (``-o FILE``); *hosts* prints the fitted host times of engines. The accuracy page takes ten minutes on two
cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from calibration.evidence import pages
from calibration.evidence.published import host_lines
from calibration.evidence.scoring import table
from calibration.evidence.sets import SETS, SetOptions, evaluate_sets
from simulator.cli import parsing
from simulator.errors import InputError
from simulator.files.write import check_target, write_whole


def text_of(given: argparse.Namespace) -> str:
    """Return what was asked for."""
    (name,) = given.names if len(given.names) == 1 else ("",)
    if name == "list":
        return table(["set", "held out"], [[name, one.held_out] for name, one in SETS.items()], left=(0, 1)) + "\n"
    if name == "hosts":
        return "\n".join(host_lines()) + "\n"
    if name == "engines":
        return pages.filled("engines", pages.engine_tables())
    sizes = [None if size == "all" else parsing.integers("--sizes", size)[0] for size in given.sizes.split(",")]
    options = SetOptions(tuple(parsing.integers("--seeds", given.seeds)), tuple(sizes), given.wheel)
    rows = evaluate_sets(
        () if name == "accuracy" else given.names,
        options,
        max(given.jobs, 1),
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    return pages.accuracy_page(rows) if name == "accuracy" else pages.accuracy_text(rows, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of the module's docstring and return the exit status."""
    parser = argparse.ArgumentParser("python -m calibration.evidence", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("names", nargs="*", help="sets ('list' lists them), or: accuracy, engines, hosts")
    parser.add_argument("-o", "--output", help="write to this file")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the splits; means are printed")
    parser.add_argument("--sizes", default="400,all", help="numbers of training rows of GEMMs, or all")
    parser.add_argument("--wheel", type=Path, help="the wheel of the tables, for unlisted, mla and experts")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    given = parser.parse_args(arguments)
    try:
        if given.output:
            check_target(given.output)
            write_whole(given.output, text_of(given).encode())
        else:
            print(text_of(given), end="")
    except InputError as error:
        print(f"calibration.evidence: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
