"""State what a pruning leaves of each part of a model, after rounding: :func:`removed_parts`.

Parts are layers, query and KV heads, inner widths of MLP and experts, experts, and the hidden size. Sizes are means
over the layers that have the part, on all devices together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from simulator.arrays import Array, BoolArray
from simulator.codes import Kind
from simulator.pruning._rows import readers, writers
from simulator.pruning._steps import PruningStep
from simulator.units import percent
from simulator.workload import Workload

WIDTH = {"attention": ("KV heads",), "heads": ("heads",), "kv": ("KV heads",), "mlp": ("inner width", "expert width")}
SIZES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "width": {**WIDTH, "hidden": ("hidden size",), "": ("KV heads", "inner width", "expert width")},
    "width_cross": {"": ("hidden size",)},
    "depth": {"": ("layers",), "attention": ("attention layers",), "mlp": ("MLP layers",)},
    "experts": {"": ("experts",)},
}
"""Family -> part of a request ("": a fraction without parts) -> sizes of which it is the requested share."""

PER_TOKEN = ("dynamic_depth", "dynamic_width")
"""Families whose sizes depend on the tokens of a request."""

ROUNDED = 0.02
"""Difference of the requested and the realised share of KV heads from which the part ``heads`` is mentioned."""


def sizes(w: Workload) -> dict[str, float]:
    """Return the sizes of the parts of a workload by name."""
    first = np.cumsum(w.is_role("embedding")) <= 1  # a prefill may have several kinds of passes
    down, outputs = readers(w, "down") & first, writers(w, "o") & first
    attention, experts = w.is_attention & first, (w.kind == Kind.EXPERTS) & first
    devices = w.meta.devices if w.meta.parallel in ("tensor", "expert") else 1
    norm = w.is_role("final_norm") & first

    def mean(values: Array, rows: BoolArray, scale: float = 1.0) -> float:
        many = float(w.layers[rows].sum())
        return scale * float((values * w.layers)[rows].sum()) / many if many else 0.0

    return {
        "attention layers": float(w.layers[outputs].sum()),
        "MLP layers": float(w.layers[down | experts].sum()),
        "heads": mean(w.heads, attention, devices),
        "KV heads": mean(w.kv_heads, attention, devices),
        "inner width": mean(w.k, down, devices),
        "experts": mean(w.experts, experts, devices if w.meta.parallel == "expert" else 1),
        "expert width": mean(w.n, experts, devices if w.meta.parallel == "tensor" else 1),
        "hidden size": float(w.n[norm].max(initial=0)),
    }


def removed_parts(steps: Sequence[PruningStep], dense: Mapping[str, float], pruned: Workload) -> str:
    """Return what steps remove of each part of a workload: the requested share, the realised one, and both sizes;
    ``dense`` has the sizes of the dense workload.
    """
    if any(family.name in PER_TOKEN for step in steps for family in step.families):
        return ""
    before, after, asked = dict(dense), sizes(pruned), _requested(steps)
    names = list(before)
    if before["attention layers"] == before["MLP layers"] and after["attention layers"] == after["MLP layers"]:
        for found in (before, after):
            found["layers"] = found.pop("attention layers")
        names = ["layers", *names[2:]]
    changed = [name for name in names if before[name] > 0 and before[name] != after[name]]
    grouped = "heads" in changed and "KV heads" in changed and "KV heads" in asked
    out = []
    for name in changed:
        if grouped and name == "heads":
            continue
        share, sizes_text = 1.0 - after[name] / before[name], f"{_size(before[name])} to {_size(after[name])}"
        if grouped and name == "KV heads":
            sizes_text += f", heads {_size(before['heads'])} to {_size(after['heads'])}"
        wanted = asked.get(name)
        text = percent(share)
        if wanted is not None and percent(wanted) != text:
            text = f"{percent(wanted)} requested, {text} realised"
        hint = "" if wanted is None or name != "KV heads" or abs(wanted - share) < ROUNDED else _alone(steps, wanted)
        out.append(f"{name} {text} ({sizes_text}){hint}")
    return "; ".join(out)


def _alone(steps: Sequence[PruningStep], wanted: float) -> str:
    """Return how to prune query heads alone, if the request names groups of heads."""
    named = any(part in ("", "attention") for step in steps for part in _fractions(step))
    return f", as a KV head goes with its query heads: heads={wanted:g} removes query heads alone" if named else ""


def _requested(steps: Sequence[PruningStep]) -> dict[str, float]:
    """Return the requested share of each size that one step of all layers changes."""
    out: dict[str, float] = {}
    twice: set[str] = set()
    for step in steps:
        for part, fraction in _fractions(step).items():
            for name in SIZES.get(step.name, {}).get(part, ()):
                if name in out:
                    twice.add(name)
                out[name] = fraction
    return {name: fraction for name, fraction in out.items() if name not in twice}


def _fractions(step: PruningStep) -> dict[str, float]:
    if step.layers is not None or (step.options and dict(step.options).get("unit")):
        return {}
    if isinstance(step.sparsity, tuple):
        pairs = (pair for pair in step.sparsity if isinstance(pair, tuple))
        return {part: fraction for part, fraction in pairs if isinstance(fraction, float)}
    return {} if step.sparsity is None else {"": step.sparsity}


def _size(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:.1f}"
