"""What ships beside the profiles' datasheets, one file a device and stack, made from the measurements:
``python -m calibration.build_profiles [NAME.STACK ...] [--operator LIST] [--wheel FILE]``.

Each fitted section is made from one collection and, in attention, one kernel path, and rounded, so that the same tables
give the same file. Tables that do not ship are read from the wheel they were published in
(:mod:`calibration.measurements.wheel`); without it a section that needs them is kept as it is, and said. A device
without measurements of its own names in its profile the sibling whose stacks it takes. The RTX 4090 is fitted on tables
of a folder (``--shared-data``, or ``PRUNESIM_SHARED_DATA``); without them its file is left as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from calibration.fit.kernels import fit_sparse_step
from calibration.fit.profile import ProfileFit, fit_profile
from calibration.measurements import load_measurements
from calibration.measurements.wheel import CHOICES, datasheet, open_wheel, read_choice
from calibration.records.importers import import_table
from calibration.records.timing_table import Records
from simulator.errors import InputError, unknown
from simulator.hardware.library import load_hardware, profiles_folder
from simulator.hardware.profile import Fitted, HardwareProfile, Section
from simulator.hardware.save import save_stack

DATE = "2026-11-25"
"""Of the fits; the tables themselves bear no date."""

RTX_FILES: Mapping[str, tuple[str, ...]] = {
    "rtx4090_gemm.csv": ("gemm",),
    "rtx4090_attention.csv": ("attention_prefill", "attention_decode"),
    "rtx4090_other_ops.csv": ("elementwise",),
}
_GEMM = ("gemm", "bf16")


@dataclass(frozen=True)
class Recipe:
    """How one stack file is made."""

    hardware: str
    stack: str
    tables: tuple[str, ...] = ()  # measurements to fit; none: the folder of the RTX 4090
    lender: str = ""  # recipe whose GEMM sections are the prior, where the tables say too little

    @property
    def ships(self) -> bool:
        """Whether any of its tables does."""
        return any(CHOICES[name].ships and CHOICES[name].stack != "nccl" for name in self.tables)


_OTHER_HOST = ("l40s.sglang",)
"""Whose all-reduce was timed where GPUs reach each other (20 GB/s each, whatever their number), NCCL's where they do
not (1.3 GB/s each among eight): rows of both are no one machine's."""


def _recipes() -> dict[str, Recipe]:
    """One for each device and stack that the list of measurements has; NCCL's collectives are every stack's. Of vLLM's
    GEMMs those that arithmetic bounds are missing."""
    found: dict[str, Recipe] = {}
    for hardware, stack in dict.fromkeys((c.hardware, c.stack) for c in CHOICES.values() if c.stack != "nccl"):
        own, nccl = ([n for n, c in CHOICES.items() if (c.hardware, c.stack) == (hardware, s)] for s in (stack, "nccl"))
        lender = f"{hardware}.sglang" if stack == "vllm" else ""
        name = f"{hardware}.{stack}"
        found[name] = Recipe(hardware, stack, (*own, *(nccl if name not in _OTHER_HOST else ())), lender)
    return found | {"rtx_4090.vllm": Recipe("rtx_4090", "vllm", lender="l40s.trtllm")}


RECIPES: Mapping[str, Recipe] = _recipes()
"""By the name of the file without its ending: ``h100_sxm.sglang``."""


def shared_folder(folder: str | None = None) -> Path | None:
    """Where the RTX 4090 tables lie: the folder given, ``PRUNESIM_SHARED_DATA``, or ``../shared/data`` of a checkout;
    None where they are not."""
    checkout = Path(__file__).resolve().parents[2] / "shared" / "data"
    for place in (folder, os.environ.get("PRUNESIM_SHARED_DATA"), checkout):
        if place is not None:
            return Path(place) if all((Path(place) / name).is_file() for name in RTX_FILES) else None
    return None


def tables_of(recipe: Recipe, wheel: Path | None = None) -> Records:
    """The rows a recipe names: of the wheel, or of the tables that ship."""
    parts = []
    for name in recipe.tables:
        if wheel is not None:
            with open_wheel(wheel) as archive:
                parts.append(read_choice(archive, CHOICES[name])[0])
        elif CHOICES[name].ships:
            parts.append(load_measurements(name))
    return Records.concat(parts)


def rtx_tables(folder: Path, hw: HardwareProfile) -> Records:
    """The RTX 4090's rows, checked against its datasheet; each names its file and licence, not the folder, which is a
    private place."""
    parts = []
    for name, operators in RTX_FILES.items():
        records = import_table(folder / name, hw=hw, dtype="bf16").records
        sources = []
        for s in records.sources:
            stack = {"vLLM": "0.19"} if "vLLM 0.19" in s.method else s.stack
            sources.append(replace(s, origin=f"{name}, from {s.origin}", licence="MIT", stack=stack))
        parts.append(records.replace(sources=sources).select(records.is_operator(*operators)))
    return Records.concat(parts)


def at_hand(recipe: Recipe, wheel: Path | None, shared: Path | None) -> bool:
    """Whether there are tables to fit."""
    return wheel is not None or recipe.ships if recipe.tables else shared is not None


@lru_cache(maxsize=4)
def built(
    name: str, wheel: Path | None = None, shared: Path | None = None, operators: tuple[str, ...] = ()
) -> ProfileFit:
    """A profile with the sections of one stack (a key of :data:`RECIPES`) made anew, not yet saved; ``shared``: folder
    of the RTX 4090 tables; ``operators``: those alone that lean on no other. InputError where no table is at hand."""
    if name not in RECIPES:
        raise unknown("stack file", name, RECIPES)
    recipe = RECIPES[name]
    if operators:
        recipe = replace(recipe, tables=tuple(t for t in recipe.tables if t.split("/")[1] in operators), lender="")
        if not recipe.tables:
            raise InputError(f"{name}: has no table of {', '.join(operators)}")
    if not at_hand(recipe, wheel, shared):
        where = "name the wheel they are in by --wheel" if recipe.tables else "name their folder by --shared-data"
        raise InputError(f"{name}: its tables do not ship; {where}")
    base, prior = datasheet(recipe.hardware), None
    if recipe.lender:
        lender = built(recipe.lender, wheel, shared).profile
        prior = lender.calibrated({key: s for key, s in lender.sections.items() if key[0] == "gemm"})
    if recipe.tables or shared is None:
        fit = fit_profile(base, tables_of(recipe, wheel), prior=prior, date=DATE)
        dense = [key for key in fit.profile.sections if key[0] == "gemm" and key[1] in base.rates]
        profile = with_sections(fit.profile, {key: fit_sparse_step(fit.profile, key[1]) for key in dense})
    else:
        fit = fit_profile(base, rtx_tables(shared, base), prior=prior, date=DATE)
        profile = _with_gap(fit.profile, lender)  # its rows are kernel times of a profiler, the lender's graph replays
    sections = {key: rounded(section) for key, section in profile.sections.items()}
    return replace(fit, profile=profile.calibrated(sections))


def with_sections(profile: HardwareProfile, sections: Mapping[tuple[str, str], Section]) -> HardwareProfile:
    """A profile with some sections changed or added."""
    return profile.calibrated({**profile.sections, **sections})


def _with_gap(profile: HardwareProfile, lender: HardwareProfile) -> HardwareProfile:
    """A profile fitted on bare kernel times gets the gap of a graph, if its sibling's fixed time shows one: has more
    than its own."""
    own = profile.sections[_GEMM]
    gap = lender.sections[_GEMM]["t0"] - own["t0"]
    if gap <= 0.0 or own.provenance is None:
        return profile
    constants = {**profile.section("runtime", "*").constants, "graph_gap_s": Fitted(gap, None, "inherited")}
    origin = f"{lender.name}: its GEMM t0 (graph replays) less this device's (kernel times)"
    provenance = replace(own.provenance, inherited_from=origin)
    section = Section(constants, provenance=provenance, status="inherited")
    return with_sections(profile, {("runtime", "*"): section})


def rounded(section: Section) -> Section:
    """A section without the digits that differ from one machine's linear algebra to another's; log residuals to 1e-4,
    as float32."""
    constants = {
        name: replace(c, value=_round(c.value, 6), std_error=None if c.std_error is None else _round(c.std_error, 3))
        for name, c in section.constants.items()
    }
    arrays = dict(section.arrays)
    if "values" in arrays:
        arrays["values"] = np.round(arrays["values"], 4).astype(np.float32)
    if "measured" in arrays:
        arrays["measured"] = np.round(arrays["measured"], 3).astype(np.float32)
    accuracy = {name: _round(value, 4) for name, value in section.accuracy.items()}
    scale = _round(section.section_scale, 3)
    return replace(section, constants=constants, arrays=arrays, section_scale=scale, accuracy=accuracy)


def _round(value: float, digits: int) -> float:
    """A number to significant digits.

    >>> _round(0.000123456789, 3), _round(0.0, 3)
    (0.000123, 0.0)
    """
    return float(f"{value:.{digits}g}")


def make(
    name: str, folder: Path, wheel: Path | None = None, shared: Path | None = None, operators: tuple[str, ...] = ()
) -> list[str]:
    """Make a stack file anew; a line of text a section. What needs the wheel, if none is given, stays as it is, and so
    does what is not of the ``operators``, if some are."""
    recipe = RECIPES[name]
    fit = built(name, wheel, shared, operators) if operators else built(name, wheel, shared)
    kept: Mapping[tuple[str, str], Section] = {}
    lines = list(_said(name, fit))
    if (wheel is None or operators) and recipe.tables:
        try:
            before = load_hardware(recipe.hardware).stacks.get(recipe.stack, {})
            kept = {key: section for key, section in before.items() if key not in fit.profile.sections}
            why = "not asked for" if operators else "its rows are in the wheel"
            lines += [f"{name} {' '.join(key)}: kept as it is, {why}" for key in kept]
        except InputError as error:  # it may hold constants that a model no longer has
            lines.append(f"{name}: nothing kept of the file before, which cannot be read: {error}")
    save_stack(with_sections(fit.profile, kept), recipe.stack, folder / f"{name}.yaml")
    return lines


def _root(name: str) -> str:
    return RECIPES[name].lender or name


def _make_all(names: Sequence[str], *how: Any) -> list[str]:
    return [line for name in names for line in make(name, *how)]


def _said(name: str, fit: ProfileFit) -> Iterator[str]:
    for (operator, dtype), section in fit.profile.sections.items():
        error = f", unseen MAPE {100 * section.accuracy['mape']:.2f} %" if "mape" in section.accuracy else ""
        rows = section.provenance.rows if section.provenance else 0
        yield f"{name} {operator} {dtype}: {section.status}, {rows} rows{error}"
    yield from (f"{name}: {note}" for note in fit.notes)


def main(arguments: Sequence[str] | None = None, report: Callable[[str], None] = print) -> int:
    """The command of the module's docstring; returns the exit status."""
    about = "Make what was fitted for each device and stack, from the measurements."
    parser = argparse.ArgumentParser(prog="python -m calibration.build_profiles", description=about)
    parser.add_argument("names", nargs="*", metavar="NAME.STACK", help="files to make; all that can be if left out")
    parser.add_argument("--wheel", type=Path, help="wheel of the measurements, for the tables that do not ship")
    output = "folder for the files (default: the one they ship in)"
    parser.add_argument("-o", "--output", type=Path, default=profiles_folder(), help=output)
    alone = "operators to make anew, comma-separated, what leans on others aside; the rest stays (default: all)"
    parser.add_argument("--operator", metavar="LIST", default="", help=alone)
    parser.add_argument("--shared-data", help="folder of the RTX 4090 tables")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    given = parser.parse_args(arguments)
    shared, names = shared_folder(given.shared_data), given.names
    if not names:
        names = [name for name, recipe in RECIPES.items() if at_hand(recipe, given.wheel, shared)]
        for name in (name for name in RECIPES if name not in names):
            report(f"{name}: left as it is; its tables do not ship (--wheel, of the RTX 4090 --shared-data)")
    try:
        if left := [name for name in names if name not in RECIPES]:
            raise unknown("stack file", left[0], RECIPES)
        operators = tuple(filter(None, given.operator.split(",")))
        tables = {name: {table.split("/")[1] for table in RECIPES[name].tables} for name in names}
        known = sorted({table.split("/")[1] for table in CHOICES})
        for operator in operators:
            if operator not in known:
                raise unknown("operator", operator, known)
        if operators and not given.names:
            names = [name for name in names if tables[name] & set(operators)]
        if given.workers < 1:
            raise InputError(f"--workers: expected 1 or more, got {given.workers}")
        how = given.output, given.wheel, shared, operators
        # who borrows follows its lender in the same process, which has that fit still
        groups = {root: [n for n in names if root in (n, RECIPES[n].lender)] for root in map(_root, names)}
        with ProcessPoolExecutor(given.workers) as pool:
            for made in pool.map(_make_all, groups.values(), *map(repeat, how)):
                for line in made:
                    report(line)
    except InputError as error:
        print(f"calibration.build_profiles: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
