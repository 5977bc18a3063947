"""Keep fitted values within the ranges of a profile, so every profile that is written can be read again.

Times of a busy machine can lead a fit to values that no device has. :func:`within_ranges` replaces them by the end of
their range, and states them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType

from simulator.display import few
from simulator.hardware.arrays import clipped
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.sections import ACCURACY_RANGE, MOST_STD_ERROR, SCALE_RANGE, Fitted, Section
from simulator.operators import CONSTANTS

_ROUNDING = 1e-9  # relative difference of a value on the end of its range


def within_ranges(profile: HardwareProfile) -> tuple[HardwareProfile, list[str]]:
    """Return a profile whose fitted sections can be read again, and a note per section that had to change.

    Constants, section scales, errors and arrays are set to the end of their range; a value that is not a number becomes
    the default of the architecture.
    """
    sections, notes = dict(profile.sections), []
    for (operator, dtype), section in profile.sections.items():
        changed, outside = _section(operator, section, profile.architecture)
        if changed is not section:
            sections[operator, dtype] = changed
        if outside:
            fact = f"{few(outside)} outside the range of any device"
            notes.append(
                f"{operator} {dtype}: {fact}; set to its end; measure again on an idle machine".replace(" *", "")
            )
    if all(sections[key] is section for key, section in profile.sections.items()):
        return profile, notes
    kept = MappingProxyType(sections)
    return replace(profile, sections=kept, stacks=MappingProxyType({"": kept})), notes


def _section(operator: str, section: Section, architecture: str) -> tuple[Section, list[str]]:
    """Return a section within its ranges (the same object if it is), and the constants that were not."""
    constants, outside = {}, []
    for name, fitted in section.constants.items():
        known = CONSTANTS[operator][name]
        kept = fitted
        if not math.isfinite(fitted.value):
            kept = Fitted(known.default(architecture), None, "default")
        elif not known.low <= fitted.value <= known.high:
            kept = Fitted(min(max(fitted.value, known.low), known.high), None, "fixed")
        if kept.std_error is not None and not 0.0 <= kept.std_error <= MOST_STD_ERROR:
            kept = replace(kept, std_error=None)
        if not math.isclose(kept.value, fitted.value, rel_tol=_ROUNDING):
            outside.append(f"{name} {fitted.value:.3g}")
        constants[name] = kept
    low, high = SCALE_RANGE
    scale = min(max(section.section_scale, low), high) if section.section_scale == section.section_scale else high
    least, most = ACCURACY_RANGE
    accuracy = {n: min(max(v, least), most) for n, v in section.accuracy.items() if v == v}
    arrays = clipped(section.arrays)
    same = constants == dict(section.constants) and accuracy == dict(section.accuracy)
    if same and scale == section.section_scale and arrays is section.arrays:
        return section, outside
    return replace(section, constants=constants, section_scale=scale, accuracy=accuracy, arrays=arrays), outside
