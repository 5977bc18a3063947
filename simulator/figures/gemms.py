"""Draw figures of single GEMMs: staircases of tiles and waves, and predicted against measured times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simulator.figures.subject import Made, NothingToDraw, Paper
from simulator.figures.titles import device_title
from simulator.operators.base import ELEMENT_BYTES
from simulator.uncertainty.operators import gemm_time

if TYPE_CHECKING:
    from simulator.figures.staircase import Stairs
    from simulator.hardware.profile import HardwareProfile
    from simulator.uncertainty.operators import OperatorTimes

TOKENS = np.arange(1, 513)
"""Rows of the staircase of tiles: every number, because a step may be at any of them."""

MORE_TOKENS = np.arange(16, 4097, 8)
"""Rows of the staircase of waves."""


def staircase(p: Paper) -> Made:
    """Draw time and rate of the fused projection over the tokens, and time of the gate projection over its width."""
    from simulator.figures.staircase import staircase_figure

    panels = [_over_tokens(p, hw, row) for row in ("tiles", "waves") for hw in p.devices]
    panels += [_over_width(p, hw) for hw in p.devices]
    used = [hw for hw, panel in zip(p.devices, panels) if np.size(panel.measured)]
    named = "; ".join(f"{device_title(hw.label)}: {p.measured[hw.label].source}" for hw in used)
    caption = (
        f"Staircases of tile and wave quantisation, {p.scenario.dtype}, single GEMMs outside any engine. Top: time of "
        f"the fused q, k, v projection of {p.title} over the tokens; middle: its rate; bottom: time of the gate "
        "projection as width pruning narrows it, cold weights. Line: prediction; band: "
        f"{p.interval}; dashed: datasheet roofline; dotted: roofline at the highest clock, if above the datasheet's"
    )
    caption += f"; circles: measured ({named})." if named else "."
    return staircase_figure(panels, interval=p.interval), caption, ()


def _over_tokens(p: Paper, hw: HardwareProfile, row: str) -> Stairs:
    """Return the panel of the fused q, k, v projection: time of few tokens, or rate of many; weights are as warm as in
    the measurements, if there are any."""
    from simulator.figures.staircase import Stairs

    n, k = (p.model.heads + 2 * p.model.kv_heads) * p.model.head_dim, p.model.hidden
    tokens = TOKENS if row == "tiles" else MORE_TOKENS
    copies, seen_m, seen_s = None, np.zeros(0), np.zeros(0)
    seen = p.measured.get(hw.label)
    if seen is not None:
        rows = np.flatnonzero(seen.of_weight(n, k) & (seen.m <= tokens[-1]))
        seen_m, seen_s = seen.m[rows], seen.seconds[rows]
        copies = float(np.median(seen.copies[rows])) if seen.copies is not None and len(rows) else None
    t = gemm_time(tokens, n, k, hw, dtype=p.scenario.dtype, copies=copies, level=p.scenario.level)
    highest_s = _at_the_highest_clock(p, hw, tokens, n, k)
    names = {"row": row, "column": device_title(hw.label), "x_label": "M (tokens)", "note": f"N {n}, K {k}"}
    if row == "tiles":
        seen_y, columns = 1e6 * seen_s, _microseconds(t, highest_s)
    else:
        work = 2e-12 * tokens * n * k
        seen_y = 2e-12 * seen_m * n * k / seen_s
        columns = {"predicted": work / t.seconds, "lower": work / t.upper, "upper": work / t.lower}
        columns |= {"ideal": work / t.roofline_s, "highest": work / highest_s if highest_s.size else ()}
    y_label = "time (µs)" if row == "tiles" else "TFLOP/s"
    return Stairs(**names, y_label=y_label, x=tokens, measured_x=seen_m, measured=seen_y, **columns)


def _over_width(p: Paper, hw: HardwareProfile) -> Stairs:
    """Return the panel of the gate projection as its output narrows in steps of 16, down to half."""
    from simulator.figures.staircase import Stairs

    inner, k = p.model.inner or p.model.expert_inner, p.model.hidden
    widths = np.arange(max(16, inner // 32 * 16), inner + 1, 16)
    t = gemm_time(p.seq, widths, k, hw, dtype=p.scenario.dtype, level=p.scenario.level)
    highest_s = _at_the_highest_clock(p, hw, p.seq, widths, k)
    names = {
        "row": "pruned width",
        "column": device_title(hw.label),
        "x_label": "N (inner width kept)",
        "note": f"M {p.seq}, K {k}",
    }
    return Stairs(**names, y_label="time (µs)", x=widths, **_microseconds(t, highest_s))


def _at_the_highest_clock(p: Paper, hw: HardwareProfile, m: Any, n: Any, k: int) -> NDArray[np.float64]:
    """Return the roofline at a device's highest clock, s; empty if the datasheet's clock is the highest."""
    if hw.clock_headroom <= 1.0:
        return np.zeros(0)
    dtype, size = p.scenario.dtype, ELEMENT_BYTES[p.scenario.dtype]
    compute_s = 2.0 * m * n * k / (hw.peak_flop_per_s(dtype) * hw.clock_headroom)
    moved_s = size * (1.0 * m * n + 1.0 * n * k + m * k) / hw.bandwidth_bytes_per_s
    return np.asarray(np.maximum(compute_s, moved_s))


def _microseconds(t: OperatorTimes, highest_s: NDArray[np.float64]) -> dict[str, Any]:
    """Return columns of a staircase from times."""
    times = {"predicted": t.seconds, "lower": t.lower, "upper": t.upper, "ideal": t.roofline_s, "highest": highest_s}
    return {name: 1e6 * seconds for name, seconds in times.items()}


def scatter(p: Paper) -> Made:
    """Draw every measured GEMM of each device against its prediction."""
    from simulator.figures.scatter import Cloud, agreement, scatter_figure

    clouds, errors = [], []
    for hw in p.devices:
        seen = p.measured.get(hw.label)
        if seen is None:
            continue
        predicted = seen.predict(hw, p.scenario.dtype)
        title = device_title(hw.label)
        clouds.append(Cloud(title, seen.seconds, predicted, seen.predicted_s is not None))
        a = agreement(seen.seconds, predicted)
        errors.append(f"{title}: {seen.source}, median error {100 * a.median:.1f} %, bias {100 * a.bias:+.1f} %")
    if not clouds:
        names = ", ".join(hw.label for hw in p.devices)
        raise NothingToDraw(f"predicted against measured: no measured GEMMs of {names} (--measured)")
    held = all(c.held_out for c in clouds)
    fitted = "held-out predictions" if held else "some of these rows may have been used to fit the profiles"
    caption = (
        f"Predicted against measured times of single {p.scenario.dtype} GEMMs, and their ratio (dashed: 10 %); colour "
        f"is the density of rows; {fitted}. {'; '.join(errors)}."
    )
    return scatter_figure(clouds), caption, ()
