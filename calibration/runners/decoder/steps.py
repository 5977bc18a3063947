"""Prune a decoder by the steps of a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature

import numpy as np

from calibration.runners.cases import description_of
from calibration.runners.decoder.described import check_method, with_method
from calibration.runners.decoder.families import DYNAMIC, STATIC, different, prune_decoder
from calibration.runners.decoder.model import Decoder
from simulator.errors import InputError, unknown
from simulator.pruning import FamilyStep


def prune_by_steps(decoder: Decoder, steps: Sequence[FamilyStep]) -> Decoder:
    for step in steps:
        if (about := description_of(step)) is not None:
            decoder = with_method(decoder, about, step.sparsity)
        else:
            decoder = prune_decoder(
                decoder, step.family.name, step.sparsity, layers=step.layers, **step.options
            )
    return decoder


def check_steps(steps: Sequence[FamilyStep]) -> None:
    dynamic = ""
    for step in steps:
        name = step.family.name
        if dynamic and name != "depth":
            raise InputError(
                f"{name}: this decoder runs one dynamic family, and it is the last; got {dynamic}"
                " before"
            )
        dynamic = name if step.family.dynamic else dynamic
        if (about := description_of(step)) is not None:
            check_method(about)
        elif reason := _lacking(step):
            raise InputError(f"{name}: {reason}" if len(steps) > 1 else reason)


def _lacking(step: FamilyStep) -> str:
    """Return why this decoder cannot run a step, or ""."""
    family, known = step.family.name, {**STATIC, **DYNAMIC}
    if family not in known:
        return str(unknown("pruning family", family, known))
    names = [
        name
        for name in signature(known[family]).parameters
        if name not in ("decoder", "removed", "keep")
    ]
    if bad := sorted(set(different(family, step.options)) - set(names)):
        return f"family {family} has no option {bad[0]!r} here; it has {', '.join(names) or 'none'}"
    if family in DYNAMIC and (
        step.layers is not None or isinstance(step.sparsity, Mapping) or np.ndim(step.sparsity)
    ):
        return (
            f"family {family}: this decoder runs it equally in all layers and parts; expected one"
            " fraction"
        )
    return ""
