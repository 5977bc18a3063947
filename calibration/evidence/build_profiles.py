"""Build the fitted part of the shipped profiles, one file per device and stack, from the
measurements: ``python -m calibration.evidence.build_profiles [NAME.STACK ...] [--wheel FILE]``.

Values are rounded, because the same tables must give the same file. Tables that do not ship are
read from the wheel in which they were published; without it, their sections are kept, and a line
reports it. ``rtx_4090.vllm.yaml`` was fitted to tables that may not be committed, by this program
of commit 98c6d5ac.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from calibration.evidence.measurements.wheel import SOURCES, datasheet, read_source
from calibration.fit.profile import ProfileFit, fit_profile, fit_sparse24
from calibration.records.timing_table import Records
from simulator.errors import InputError, unknown
from simulator.hardware.library import load_hardware, profiles_folder
from simulator.hardware.profile import Section
from simulator.hardware.save import save_stack

DATE = "2026-11-25"  # date of the fits; the tables have no date


@dataclass(frozen=True)
class Recipe:
    hardware: str
    stack: str
    tables: tuple[str, ...]  # measurements to fit
    prior: str = ""  # recipe whose GEMM sections are the prior of an incomplete table

    def available(self, wheel: Path | None) -> bool:
        own = (SOURCES[name] for name in self.tables if SOURCES[name].stack != "nccl")
        return wheel is not None or any(table.ships for table in own)


# Stacks without NCCL's rows. Their all-reduce was timed on a machine with peer access between GPUs
# (20 GB/s per GPU for any number of GPUs), NCCL on a machine without peer access (1.3 GB/s per GPU
# among eight).
_OTHER_HOST = ("l40s.sglang",)
# Tables of the machine without peer access: among more than two GPUs, their collectives show its
# host memory, not the usual connection of the GPU, so they are not fitted.
STAGED = tuple(f"l40s/collective/{stack}" for stack in ("nccl", "trtllm", "vllm"))


def _recipes() -> dict[str, Recipe]:
    """Return a recipe per device and stack; NCCL's collectives belong to every stack. vLLM's tables
    lack the compute-bound GEMMs, so SGLang's section is their prior."""
    tables: dict[tuple[str, str], list[str]] = {}
    for source in SOURCES.values():
        tables.setdefault((source.hardware, source.stack), []).append(source.name)
    recipes: dict[str, Recipe] = {}
    for (hardware, stack), own in tables.items():
        name = f"{hardware}.{stack}"
        common = [] if name in _OTHER_HOST else tables.get((hardware, "nccl"), [])
        prior = f"{hardware}.sglang" if stack == "vllm" else ""
        if stack != "nccl":
            recipes[name] = Recipe(hardware, stack, (*own, *common), prior)
    return recipes


# name of the file without its extension (h100_sxm.sglang) -> recipe
RECIPES: Mapping[str, Recipe] = _recipes()


def tables_of(recipe: Recipe, wheel: Path | None = None) -> Records:
    parts = []
    for name in recipe.tables:
        if wheel is not None or SOURCES[name].ships:
            records = read_source(name, wheel)
            parts.append(records.select(records.batch <= 2) if name in STAGED else records)
    return Records.concat(parts)


@lru_cache(maxsize=4)
def build(name: str, wheel: Path | None = None) -> ProfileFit:
    """Fit the sections of one stack (a key of :data:`RECIPES`) and return the profile, not yet
    saved. InputError if no table is available."""
    if name not in RECIPES:
        raise unknown("stack file", name, RECIPES)
    recipe = RECIPES[name]
    if not recipe.available(wheel):
        raise InputError(f"{name}: its tables do not ship; name the wheel they are in by --wheel")
    prior = None
    if recipe.prior:
        related = build(recipe.prior, wheel).profile
        gemms = {key: s for key, s in related.sections.items() if key[0] == "gemm"}
        prior = related.calibrated(gemms)
    base = datasheet(recipe.hardware)
    fit = fit_profile(base, tables_of(recipe, wheel), prior=prior, date=DATE)
    sections = dict(fit.profile.sections)
    for operator, dtype in fit.profile.sections:
        if operator == "gemm" and dtype in base.rates:
            sections[operator, dtype] = fit_sparse24(fit.profile, dtype)
    sections = {key: rounded(section) for key, section in sections.items()}
    return replace(fit, profile=fit.profile.calibrated(sections))


def rounded(section: Section) -> Section:
    """Return a section rounded to the digits that do not depend on a machine's linear algebra."""

    def digits(value: float, count: int) -> float:
        return float(f"{value:.{count}g}")

    constants = {
        name: replace(
            c,
            value=digits(c.value, 6),
            std_error=None if c.std_error is None else digits(c.std_error, 3),
        )
        for name, c in section.constants.items()
    }
    arrays = dict(section.arrays)
    for name, decimals in (("values", 4), ("measured", 3)):
        if name in arrays:
            arrays[name] = np.round(arrays[name], decimals).astype(np.float32)
    accuracy = {name: digits(value, 4) for name, value in section.accuracy.items()}
    scale = digits(section.section_scale, 3)
    return replace(
        section, constants=constants, arrays=arrays, section_scale=scale, accuracy=accuracy
    )


def make(name: str, folder: Path, wheel: Path | None = None) -> list[str]:
    """Write a stack file and return one line of text per section. Sections of powers are kept, and
    those of tables in a wheel that is not given."""
    recipe, fit, lines = RECIPES[name], build(name, wheel), []
    for (operator, dtype), section in fit.profile.sections.items():
        error = section.accuracy.get("mape")
        unseen = "" if error is None else f", unseen MAPE {100 * error:.2f} %"
        rows = section.provenance.rows if section.provenance else 0
        lines.append(f"{name} {operator} {dtype}: {section.status}, {rows} rows{unseen}")
    lines += [f"{name}: {note}" for note in fit.notes]
    before: Mapping[tuple[str, str], Section] = {}
    try:
        before = load_hardware(recipe.hardware).stacks.get(recipe.stack, {})
    except InputError as error:  # the file may have constants that no model has now
        why = f"because the earlier file cannot be read: {error}"
        lines.append(f"{name}: no section kept, {why}")
    kept = {
        key: section
        for key, section in before.items()
        if key not in fit.profile.sections and (wheel is None or key[0] == "power")
    }
    lines += [f"{name} {' '.join(key)}: kept, its rows are not in these tables" for key in kept]
    profile = fit.profile.calibrated({**fit.profile.sections, **kept})
    save_stack(profile, recipe.stack, folder / f"{name}.yaml")
    return lines


def main(arguments: Sequence[str] | None = None, report: Callable[[str], None] = print) -> int:
    about = "Build the fitted part of the shipped profiles from the measurements."
    program = "python -m calibration.evidence.build_profiles"
    parser = argparse.ArgumentParser(prog=program, description=about)
    every = "files to build (default: all whose tables are available)"
    parser.add_argument("names", nargs="*", metavar="NAME.STACK", help=every)
    wheel = "wheel of the measurements, for tables that do not ship"
    parser.add_argument("--wheel", type=Path, help=wheel)
    parser.add_argument("-o", "--output", type=Path, default=profiles_folder(), help="folder")
    given = parser.parse_args(arguments)
    try:
        for name in given.names:
            if name not in RECIPES:
                raise unknown("stack file", name, RECIPES)
        for name in given.names or RECIPES:
            if given.names or RECIPES[name].available(given.wheel):
                for line in make(name, given.output, given.wheel):
                    report(line)
            else:
                report(f"{name}: kept; its tables do not ship")
    except InputError as error:
        print(f"calibration.evidence.build_profiles: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
