"""The taxonomy paper's bench (arXiv 2606.09080), predicted: where the time of its dense model goes (Figure 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calibration.measurements import published
from simulator.hardware.library import load_hardware
from simulator.kernels.stack import Stack
from simulator.kernels.stream import passes
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.workload import ROLES, Kind

PARTS: Mapping[str, tuple[str, ...]] = {
    "gate/up/down": ("gate", "up", "down"),
    "attention": ("attention",),
    "q/k/v/o": ("q", "k", "v", "o"),
    "lm_head": ("lm_head",),
}
"""Parts of the figure -> roles; all else is elementwise, and the gaps between kernels are "graph execution"."""


@dataclass(frozen=True)
class FigurePart:
    """A part of a pass: its time in the paper, and predicted."""

    phase: str
    part: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1.0


def figure_2() -> list[FigurePart]:
    """Parts of prefill and decode, and the whole.

    In prefill the paper's graph takes 4.5 % that no kernel shows and its head under 0.1 %; logits of all positions, as
    its code computes them, take what the graph does. So the two are compared together there.
    """
    rows = [r for r in published("paper") if r["what"] == "figure 2"]
    out = []
    for phase in dict.fromkeys(r["phase"] for r in rows):
        mine = [r for r in rows if r["phase"] == phase]
        (total,) = (float(r["value"]) for r in mine if r["metric"] == "seconds")
        shares = {r["part"]: float(r["value"]) for r in mine if r["metric"] == "share"}
        first = mine[0]
        batch, seq = int(first["batch"]), int(first["seq"])
        w = lower(load_model(first["model"]), phase=phase, batch=batch, seq=seq, engine="reference")
        p = passes(Stack.of([w]), load_hardware(first["hardware"]))
        role, spent = np.array(ROLES)[w.role], p.row_s
        known = {name: float(spent[np.isin(role, roles)].sum()) for name, roles in PARTS.items()}
        known["elementwise"] = float(spent[w.kind == Kind.ELEMENTWISE].sum())
        known["graph execution"] = float(p.gap_s[0])
        if phase == "prefill":
            shares["graph execution and lm_head"] = shares.pop("graph execution") + shares.pop("lm_head")
            known["graph execution and lm_head"] = known.pop("graph execution") + known.pop("lm_head")
        out += [FigurePart(phase, name, share * total, known[name]) for name, share in shares.items()]
        out.append(FigurePart(phase, "all", total, float(p.total_s[0])))
    return out
