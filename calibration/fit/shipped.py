"""The calibrated sections of the shipped profiles, made from the measurements that ship: ``python -m
calibration.fit.shipped [NAME ...]``.

Each profile keeps its datasheet; its fitted sections are made again from the tables of :mod:`calibration.measurements`,
one collection and one kernel path a section, and rounded so that the same tables give the same file. A device without
measurements of its own borrows the sections of its sibling, with wider intervals, and says from which. The RTX 4090 is
fitted on tables that do not ship (``--shared-data``, or ``PRUNESIM_SHARED_DATA``); without them its profile is left as
it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from calibration.fit.kernels import fit_sparse_step
from calibration.fit.profile import ProfileFit, fit_profile
from calibration.measurements import load_measurements
from calibration.records.importers import import_table
from calibration.records.table import Records
from simulator.errors import InputError, unknown
from simulator.files.yaml import Problems
from simulator.hardware.library import profiles_folder, save_hardware
from simulator.hardware.profile import Fitted, HardwareProfile, Section
from simulator.hardware.schema import profile_from_text
from simulator.kernels.lattice import smooth_arrays

DATE = "2026-11-25"
"""Of the fits; the tables themselves bear no date."""

BORROWED_SPREAD = 1.08
"""Factor by which borrowed intervals are widened either way: one GPU model differs by 5.5-14.6 % between stacks (DESIGN
section 10)."""

HEAD_DIM = 128
"""Features a head of the attention rows that are fitted: nearly all current models have 128, and one fit of all widths
is worse for each of them (H100 decode, rows of 128: 1.6 % alone, 5.7 % together with 64, 192 and 256)."""

RTX_FILES: Mapping[str, tuple[str, ...]] = {
    "rtx4090_gemm.csv": ("gemm",),
    "rtx4090_attention.csv": ("attention_prefill", "attention_decode"),
    "rtx4090_other_ops.csv": ("elementwise",),
}


@dataclass(frozen=True)
class Recipe:
    """How one profile is made."""

    tables: tuple[str, ...] = ()  # shipped measurements to fit
    formats: tuple[str, ...] = ("bf16",)  # number formats to take from them
    lender: str = ""  # profile that lends what is missing
    lends: tuple[tuple[str, str], ...] = ()  # sections taken from it
    fine: bool = True  # whether its own-stack lattices come along: they fit one number of SMs


_GEMM, _FP8 = ("gemm", "bf16"), ("gemm", "fp8")
_ATTENTION = ("attention_prefill", "bf16"), ("attention_decode", "bf16")


def _tables(gpu: str, prefill: str = "sglang") -> tuple[str, ...]:
    return f"{gpu}/gemm/trtllm", f"{gpu}/attention_prefill/{prefill}", f"{gpu}/attention_decode/sglang"


RECIPES: Mapping[str, Recipe] = {
    "a100_sxm_80gb": Recipe(_tables("a100_sxm", "trtllm"), ("bf16", "int8_wo", "int4_wo")),
    "a100_sxm_40gb": Recipe(lender="a100_sxm_80gb", lends=(_GEMM, *_ATTENTION)),
    "a100_pcie_80gb": Recipe(lender="a100_sxm_80gb", lends=(_GEMM, *_ATTENTION)),
    "h100_sxm": Recipe(_tables("h100_sxm"), ("bf16", "fp8")),
    "h100_pcie": Recipe(lender="h100_sxm", lends=(_GEMM, _FP8, *_ATTENTION), fine=False),
    "h200_sxm": Recipe(_tables("h200_sxm"), lender="h100_sxm", lends=(_FP8,)),
    "l40s": Recipe(_tables("l40s")),
    "rtx_4090": Recipe(lender="l40s"),
    "rtx_pro_6000": Recipe(("rtx_pro_6000/gemm/trtllm",)),
}
"""By profile, lenders before those that borrow."""


def shared_folder(folder: str | None = None) -> Path | None:
    """Where the RTX 4090 tables lie: the folder given, ``PRUNESIM_SHARED_DATA``, or ``../shared/data`` of a checkout;
    None where they are not."""
    checkout = Path(__file__).resolve().parents[3] / "shared" / "data"
    for place in (folder, os.environ.get("PRUNESIM_SHARED_DATA"), checkout):
        if place is not None:
            return Path(place) if all((Path(place) / name).is_file() for name in RTX_FILES) else None
    return None


def tables_of(recipe: Recipe) -> Records:
    """The rows a recipe names."""
    parts = []
    for name in recipe.tables:
        records = load_measurements(name)
        kept = np.isin(records.labels().astype(str), recipe.formats)
        parts.append(records.select(kept & (records.is_operator("gemm") | (records.head_dim == HEAD_DIM))))
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


def datasheet(name: str) -> HardwareProfile:
    """A shipped profile's facts alone; its fitted sections are not even read, for they may hold constants that a model
    no longer has."""
    path = profiles_folder() / f"{name}.yaml"
    problems = Problems(str(path))
    facts = path.read_text(encoding="utf-8").partition("\ncalibrated:")[0] + "\n"
    profile = profile_from_text(facts, path, problems, lambda *_: {})
    if profile is None:
        raise problems.error()
    return profile


@lru_cache(maxsize=16)
def built(name: str, shared: Path | None = None) -> ProfileFit:
    """A shipped profile (a key of :data:`RECIPES`) with its sections made anew, not yet saved; ``shared``: folder of
    the RTX 4090 tables, without which that profile is refused."""
    if name not in RECIPES:
        raise unknown("profile", name, RECIPES)
    recipe = RECIPES[name]
    base = datasheet(name)
    lender = built(recipe.lender, shared).profile if recipe.lender else base
    if name == "rtx_4090":
        if shared is None:
            where = "name their folder by --shared-data or PRUNESIM_SHARED_DATA"
            raise InputError(f"rtx_4090: its tables do not ship; {where}")
        gemms = {key: section for key, section in lender.sections.items() if key[0] == "gemm"}
        # of the lender's GEMM residual the smooth lattice alone: finer ones fit one stack only
        smooth = with_sections(lender, {k: replace(s, arrays=smooth_arrays(s.arrays)) for k, s in gemms.items()})
        fit = fit_profile(base, rtx_tables(shared, base), prior=smooth, date=DATE)
        profile = _with_gap(fit.profile, lender)  # its rows are kernel times of a profiler, the lender's graph replays
    elif recipe.tables:
        fit = fit_profile(base, tables_of(recipe), date=DATE)
        steps = {key: fit_sparse_step(fit.profile, key[1]) for key in fit.profile.sections if key[0] == "gemm"}
        profile = with_sections(fit.profile, steps)
    else:
        fit, profile = ProfileFit(base, ()), base
    sections = {key: rounded(section) for key, section in profile.sections.items()}
    sections |= {key: borrowed(lender.sections[key], lender.name, recipe.fine) for key in recipe.lends}
    return replace(fit, profile=replace(profile, sections=sections))


def with_sections(profile: HardwareProfile, sections: Mapping[tuple[str, str], Section]) -> HardwareProfile:
    """A profile with some sections changed or added."""
    return replace(profile, sections={**profile.sections, **sections})


def borrowed(section: Section, lender: str, fine: bool = True) -> Section:
    """A lender's section as its sibling keeps it: marked, intervals widened, without the errors that are not its
    own."""
    provenance = section.provenance
    if provenance is not None:
        origin = f"{lender}: {provenance.device}, {provenance.software}"
        provenance = replace(provenance, borrowed_from=origin)
    marks = {"fitted": "borrowed"}
    constants = {n: replace(c, status=marks.get(c.status, c.status)) for n, c in section.constants.items()}
    wider = (
        replace(i, low=_round(i.low / BORROWED_SPREAD, 5), high=_round(i.high * BORROWED_SPREAD, 5))
        for i in section.intervals
    )
    arrays = section.arrays if fine else smooth_arrays(section.arrays) or section.arrays
    return Section(constants, dict(arrays), tuple(wider), {}, provenance, "borrowed")


def _with_gap(profile: HardwareProfile, lender: HardwareProfile) -> HardwareProfile:
    """A profile fitted on bare kernel times gets the gap of a graph, if its sibling's fixed time shows one: has more
    than its own."""
    own = profile.sections[_GEMM]
    gap = lender.sections[_GEMM]["t0"] - own["t0"]
    if gap <= 0.0 or own.provenance is None:
        return profile
    constants = {**profile.section("runtime", "*").constants, "graph_gap_s": Fitted(gap, None, "borrowed")}
    origin = f"{lender.name}: its GEMM t0 (graph replays) less this device's (kernel times)"
    provenance = replace(own.provenance, borrowed_from=origin)
    section = Section(constants, provenance=provenance, status="borrowed")
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
    intervals = (
        replace(i, low=min(_round(i.low, 5), 1.0), high=max(_round(i.high, 5), 1.0)) for i in section.intervals
    )
    accuracy = {name: _round(value, 4) for name, value in section.accuracy.items()}
    return replace(section, constants=constants, arrays=arrays, intervals=tuple(intervals), accuracy=accuracy)


def _round(value: float, digits: int) -> float:
    """A number to significant digits.

    >>> _round(0.000123456789, 3), _round(0.0, 3)
    (0.000123, 0.0)
    """
    return float(f"{value:.{digits}g}")


def main(arguments: Sequence[str] | None = None, report: Callable[[str], None] = print) -> int:
    """The command of the module's docstring; returns the exit status."""
    about = "Make the calibrated sections of the shipped profiles."
    parser = argparse.ArgumentParser(prog="python -m calibration.fit.shipped", description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help="profiles to make; all if left out")
    output = "folder for the profiles (default: the one they ship in)"
    parser.add_argument("-o", "--output", type=Path, default=profiles_folder(), help=output)
    parser.add_argument("--shared-data", help="folder of the RTX 4090 tables")
    given = parser.parse_args(arguments)
    shared = shared_folder(given.shared_data)
    try:
        for name in given.names or RECIPES:
            if name == "rtx_4090" and shared is None and not given.names:
                report("rtx_4090: left as it is; its tables do not ship (--shared-data)")
                continue
            made = built(name, shared)
            save_hardware(made.profile, given.output / f"{name}.yaml")
            for (operator, dtype), section in made.profile.sections.items():
                error = f", unseen MAPE {100 * section.accuracy['mape']:.2f} %" if "mape" in section.accuracy else ""
                rows = section.provenance.rows if section.provenance else 0
                report(f"{name} {operator} {dtype}: {section.status}, {rows} rows{error}")
            for note in made.notes:
                report(f"{name}: {note}")
    except InputError as error:
        print(f"calibration.fit.shipped: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
